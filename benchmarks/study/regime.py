"""Where does splitting win? One study after another, each with one thing changed, in one table.

    python -m benchmarks.study.regime text --work FOLDER [--seeds 2] [--only rate groups] [--write] --set model.base=... ...

The recipe is ``benchmarks/study/<mixture>.yaml`` with --set as in its head. Every setting compares three methods: joint
training, the recipe's own split and a random one of as many groups. What counts is the comparison *at equal learning*
(docs/study.md): at the own split's learned loss, against joint's line from the base (WiSE-FT) and against the random
split's. Settings:

- rate, epochs, groups, rounds: ``train.learning_rate``, ``train.epochs``, ``split.axes``, ``train.rounds``.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from benchmarks.report import machine, table

from merit.conflict.result import Geometry
from merit.mixture import read_counts
from merit.recipe.load import load_recipe
from merit.recipe.methods import own_of
from merit.study.compare import equal_learning
from merit.study.figures import StudyResult

HERE = Path(__file__).parent
MIXTURES = {"text": "text.yaml", "vision": "vision.yaml", "real": "real_mixture.yaml"}
RECIPE = ("as in the recipe", "")
FACTORS: dict[str, dict[str, str]] = {
    "rate": {f"{factor:g} ×": f"train.learning_rate={{rate:{factor}}}" for factor in (1 / 3, 3, 10)},
    "epochs": {"0.5": "train.epochs=0.5", "3": "train.epochs=3"},
    "groups": {"2": "split.axes=1", "8": "split.axes=3"},
    "rounds": {"2": "train.rounds=2", "4": "train.rounds=4"},
}


@dataclass(frozen=True)
class Setting:
    """One study: what is changed, and how."""

    factor: str
    label: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Its name in the work folder."""
        return "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{self.factor}-{self.label}")


def settings_of(recipe_rate: float, only: Sequence[str] | None) -> list[Setting]:
    """The recipe as it is, and every change of one thing."""
    found = [Setting(*RECIPE, ())]
    for factor, values in FACTORS.items():
        for label, text in values.items():
            key, _, value = text.partition("=")
            if value.startswith("{rate:"):
                value = f"{float(value[6:-1]) * recipe_rate:.3g}"
            if only is None or factor in only:
                found.append(Setting(factor, label, (f"{key}={value}",)))
    return found


def halves(names: Sequence[str], cosines: np.ndarray) -> dict[str, list[str]]:
    """Half of the datasets that agree least with each other, and the half that agrees most.

    Greedy: from the pair with the lowest (highest) cosine on, always the dataset with the lowest (highest) mean cosine to
    those chosen.
    """
    found, count = {}, len(names)
    for label, sign in (("least agreeing half", 1.0), ("most agreeing half", -1.0)):
        value = sign * cosines + np.diag(np.full(count, np.inf))
        chosen = [int(i) for i in np.unravel_index(np.argmin(value), value.shape)]
        while len(chosen) < (count + 1) // 2:
            rest = [i for i in range(count) if i not in chosen]
            chosen.append(min(rest, key=lambda i: float(sign * cosines[i, chosen].mean())))
        found[label] = [names[i] for i in chosen]
    return found


def by_conflict(run: Path, seed: int, excluded: Sequence[str]) -> list[Setting]:
    """The two halves, by the gradients of a study that ran already."""
    folder = next(path for path in (run / "conflict", run / "study" / f"s{seed}" / "conflict") if path.is_dir())
    geometry = Geometry.load(folder)
    parts = halves(geometry.names, geometry.arrays.cosine_corrected)
    return [
        Setting(
            "conflict", label, (f"mixture.exclude={json.dumps([*excluded, *sorted(set(geometry.names) - set(kept))])}",)
        )
        for label, kept in parts.items()
    ]


def run_study(recipe: Path, setting: Setting, work: Path, given: Sequence[str], seeds: int) -> StudyResult:
    """Run or finish one setting's study."""
    fixed = ["study.methods=[base, joint, own, random]", f"study.seeds={seeds}", "study.gradients=once"]
    words = [word for text in (*given, *fixed, *setting.overrides) for word in ("--set", text)]
    run = work / setting.folder
    print(f"{setting.factor}: {setting.label}", flush=True)
    with (work / f"{setting.folder}.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "merit", "study", str(recipe), "--output", str(run), "--yes", *words],
            check=True,
            stdout=log,
            stderr=log,
        )
    return StudyResult.load(run / "study")


