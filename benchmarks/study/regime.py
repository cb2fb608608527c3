"""Where does splitting win? One study after another, each with one thing changed, in one table.

    python -m benchmarks.study.regime text --work FOLDER [--seeds 2] [--only rate groups] [--write] --set model.base=... ...

The recipe is ``benchmarks/study/<mixture>.yaml`` with --set as in its head. Every setting trains joint (also on one branch's
budget), the recipe's own split and a random one of as many groups. What counts is the comparison *at equal learning*
(docs/study.md): at the own split's learned loss, against joint's line from the base (WiSE-FT), against the random split's,
and against the best of all lines of joint training on the same base and mixture, whatever its rate and budget: a split
that beats a joint run past its own cliff has not won. Settings:

- rate, epochs: ``train.learning_rate``, ``train.epochs``, for all three.
- groups, rounds: other ``split.axes`` and ``train.rounds`` for the split and the random one.
- conflict: the half of the mixture whose datasets agree least with each other (cosines of their gradients, corrected for
  noise), and the half that agrees most.
- others, by ``--setting FACTOR LABEL KEY=VALUE``: another base, say.

Studies are kept in FOLDER and go on where they were; more seeds and settings add to them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from benchmarks.report import machine, table

from merit.conflict.result import Geometry
from merit.mixture import read_counts
from merit.recipe.load import load_recipe
from merit.recipe.methods import Own, own_of
from merit.recipe.schema import Recipe
from merit.study.compare import equal_learning
from merit.study.figures import FILE, StudyResult

HERE = Path(__file__).parent
MIXTURES = {"text": "text.yaml", "vision": "vision.yaml", "real": "real_mixture.yaml"}
EPOCHS = (0.5, 3)
AXES, ROUNDS = (1, 3), (2, 4)
FACTORS = ("rate", "epochs", "groups", "rounds", "conflict")


@dataclass(frozen=True)
class Setting:
    """One line of the table.

    Attributes:
        factor: What is changed.
        label: To what.
        overrides: Of the recipe; settings with the same ones share a study.
        own: The method that is looked at.
        random: A random split that is trained in the same way.
    """

    factor: str
    label: str
    overrides: tuple[str, ...]
    own: str
    random: str


def settings_of(recipe: Recipe, only: Sequence[str], rates: Sequence[float]) -> list[Setting]:
    """The recipe as it is, and every change of one thing but conflict."""
    own, random = own_of(recipe).name, f"random-{recipe.group_count}"
    found = [Setting("as in the recipe", "", (), own, random)]
    if "groups" in only:
        found += [
            Setting("groups", str(2**axes), (), Own(recipe.split.method, axes, 1).name, f"random-{2**axes}")
            for axes in AXES
            if axes != recipe.split.axes
        ]
    if "rounds" in only:
        found += [
            Setting("rounds", str(number), (), f"{own}@rounds={number}", f"{random}@rounds={number}")
            for number in ROUNDS
        ]
    changes = [("rate", f"{f:.2g} ×", f"train.learning_rate={f * recipe.train.learning_rate:.3g}") for f in rates]
    changes += [("epochs", f"{number:g}", f"train.epochs={number}") for number in EPOCHS]
    return found + [Setting(factor, label, (text,), own, random) for factor, label, text in changes if factor in only]


def halves(names: Sequence[str], cosines: np.ndarray) -> dict[str, list[str]]:
    """Half of the datasets that agree least with each other, and the half that agrees most.

    Greedy: from the pair with the lowest (highest) cosine on, always the dataset with the lowest (highest) mean cosine to
    those chosen. Datasets without a measured gradient are left out.
    """
    there = np.flatnonzero(~np.isnan(cosines).all(axis=1))
    names, cosines = [names[i] for i in there], cosines[np.ix_(there, there)]
    found, count = {}, len(names)
    for label, sign in (("least agreeing half", 1.0), ("most agreeing half", -1.0)):
        value = sign * cosines + np.diag(np.full(count, np.inf))
        chosen = [int(i) for i in np.unravel_index(np.argmin(value), value.shape)]
        while len(chosen) < (count + 1) // 2:
            rest = [i for i in range(count) if i not in chosen]
            chosen.append(min(rest, key=lambda i: float(sign * cosines[i, chosen].mean())))
        found[label] = [names[i] for i in chosen]
    return found


def by_conflict(run: Path, like: Setting, recipe: Recipe) -> list[Setting]:
    """The two halves, by the gradients of a study that ran already; the label has their mean cosine."""
    folder = next(path for path in (run / "conflict", run / "study" / f"s{recipe.seed}" / "conflict") if path.is_dir())
    geometry = Geometry.load(folder)
    found = []
    for label, kept in halves(geometry.names, geometry.arrays.cosine_corrected).items():
        out = [*recipe.mixture.exclude, *sorted(set(geometry.names) - set(kept))]
        at = [geometry.names.index(name) for name in kept]
        within = geometry.arrays.cosine_corrected[np.ix_(at, at)][np.tril_indices(len(at), -1)].mean()
        label = f"{label}, mean cosine {within:.2f}"
        found.append(replace(like, factor="conflict", label=label, overrides=(f"mixture.exclude={json.dumps(out)}",)))
    return found


def run_study(recipe: Path, settings: Sequence[Setting], run: Path, given: Sequence[str], seeds: int) -> None:
    """Run or finish the study of all settings with the same overrides."""
    names = dict.fromkeys(name for setting in settings for name in (setting.own, setting.random))
    fixed = [f"study.methods=[base, joint, one_budget, {', '.join(names)}]", f"study.seeds={seeds}"]
    fixed += ["study.gradients=once", "study.rounds=[]"]
    words = [word for text in (*given, *fixed, *settings[0].overrides) for word in ("--set", text)]
    print(f"{run.name}: {', '.join(names)}", flush=True)
    with (run.parent / f"{run.name}.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "merit", "study", str(recipe), "--output", str(run), "--yes", *words],
            check=True,
            stdout=log,
            stderr=log,
        )


def figures(result: StudyResult, own: str, random: str) -> dict[str, Any]:
    """What the table says of one setting: losses as the methods ended, and own minus other at equal learning, by seed."""
    values = {(run.method, run.seed): run.values for run in result.runs}
    equal = equal_learning(result.runs, own)
    methods = [name for name in ("base", "joint", "one_budget", own, random) if (name, result.seeds[0]) in values]

    def mean(method: str, column: str) -> float:
        return fmean(values[method, seed][column] for seed in result.seeds)

    def against(other: str, column: str) -> list[float]:
        """In the seeds in which the other learns so much."""
        return [equal[own, s][column] - equal[other, s][column] for s in result.seeds if (other, s) in equal]

    return {
        "own": own,
        "random": random,
        "seeds": list(result.seeds),
        "ended": {method: {column: mean(method, column) for column in COLUMNS} for method in methods},
        "equal": {other: {column: against(other, column) for column in COLUMNS[1:]} for other in ("joint", random)},
    }


def against_best(
    result: StudyResult, own: str, joint: Mapping[str, StudyResult], column: str
) -> tuple[str, list[float]] | None:
    """Own minus the line of joint training that is best on average at the own method's learned loss, by seed.

    Args:
        result: With the own method.
        own: Its name.
        joint: Studies on the same base and mixture, by name; their joint training and that on one branch's budget.
        column: Kept or unseen.

    Returns:
        Whose line, and the differences; None if none reaches that loss in every seed.
    """
    mine = [run for run in result.runs if run.method == own]
    found: dict[str, list[float]] = {}
    for name, study in joint.items():
        for method in ("joint", "one_budget"):
            theirs = [replace(run, method=f"{method}, {name}") for run in study.runs if run.method == method]
            equal = equal_learning([*mine, *theirs], own)
            pairs = [(equal[own, s], equal.get((f"{method}, {name}", s))) for s in result.seeds]
            if all(other is not None for _, other in pairs):
                found[f"{method}, {name}"] = [
                    ours[column] - other[column] for ours, other in pairs if other is not None
                ]
    return max(found.items(), key=lambda item: fmean(item[1])) if found else None


def signed(values: Sequence[float], seeds: int) -> str:
    """Mean difference, and in how many seeds the own method is better; where the other never learns so much, so."""
    if not values:
        return "other learns less"
    few = f" of {seeds}" if len(values) < seeds else ""
    return f"{fmean(values):+.3f} ({sum(value < 0 for value in values)}/{len(values)}{few})"


def rows_of(found: dict[str, Any]) -> list[str]:
    """One line of the table."""
    ended, equal, seeds = found["ended"], found["equal"], len(found["seeds"])
    learned = [ended[name]["learned"] for name in ("base", "joint", found["own"], found["random"])]
    compared = [equal[other][column] for other in ("joint", found["random"]) for column in COLUMNS[1:]]
    best = [found["best"][column] for column in COLUMNS[1:]]
    return [
        *(f"{value:.3f}" for value in learned),
        *(signed(values, seeds) for values in compared),
        *(f"{signed(item['differences'], seeds)} {item['line']}" if item else "–" for item in best),
    ]


COLUMNS = ("learned", "kept", "unseen")
HEADER = [
    "what is changed",
    *("base learned", "joint learned", "own learned", "random learned"),
    *("kept: own − joint", "unseen: own − joint", "kept: own − random", "unseen: own − random"),
    *("kept: own − best joint line", "unseen: own − best joint line"),
]


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", choices=list(MIXTURES))
    parser.add_argument("--work", type=Path, required=True, help="where the studies are kept")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe, for all")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=FACTORS, metavar="FACTOR", help=f"of {', '.join(FACTORS)}")
    parser.add_argument("--rates", nargs="+", type=float, default=[1 / 3, 3, 10], help="multiples of the recipe's rate")
    parser.add_argument("--setting", nargs="+", action="append", default=[], metavar="FACTOR LABEL KEY=VALUE")
    parser.add_argument(
        "--no-run", action="store_true", help="take the studies of FOLDER as they are, finished ones alone"
    )
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/study/results/regime_<mixture>.json, .md"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = HERE / MIXTURES[args.mixture]
    recipe = load_recipe(file, args.set)
    found: list[dict[str, Any]] = []
    results: dict[int, StudyResult] = {}  # by place in found
    alike: dict[str, StudyResult] = {}  # on the recipe's base and mixture

    def take(settings: Sequence[Setting]) -> None:
        for overrides in dict.fromkeys(setting.overrides for setting in settings):
            together = [setting for setting in settings if setting.overrides == overrides]
            run = args.work / (named(f"{together[0].factor} {together[0].label}") if overrides else "as-in-the-recipe")
            if args.no_run and not (run / "study" / FILE).is_file():
                continue
            if not args.no_run:
                run_study(file, together, run, args.set, args.seeds)
            result = StudyResult.load(run / "study")
            together = [setting for setting in together if {setting.own, setting.random} <= set(result.methods)]
            if not any(text.startswith(("mixture.", "model.")) for text in overrides):
                alike[f"{together[0].factor} {together[0].label}".strip() if overrides else "as is"] = result
            for setting in together:
                results[len(found)] = result
                names = [item.name for item in read_counts(run / "mixture")]
                facts = {"factor": setting.factor, "label": setting.label, "datasets": names}
                changes = [text for text in overrides if not text.startswith(("mixture.exclude", "model.base"))]
                found.append({**facts, "changes": changes, **figures(result, setting.own, setting.random)})

    chosen = settings_of(recipe, args.only, args.rates)
    take(chosen)
    if "conflict" in args.only:
        take(by_conflict(args.work / "as-in-the-recipe", chosen[0], recipe))
    take([replace(chosen[0], factor=f, label=label, overrides=tuple(texts)) for f, label, *texts in args.setting])
    for place, item in enumerate(found):
        result = results[place]
        joint = alike if any(result is other for other in alike.values()) else {"as is": result}
        best = {column: against_best(result, item["own"], joint, column) for column in COLUMNS[1:]}
        item["best"] = {k: {"line": v[0], "differences": v[1]} if v else None for k, v in best.items()}
    asked = f"--only {' '.join(args.only)} --rates {' '.join(f'{rate:.3g}' for rate in args.rates)}"
    show(args.mixture, found, f"--seeds {args.seeds} {asked} --set ...", write=args.write)


def named(text: str) -> str:
    """As a folder's name."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text)


