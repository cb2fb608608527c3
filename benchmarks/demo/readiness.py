"""Are the demos' bases merge-ready? Three criteria, fixed before looking at which method wins, measured on finished runs.

1. The base's loss on the mixture's test rows is at most 2.5 nats per target token (mean over datasets).
2. No barrier above 0.01 nats on any straight path between two branches, between a branch and the merged model, and between
   the base and the merged model, for the conflict-aware and for the random split: max over α = 0.2, 0.4, 0.6, 0.8 of
   L(θ(α)) − [(1 − α) L(θ(0)) + α L(θ(1))], L being the mean over datasets of the loss on fixed test rows.
3. Joint training at the demo's rate keeps at least a quarter of the base's exact match on the kept sets.

None of them compares two splits, or a merge with joint training. Writes ``benchmarks/results/demo_readiness.md``; runs
of other names or seeds that were measured before stay in the table.

Example:
    merit demo --seed 0 --output runs/demo-0 && python -m benchmarks.demo.readiness runs/demo-0
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from benchmarks.report import RESULTS, table, write

from merit.evaluation.figures import Average
from merit.evaluation.fixed import FixedBatches, choose_rows
from merit.evaluation.forward import Forward
from merit.evaluation.results import Evaluation
from merit.hf.base import open_base
from merit.hf.inplace import Folder, InPlace, TaskVector
from merit.hf.models import load_model
from merit.mixture import load_split
from merit.recipe.load import load_recipe

LOSS, BARRIER, KEPT = 2.5, 0.01, 0.25
POINTS = np.linspace(0, 1, 6)
ROWS = 4
"""Test rows per dataset on which paths are measured."""


@dataclass(frozen=True)
class Readiness:
    """What one run says.

    Attributes:
        name: The recipe's name and seed.
        rate: Learning rate.
        base_loss: Nats per target token, mean over the mixture's datasets.
        barriers: Largest excess over the chord by path, nats; negative where every inner point lies below it.
        kept: Exact match on the kept sets of the base and of joint training.
    """

    name: str
    rate: float
    base_loss: float
    barriers: dict[str, float]
    kept: tuple[float, float]

    @property
    def barrier(self) -> float:
        """The highest barrier."""
        return max(self.barriers.values())

    @property
    def ready(self) -> bool:
        """All three criteria."""
        return self.base_loss <= LOSS and self.barrier <= BARRIER and self.kept[1] >= KEPT * self.kept[0]


def barrier(losses: np.ndarray) -> float:
    """Largest excess of the inner points over the chord, of losses (P,) at evenly spaced points from 0 to 1."""
    at = np.linspace(0, 1, len(losses))
    return float((losses - (1 - at) * losses[0] - at * losses[-1])[1:-1].max())


def models_of(run: Path) -> dict[str, dict[str, Path]]:
    """Branches and merged model of the run's split and of its random baseline, by number or ``merged``."""
    scopes = {"conflict": run, "random": run / "baselines" / "random"}
    found = {}
    for name, root in scopes.items():
        branches = {folder.name: folder / "model" for folder in sorted((root / "branches").iterdir())}
        found[name] = branches | {"merged": root / "merged" / "model"}
    return found


def paths(models: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Every pair of models, and the path from the base to the merged one."""
    return [*itertools.combinations(models, 2), ("base", "merged")]


def measure(run: Path) -> Readiness:
    """Measure one finished demo run."""
    recipe = load_recipe(run / "recipe.yaml")
    base = open_base(recipe.model)
    model = load_model(base, torch.device("cpu")).eval()
    rows = choose_rows(load_split(run / "mixture", "test"), ROWS, recipe.seed, "readiness")
    batches = FixedBatches(rows, Forward(base.batcher, torch.device("cpu"), recipe.evaluate.batch_tokens), model)
    mover = InPlace(model, Folder(base.folder))
    barriers = {}
    with mover.moving() as move:

        def loss(*terms: tuple[float, TaskVector]) -> float:
            move(terms)
            return batches.losses(model).macro

        for scope, models in models_of(run).items():
            ways = {name: TaskVector(Folder(folder)) for name, folder in models.items()}
            ends = {name: loss((1.0, way)) for name, way in ways.items()} | {"base": loss()}
            for one, other in paths(models):
                inner = [
                    loss(*((float(c), ways[name]) for c, name in ((1 - at, one), (at, other)) if name != "base"))
                    for at in POINTS[1:-1]
                ]
                barriers[f"{scope}: {one} to {other}"] = barrier(np.array([ends[one], *inner, ends[other]]))
                print(run.name, scope, one, other, round(barriers[f"{scope}: {one} to {other}"], 4), flush=True)
    averages = Evaluation.load(run / "evaluation").summary.macro
    learned, kept, joint = averages["base"].mixture, averages["base"].kept, averages["joint"].kept
    assert learned
    return Readiness(
        f"{recipe.name}, seed {recipe.seed}",
        recipe.train.learning_rate,
        learned.loss,
        barriers,
        (_match(kept), _match(joint)),
    )


def _match(average: Average | None) -> float:
    assert average is not None
    assert average.exact_match is not None
    return average.exact_match


def report(found: list[Readiness], command: str) -> Path:
    """Write the result."""
    rows = [
        [
            item.name,
            f"{item.rate:g}",
            f"{item.base_loss:.3f}",
            f"{item.barrier:.4f} ({len(item.barriers)} paths)",
            f"{item.kept[0]:.3f} → {item.kept[1]:.3f}",
            "yes" if item.ready else "no",
        ]
        for item in found
    ]
    header = ["run", "learning rate", "base: mixture loss", "highest barrier", "kept: base → joint", "merge-ready"]
    said = (
        f"Criteria: mixture loss of the base at most {LOSS:g} nats per target token; no barrier above {BARRIER:g} nats on "
        f"any branch–branch, branch–merged or base–merged path ({len(POINTS)} points, "
        f"{ROWS} test rows per dataset, both splits; negative: every inner point lies below the chord); joint training "
        f"keeps at least {KEPT:.0%} of the base's exact match on the kept sets. Rows of runs that an "
        "earlier call measured stay."
    )
    return write(
        "demo_readiness",
        "Merge-readiness of the demos' bases",
        command,
        f"{said}\n\n{table(header, rows)}",
        {"runs": [asdict(item) | {"ready": item.ready} for item in found]},
    )


def measured_before(names: Sequence[str]) -> list[Readiness]:
    """What the last result says of runs that are not measured now."""
    file = RESULTS / "demo_readiness.json"
    if not file.is_file():
        return []
    known = {field.name for field in fields(Readiness)}
    runs = [{key: value for key, value in run.items() if key in known} for run in json.loads(file.read_text())["runs"]]
    return [Readiness(**run) for run in runs if run["name"] not in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs of merit demo")
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    found = [measure(run) for run in runs]
    found = [*measured_before([item.name for item in found]), *found]
    print(report(found, f"python -m benchmarks.demo.readiness {' '.join(run.name for run in runs)}").read_text())


if __name__ == "__main__":
    main()
