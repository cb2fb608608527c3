"""Adding and removing a dataset against doing everything again, on the text demo.

    OMP_NUM_THREADS=1 python -m benchmarks.merge.add_remove --folder WORK [--datasets NAME ...] [--seed 0] [--samples N]

For each dataset X there are two runs from scratch, without X and with it. Then X is added to the first (`merit add`) and
removed from the second (`merit remove`); each is compared with the other run from scratch. Learned and kept: mean held-out
loss (nats per target token) of the merged model over the mixture's datasets and the kept sets; X: its loss on X. Seconds and
target tokens are those of training; gradients are shared between the runs (conflict.cache). What is done is kept in WORK.
Writes benchmarks/results/merge_add_remove.md and .json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.report import RESULTS, machine, table

from merit.demo import write_demo
from merit.files import write_json, write_text

QUICK = (
    "evaluate.exact_match=never",
    "evaluate.drift.prompts=0",
    "evaluate.branches=false",
    "train.threads=1",
    "baselines=[]",
)


def call(*words: object) -> None:
    """Run a command."""
    command = [sys.executable, "-m", "merit", *map(str, words), "--quiet", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr[-2000:]}")


def losses(datasets: dict[str, Any]) -> float:
    return mean(item["loss"] for item in datasets.values() if item.get("loss") is not None)


def figures(run: Path, dataset: str, others: list[str]) -> dict[str, Any]:
    """The merged model's figures, and what training all branches of the run took."""
    found = json.loads((run / "evaluation" / "results.json").read_text())["merged"]
    kept = json.loads((run / "evaluation" / "kept.json").read_text())["merged"]
    groups = json.loads((run / "split" / "split.json").read_text())["groups"]
    records = [json.loads((run / f"branches/{k}/record.json").read_text()) for k in range(len(groups))]
    return {
        "learned": losses({name: found[name] for name in others}),
        "kept": losses(kept),
        "x": found[dataset]["loss"] if dataset in found else None,
        "tokens": sum(record["target_tokens"] for record in records),
        "seconds": sum(record["seconds"] for record in records),
        "groups": groups,
    }


def changed(run: Path, before: Path, dataset: str, others: list[str], *words: object) -> dict[str, Any]:
    """A copy of ``before`` with a dataset added or removed."""
    if not (run / "changes").is_dir():
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(before, run)
        call(words[0], run, *words[1:], "--evaluate")
    (statement,) = (json.loads(path.read_text()) for path in (run / "changes").glob("*.json"))
    found = figures(run, dataset, others)
    return found | {
        "tokens": statement["target_tokens"],
        "seconds": statement["seconds"],
        "branch": statement["branch"],
    }


def measure(folder: Path, dataset: str, seed: int, samples: int | None) -> list[dict[str, Any]]:
    """Four rows: without, added, with, removed."""
    demo = folder / "demo"
    mixture = demo / "mixture" / dataset
    few = (f"conflict.cache={folder / 'gradients'}", *((f"mixture.samples={samples}",) if samples else ()))
    words = [word for item in (*QUICK, *few, f"seed={seed}") for word in ("--set", item)]
    runs = {kind: folder / f"{dataset}-{seed}-{kind}" for kind in ("without", "with", "added", "removed")}
    leave_out = ["--set", f"mixture.exclude=[{dataset}]"]
    for kind, extra in (("without", leave_out), ("with", [])):
        call("run", demo / "recipe.yaml", "--output", runs[kind], *words, *extra)
    others = [path.name for path in sorted((demo / "mixture").iterdir()) if path.is_dir() and path.name != dataset]
    rows = {kind: figures(runs[kind], dataset, others) for kind in ("without", "with")}
    rows["added"] = changed(runs["added"], runs["without"], dataset, others, "add", mixture)
    rows["removed"] = changed(runs["removed"], runs["with"], dataset, others, "remove", dataset)
    order = ("with", "added", "without", "removed")
    return [{"dataset": dataset, "seed": seed, "kind": kind, **rows[kind]} for kind in order]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, help="Rows per dataset; default: the demo's.")
    options = parser.parse_args()
    if not (options.folder / "demo" / "recipe.yaml").is_file():
        write_demo(options.folder / "demo", 0)
    found = []
    for dataset in options.datasets:
        found += measure(options.folder, dataset, options.seed, options.samples)
        print(json.dumps(found[-4:]), flush=True)
        report(found, options.samples)


def report(found: list[dict[str, Any]], samples: int | None) -> None:
    """Write the table."""
    names = {
        "with": "everything again with X",
        "added": "`merit add X`",
        "without": "everything again without X",
        "removed": "`merit remove X`",
    }
    rows = [
        (
            item["dataset"],
            names[item["kind"]],
            *(f"{item[key]:.3f}" if item[key] is not None else "" for key in ("learned", "kept", "x")),
            f"{item['tokens']:,}",
            f"{item['seconds']:.0f}",
        )
        for item in found
    ]
    host = machine()
    header = ("X", "", "learned (others)", "kept", "X", "target tokens trained", "training (s)")
    lines = [
        "# A dataset more or less: one branch again, or everything again",
        "",
        f"{host['date']}, {host['processor']}, {host['cores']} cores, shared with other work "
        f"(load {host['load_average'][0]}), one thread per run. Held-out loss in nats per target token of the merged model, "
        "lower is better; learned is the mean over the datasets other than X.",
        "",
        table(header, rows),
        "",
        "Repeat: `OMP_NUM_THREADS=1 python -m benchmarks.merge.add_remove --folder WORK --datasets "
        + " ".join(dict.fromkeys(item["dataset"] for item in found))
        + (f" --samples {samples}` (at most {samples} rows per dataset)." if samples else "`."),
    ]
    write_json(RESULTS / "merge_add_remove.json", {"machine": host, "runs": found})
    write_text(RESULTS / "merge_add_remove.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