def show(mixture: str, found: list[dict[str, Any]], asked: str, *, write: bool) -> None:
    """Print the table; with ``write``, also keep it."""
    facts = machine()
    body = table(HEADER, [[f"{item['factor']} {item['label']}".strip(), *rows_of(item)] for item in found])
    text = "\n".join(
        [
            f"# Where splitting wins: {MIXTURES[mixture]} with one thing changed",
            "",
            f"`python -m benchmarks.study.regime {mixture} --work FOLDER {asked}` on {facts['date']}, "
            f"{facts['cores']} CPU cores, torch {facts['versions']['torch']}.",
            "",
            "Macro losses, nats per target token. Differences are at equal learning: at the own split's learned loss, along "
            "the other's line from the base (λ up to the recipe's largest); negative: the own split is better. In brackets: "
            "in how many of the seeds in which the other learns so much. Best joint line: of all joint training on this "
            "base and mixture in this table, with the whole budget and one branch's; which one is named. Two seeds decide "
            "nothing, and small models favour mixing over merging (arXiv 2601.21115).",
            "",
            body,
            "",
        ]
    )
    print(text)
    if write:
        (HERE / "results" / f"regime_{mixture}.md").write_text(text, encoding="utf-8")
        kept = {"asked": asked, "machine": facts, "settings": found}
        (HERE / "results" / f"regime_{mixture}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
