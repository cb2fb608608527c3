"""Rounds on the text demo: learned and kept loss for R = 1, 2, 4, with optimizers kept and reset, on two splits.

    OMP_NUM_THREADS=1 python -m benchmarks.merge.rounds --folder WORK [--seeds 0 1 2] [--rounds 2 4] [--samples N]

Every run has the demo's mixture, base, budget and schedule; only the number of rounds and what happens between them differ.
Learned: mean over the mixture's datasets of the held-out loss (nats per target token) of the merged model; kept: the same
over the demo's kept sets. What is done is kept in WORK, so the same command goes on. Writes
benchmarks/results/merge_rounds.md and .json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.report import RESULTS, machine, table

from merit.demo import write_demo
from merit.files import write_json, write_text

QUICK = ("evaluate.exact_match=never", "evaluate.drift.prompts=0", "evaluate.branches=false", "train.threads=1")


@dataclass(frozen=True)
class Setting:
    """One column of the comparison."""

    split: str
    rounds: int
    optimizer: str = "keep"

    @property
    def name(self) -> str:
        return f"{self.split}-{self.rounds}-{self.optimizer}"


def run(folder: Path, recipe: Path, settings: Setting, seed: int, samples: int | None) -> dict[str, Any]:
    """Train, merge and evaluate, going on from what earlier settings share; the figures of the merged model."""
    place, shared = folder / f"{settings.name}-{seed}", folder / f"shared-{seed}"
    overrides = [*QUICK, f"seed={seed}", f"split.method={settings.split}", "baselines=[]"]
    overrides += [f"train.rounds={settings.rounds}", f"train.between.optimizer={settings.optimizer}"]
    overrides += [f"mixture.samples={samples}"] if samples else []
    words = [word for item in overrides for word in ("--set", item)]
    if not place.exists() and shared.exists():
        shutil.copytree(shared, place)
    elif not shared.exists():
        until = ["--set", "split.method=pca", "--until", "gradients"]
        call("run", recipe, "--output", shared, *words, *until)
        shutil.copytree(shared, place)
    call("run", recipe, "--output", place, *words)
    learned = json.loads((place / "evaluation" / "results.json").read_text())
    kept = json.loads((place / "evaluation" / "kept.json").read_text())
    models = {name: {"learned": losses(learned[name]), "kept": losses(kept[name])} for name in ("base", "merged")}
    return {"split": settings.split, "rounds": settings.rounds, "optimizer": settings.optimizer, "seed": seed, **models}


def losses(datasets: dict[str, Any]) -> float:
    return mean(item["loss"] for item in datasets.values() if item.get("loss") is not None)


def call(*words: object) -> None:
    command = [sys.executable, "-m", "merit", *map(str, words), "--quiet", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--samples", type=int, help="Rows per dataset; default: the demo's.")
    parser.add_argument("--splits", nargs="+", default=["pca", "random"])
    options = parser.parse_args()
    demo = options.folder / "demo"
    if not (demo / "recipe.yaml").is_file():
        write_demo(demo, 0)
    found = []
    for seed in options.seeds:
        for split in options.splits:
            several = [Setting(split, r, how) for r in options.rounds for how in ("keep", "reset")]
            for settings in (Setting(split, 1), *several):
                found.append(run(options.folder, demo / "recipe.yaml", settings, seed, options.samples))
                print(json.dumps(found[-1]), flush=True)
                write_json(options.folder / "found.json", found)
    report(found, options.samples)


def report(found: list[dict[str, Any]], samples: int | None) -> None:
    """Write the tables."""
    keys = sorted({(item["split"], item["rounds"], item["optimizer"]) for item in found})
    rows = []
    for split, rounds, optimizer in keys:
        mine = [
            item for item in found if (item["split"], item["rounds"], item["optimizer"]) == (split, rounds, optimizer)
        ]
        figures = [" / ".join(f"{item['merged'][what]:.3f}" for item in mine) for what in ("learned", "kept")]
        means = [f"{mean(item['merged'][what] for item in mine):.3f}" for what in ("learned", "kept")]
        rows.append((split, rounds, optimizer if rounds > 1 else "", *means, *figures))
    base = {what: f"{mean(item['base'][what] for item in found):.3f}" for what in ("learned", "kept")}
    host = machine()
    lines = [
        "# Rounds on the text demo",
        "",
        f"{host['date']}, {host['processor']}, {host['cores']} cores, one thread per run. Held-out loss (nats per target "
        f"token) of the merged model, mean over datasets; lower is better. The base: learned {base['learned']}, kept "
        f"{base['kept']}.",
        "",
        table(("split", "R", "optimizer", "learned", "kept", "learned by seed", "kept by seed"), rows),
        "",
        "Repeat: `OMP_NUM_THREADS=1 python -m benchmarks.merge.rounds --folder WORK"
        + (f" --samples {samples}` (at most {samples} rows per dataset)." if samples else "`."),
    ]
    write_json(RESULTS / "merge_rounds.json", {"machine": host, "runs": found})
    write_text(RESULTS / "merge_rounds.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
