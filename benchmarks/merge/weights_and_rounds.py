"""Merge weights and rounds on the text demo's mixture: learned, kept, unseen and drift, over seeds.

    OMP_NUM_THREADS=1 python benchmarks/merge/weights_and_rounds.py --seeds 5

For every seed: joint training, and a conflict-aware (pca) and a random split into four groups, trained in R = 1, 2, 4, 8
rounds, all at the same budget of rows. The branches of R = 1 are also merged with other fixed weights and with searched
ones; the joint model gets WiSE-FT's α by the same search with the same number of points. Every figure is measured on rows
that chose nothing. Seeds that are done are kept in the output, so that a run can be stopped and gone on with. Writes
benchmarks/results/merge_weights_and_rounds.json, .md and .png (matplotlib: extra plots).

Kept at equal learned: along the line θ0 + λ τ of every model, the kept loss where the learned loss has fallen by 50, 75 and
90 % of what joint training learns (α = 1); interpolated between measured λ, never where the line does not get there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark import RESULTS, machine
from transformers import PreTrainedModel

from merit.demo import write_demo
from merit.evaluation import drift
from merit.evaluation.fixed import FixedBatches
from merit.evaluation.forward import Forward
from merit.hf.inplace import Direction, Folder, InPlace, TaskVector
from merit.hf.models import load_model
from merit.merge.search import search_weights
from merit.merge.weights import Losses, weigh
from merit.mixture import load_split
from merit.progress import Silent
from merit.recipe.load import load_recipe
from merit.run.chain import run_chain
from merit.run.scale_search import drift_reference
from merit.run.session import Session
from merit.run.store import split_of
from merit.run.weight_search import halves_of, hold
from merit.train.result import BranchResult

OUT = RESULTS / "merge_weights_and_rounds"
ROUNDS = (1, 2, 4, 8)
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
LEVELS = (0.5, 0.75, 0.9)
FIXED = ("tokens", "target_tokens", "samples", "uniform")


class Measures:
    """One seed's rows in halves, and a model that moves."""

    def __init__(self, session: Session, rows: int) -> None:
        recipe, mixture = session.recipe, session.run / "mixture"
        sets = {part: load_split(mixture, part) for part in ("test", "kept", "unseen")}
        halves = halves_of(sets["test"], sets["kept"], recipe.seed)
        self.model = load_model(session.base, session.device)
        self._forward = Forward(session.base.batcher, session.device, recipe.evaluate.batch_tokens)

        def batches(part: str, half: str) -> FixedBatches:
            chosen = {}
            for name, dataset in sets[part].items():
                numbers = getattr(halves[part], half)[name] if part in halves else range(len(dataset))
                chosen[name] = [dataset[i] for i in list(numbers)[:rows]]
            return FixedBatches({name: part for name, part in chosen.items() if part}, self._forward, self.model)

        self.choosing = batches("test", "choosing"), batches("kept", "choosing")
        self.reporting = {"learned": batches("test", "reporting"), "kept": batches("kept", "reporting")}
        if sets["unseen"]:
            self.reporting["unseen"] = batches("unseen", "reporting")
        prompts = {name: [dataset[i] for i in halves["test"].reporting[name]] for name, dataset in sets["test"].items()}
        self._scratch = tempfile.TemporaryDirectory()
        self._reference = drift_reference(session, self.model, prompts, Path(self._scratch.name))
        self._held = self._place = InPlace(self.model, Folder(session.base.folder))

    def directions(self, folders: Sequence[Path]) -> list[Direction]:
        """Task vectors in memory."""
        found: list[Direction] = [TaskVector(Folder(folder)) for folder in folders]
        self._held, held = hold(self._place, found)
        return list(held)

    def at(self, terms: Sequence[tuple[float, Direction]]) -> Any:
        return self._held.at(*terms)

    def choose(self, terms: Sequence[tuple[float, Direction]]) -> Losses:
        with self.at(terms) as model:
            return Losses(*(part.losses(model).macro for part in self.choosing))

    def report(self, terms: Sequence[tuple[float, Direction]], *, with_drift: bool = True) -> dict[str, float]:
        with self.at(terms) as model:
            found = {name: part.losses(model).macro for name, part in self.reporting.items()}
            if with_drift:
                found["drift"] = self._drift(model)
        return found

    def _drift(self, model: PreTrainedModel) -> float:
        return drift.measure_drift(model, self._reference, self._forward).kl