def figures(result: StudyResult, random: str) -> dict[str, Any]:
    """What the table says of one study."""
    own, seeds = result.own, result.seeds
    values = {(run.method, run.seed): run.values for run in result.runs}
    equal = equal_learning(result.runs, own)

    def mean(method: str, column: str) -> float:
        return fmean(values[method, seed][column] for seed in seeds)

    def against(other: str, column: str) -> list[float]:
        """Own minus other at equal learning, in the seeds in which the other learns so much."""
        return [equal[own, s][column] - equal[other, s][column] for s in seeds if (other, s) in equal]

    return {
        "own": own,
        "random": random,
        "seeds": list(seeds),
        "ended": {m: {c: mean(m, c) for c in ("learned", "kept", "unseen")} for m in ("base", "joint", own, random)},
        "equal": {other: {c: against(other, c) for c in ("kept", "unseen")} for other in ("joint", random)},
    }


def signed(values: Sequence[float]) -> str:
    """Mean difference, and in how many seeds the own method is better."""
    if not values:
        return "–"
    return f"{fmean(values):+.3f} ({sum(value < 0 for value in values)}/{len(values)})"


def rows_of(found: dict[str, Any]) -> list[str]:
    """One line of the table."""
    ended, equal = found["ended"], found["equal"]
    learned = [ended[name]["learned"] for name in ("base", "joint", found["own"], found["random"])]
    compared = [equal[other][column] for other in ("joint", found["random"]) for column in ("kept", "unseen")]
    return [*(f"{value:.3f}" for value in learned), *map(signed, compared)]


HEADER = [
    "what is changed",
    *("base learned", "joint learned", "own learned", "random learned"),
    *("kept: own − joint's line", "unseen: own − joint's line", "kept: own − random", "unseen: own − random"),
]


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", choices=list(MIXTURES))
    parser.add_argument("--work", type=Path, required=True, help="where the studies are kept")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe, for all")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="FACTOR", help=f"of {', '.join(FACTORS)}, conflict")
    parser.add_argument("--setting", nargs="+", action="append", default=[], metavar="FACTOR LABEL KEY=VALUE")
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/study/results/regime_<mixture>.json, .md"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = HERE / MIXTURES[args.mixture]
    recipe = load_recipe(file, args.set)
    chosen = settings_of(recipe.train.learning_rate, args.only)
    found: dict[str, dict[str, Any]] = {}

    def take(setting: Setting) -> None:
        result = run_study(file, setting, args.work, args.set, args.seeds)
        changed = load_recipe(file, [*args.set, *setting.overrides])
        random = own_of(
            changed.model_copy(update={"split": changed.split.model_copy(update={"method": "random"})})
        ).name
        found[setting.folder] = {
            "factor": setting.factor,
            "label": setting.label,
            "changes": [text for text in setting.overrides if not text.startswith("mixture.exclude")],
            "datasets": len(read_counts(args.work / setting.folder / "mixture")),
            **figures(result, random),
        }

    for setting in chosen:
        take(setting)
    if args.only is None or "conflict" in args.only:
        for setting in by_conflict(args.work / chosen[0].folder, recipe.seed, recipe.mixture.exclude):
            take(setting)
    for factor, label, *overrides in args.setting:
        take(Setting(factor, label, tuple(overrides)))
    show(args.mixture, found, args.seeds, write=args.write)


def show(mixture: str, found: dict[str, dict[str, Any]], seeds: int, *, write: bool) -> None:
    """Print the table; with ``write``, also keep it."""
    facts = machine()
    body = table(HEADER, [[f"{item['factor']} {item['label']}".strip(), *rows_of(item)] for item in found.values()])
    text = "\n".join(
        [
            f"# Where splitting wins: {MIXTURES[mixture]} with one thing changed",
            "",
            f"`python -m benchmarks.study.regime {mixture} --work FOLDER --seeds {seeds} --set ...` on {facts['date']}, "
            f"{facts['cores']} CPU cores, torch {facts['versions']['torch']}.",
            "",
            "Macro losses, nats per target token. Differences are at equal learning: at the own split's learned loss, along "
            "the other's line from the base; negative: the own split is better. In brackets: in how many of the seeds in "
            "which the other learns so much. –: in none.",
            "",
            body,
            "",
        ]
    )
    print(text)
    if write:
        (HERE / "results" / f"regime_{mixture}.md").write_text(text, encoding="utf-8")
        kept = {"machine": facts, "settings": list(found.values())}
        (HERE / "results" / f"regime_{mixture}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