def one_seed(seed: int, words: argparse.Namespace) -> dict[str, Any]:
    """Train everything for one seed, measure it, and throw the models away."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        recipe = write_demo(root / "demo", seed)
        common = [f"mixture.samples={words.rows}", f"conflict.examples={words.examples}", "baselines=[]"]
        common += ["train.threads=1", "evaluate.drift={prompts: 16, tokens: 24}"]

        def run(name: str, like: str | None, *settings: str) -> Session:
            if like is not None:
                for part in ("mixture", "conflict", "split"):
                    if (root / like / part).is_dir() and not (part == "split" and like == "mixture"):
                        shutil.copytree(root / like / part, root / name / part)
                (root / name / ".merit").touch()
            session = Session(load_recipe(recipe, [*common, *settings]), root / name, Silent())
            started = time.process_time()
            run_chain(session, "merge")
            cpu[name] = round(time.process_time() - started, 2)
            return session

        cpu: dict[str, float] = {}
        sessions = {"pca-1": run("pca-1", None, "split.method=pca")}
        shutil.copytree(root / "pca-1" / "mixture", root / "only" / "mixture")
        sessions["joint"] = run("joint", "only", "split.method=joint")
        sessions["random-1"] = run("random-1", "only", "split.method=random")
        for method in ("pca", "random"):
            for rounds in ROUNDS[1:]:
                name = f"{method}-{rounds}"
                more = [f"split.method={method}", f"train.rounds={rounds}"]
                sessions[name] = run(name, f"{method}-1", *more)
        found = measured(sessions, words)
        tokens = {name: trained(session.run) for name, session in sessions.items()}
        return {"seed": seed, "cpu_seconds": cpu, "target_tokens": tokens, **found}


def trained(run: Path) -> int:
    return sum(BranchResult.load(path.parent).target_tokens for path in run.glob("branches/*/result.json"))


def model_of(session: Session) -> Path:
    joint = session.recipe.split.method == "joint"
    return session.run / ("branches/0/model" if joint else "merged/model")


def measured(sessions: dict[str, Session], words: argparse.Namespace) -> dict[str, Any]:
    """All figures of one seed."""
    measures = Measures(sessions["pca-1"], words.measured)
    models: dict[str, dict[str, float]] = {}
    lines: dict[str, list[dict[str, float]]] = {}
    searches: dict[str, Any] = {}
    for name, session in sessions.items():
        (direction,) = measures.directions([model_of(session)])
        if "base" not in models:
            models["base"] = measures.report([])
        models[name] = measures.report([(1.0, direction)])
        line = [{"scale": 0.0, **models["base"]}]
        for scale in SCALES:
            line.append({"scale": scale, **measures.report([(scale, direction)], with_drift=False)})
        lines[name] = line
        if name == "joint":
            searches["joint wise-ft"] = searched(measures, [direction], [1.0], session, words)
            models["joint wise-ft"] = searches["joint wise-ft"].pop("reported")
    for method in ("pca", "random"):
        session = sessions[f"{method}-1"]
        branches = range(len(split_of(session.run).groups))
        trained_branches = {k: BranchResult.load(session.run / "branches" / str(k)) for k in branches}
        directions = measures.directions([part.model for part in trained_branches.values()])
        for rule in FIXED:
            counts = [float(branch.weight) for branch in weigh(rule, trained_branches, len(branches))]  # type: ignore[arg-type]
            shares = [count / sum(counts) for count in counts]
            models[f"{method} {rule}"] = measures.report(list(zip(shares, directions, strict=True)))
            if rule == "tokens":
                searches[f"{method} auto"] = searched(measures, directions, shares, session, words)
                models[f"{method} auto"] = searches[f"{method} auto"].pop("reported")
    return {"models": models, "lines": lines, "searches": searches}


def searched(
    measures: Measures, directions: list[Direction], start: list[float], session: Session, words: argparse.Namespace
) -> dict[str, Any]:
    """The knee of the search, on the choosing rows; its figures on the reporting rows."""
    settings = session.recipe.merge.search.model_copy(update={"evaluations": words.evaluations})
    found = search_weights(
        lambda c: measures.choose(list(zip(c, directions, strict=True))), start, settings, session.recipe.seed
    )
    chosen = found.chosen.coefficients
    reported = measures.report(list(zip(chosen, directions, strict=True)))
    return {"scale": found.scale, "weights": list(found.weights), "points": len(found.points), "reported": reported}


# ---- tables ---------------------------------------------------------------------------------------------------------


def kept_at(line: list[dict[str, float]], base: float, gain: float, level: float) -> float | None:
    """Kept loss where the line first reaches a learned loss; None where it does not within its scales."""
    wanted = base - level * gain
    for one, two in pairwise(line):
        if one["learned"] >= wanted >= two["learned"]:
            part = (one["learned"] - wanted) / (one["learned"] - two["learned"])
            return one["kept"] + part * (two["kept"] - one["kept"])
    return None


def cell(values: Sequence[float | None]) -> str:
    good = [value for value in values if value is not None]
    if not good:
        return "never"
    spread = f" ± {statistics.stdev(good):.3f}" if len(good) > 1 else ""
    missing = f" ({len(good)} of {len(values)})" if len(good) < len(values) else ""
    return f"{statistics.mean(good):.3f}{spread}{missing}"


def write(seeds: list[dict[str, Any]], words: argparse.Namespace) -> None:
    """Table and plot of the seeds so far."""
    order = ["base", "joint", "joint wise-ft"]
    for method in ("pca", "random"):
        order += [f"{method} {rule}" for rule in (*FIXED, "auto")] + [f"{method}-{rounds}" for rounds in ROUNDS[1:]]
    columns = [c for c in ("learned", "kept", "unseen", "drift") if c in seeds[0]["models"]["base"]]
    host = machine()
    lines = [
        "# Merge weights and rounds on the text demo's mixture",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/merge/weights_and_rounds.py --seeds {len(seeds)} --rows {words.rows} "
        f"--measured {words.measured} --evaluations {words.evaluations} --examples {words.examples}`",
        "",
        f"{len(seeds)} seeds; {words.rows} training rows per dataset (of the demo's own number), one epoch, K = 4; every",
        f"figure on up to {words.measured} rows per dataset that chose nothing; {words.evaluations} points per search. "
        "Means ± standard deviation over seeds; nats per target token, means over datasets; lower is better everywhere.",
        "",
        "| model | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in order:
        cells = [cell([seed["models"][name][column] for seed in seeds]) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "`pca tokens`, `random tokens` are the paper's merge (R = 1); `-2`, `-4`, `-8` are rounds; `auto`, `wise-ft`: the",
        "knee, searched on the other half of the rows.",
        "",
        "Kept loss at equal learned loss, along each model's line θ0 + λ τ (λ from 0 to 1.25): where the learned loss has",
        "fallen by that part of what joint training learns.",
        "",
        "| model | " + " | ".join(f"{level:.0%}" for level in LEVELS) + " |",
        "|---|" + "---|" * len(LEVELS),
    ]
    for name in ["joint", *(f"{method}-{rounds}" for method in ("pca", "random") for rounds in ROUNDS)]:
        cells = []
        for level in LEVELS:
            values = []
            for seed in seeds:
                base, joint = seed["models"]["base"]["learned"], seed["models"]["joint"]["learned"]
                values.append(kept_at(seed["lines"][name], base, base - joint, level))
            cells.append(cell(values))
        lines.append(f"| {name.replace('joint', 'joint (WiSE-FT)')} | {' | '.join(cells)} |")
    searches = [seed["searches"] for seed in seeds]
    lines += ["", "Searched λ and weights by seed:", ""]
    for name in searches[0]:
        found = [f"λ {s[name]['scale']:.2f}, w {', '.join(f'{w:.2f}' for w in s[name]['weights'])}" for s in searches]
        lines.append(f"- {name}: {'; '.join(found)}")
    lines += ["", f"{host['cores']} cores ({host['cpu']}), {host['memory_gib']} GiB; {datetime.date.today()}.", ""]
    OUT.with_suffix(".md").write_text("\n".join(lines))
    settings = {name: getattr(words, name) for name in ("rows", "measured", "evaluations", "examples")}
    values = {"date": str(datetime.date.today()), "machine": host, "settings": settings, "seeds": seeds}
    OUT.with_suffix(".json").write_text(json.dumps(values, indent=2) + "\n")
    plot(seeds)


def plot(seeds: list[dict[str, Any]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axis, method in zip(axes, ("pca", "random"), strict=True):
        names = ["joint", *(f"{method}-{rounds}" for rounds in ROUNDS)]
        for number, name in enumerate(names):
            learned = np.mean([[p["learned"] for p in seed["lines"][name]] for seed in seeds], axis=0)
            kept = np.mean([[p["kept"] for p in seed["lines"][name]] for seed in seeds], axis=0)
            style = {"color": "black", "linestyle": "--"} if name == "joint" else {"color": f"C{number}"}
            label = "joint, WiSE-FT line" if name == "joint" else f"R = {name.rpartition('-')[2]}"
            axis.plot(learned, kept, marker="o", markersize=3, label=label, **style)
        for mark, rule in zip("s^vDP*", (*FIXED, "auto"), strict=False):
            points = [seed["models"][f"{method} {rule}"] for seed in seeds]
            x, y = (statistics.mean(p[c] for p in points) for c in ("learned", "kept"))
            axis.plot(x, y, mark, color="C1", markersize=10 if rule == "auto" else 6, label=rule)
        axis.set(
            title={"pca": "conflict-aware split", "random": "random split"}[method], xlabel="learned (mixture loss) ↓"
        )
        axis.legend(fontsize=7)
    axes[0].set_ylabel("kept (loss on kept sets) ↓")
    figure.suptitle(f"Means of {len(seeds)} seeds; lines: λ from 0 (base) to 1.25")
    figure.tight_layout()
    figure.savefig(OUT.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32, help="Training rows per dataset.")
    parser.add_argument(
        "--measured", type=int, default=4, help="Rows per dataset and half that a point is measured on."
    )
    parser.add_argument("--evaluations", type=int, default=32, help="Points per search.")
    parser.add_argument("--examples", type=int, default=16, help="Calibration examples per dataset.")
    words = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: getattr(words, name) for name in ("rows", "measured", "evaluations", "examples")}
    seeds: list[dict[str, Any]] = []
    if OUT.with_suffix(".json").is_file():
        stored = json.loads(OUT.with_suffix(".json").read_text())
        seeds = stored["seeds"] if stored["settings"] == settings else []
    for seed in range(words.seeds):
        if seed not in [done["seed"] for done in seeds]:
            started, cpu = time.time(), time.process_time()
            seeds.append(one_seed(seed, words))
            print(f"seed {seed}: {time.time() - started:.0f} s, {time.process_time() - cpu:.0f} CPU s", flush=True)
            write(seeds, words)


if __name__ == "__main__":
    main()
