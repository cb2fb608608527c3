"""The conflict engine's figures, in one command; resumable, and by parts.

    python -m benchmarks.conflict.run --base CHECKPOINT --mixture FOLDER --work SCRATCH [--part NAME]...

Parts: time, memory, blocks (exact gradients of the mixture, by far the longest; the last two need them), fidelity,
calibration. Results go to ``benchmarks/results/conflict.json`` and, as tables, ``conflict.md``. Set
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.conflict import blocks, calibration, cost, fidelity
from benchmarks.conflict.report import report

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("time", "memory", "blocks", "fidelity", "calibration")


def layout_of(recipe: Any) -> dict[str, int]:
    import torch

    from merit.hf.base import open_base
    from merit.hf.models import load_model, trainable_parameters

    model = load_model(open_base(recipe.model), torch.device("cpu"), trainable=True)
    return {name: parameter.numel() for name, parameter in trainable_parameters(model).items()}


def time_part(recipe: Any, work: Path) -> dict[str, Any]:
    import torch

    from merit.hf.batches import Batcher
    from merit.hf.models import load_model

    torch.set_num_threads(1)
    base, mixture = blocks.open_mixture(recipe, work)
    model = load_model(base, torch.device("cpu"), trainable=True)
    by_length = sorted(mixture.values(), key=lambda d: (float(d.lengths.mean()), d.name))
    table = []
    for share in (0.1, 0.5, 0.9):
        dataset = by_length[int(share * len(by_length))]
        rows = [dataset[i] for i in range(min(len(dataset), 60))]
        label = f"{Path(recipe.model.base).name}, {dataset.name}"
        table.append(cost.time_ratio(model, rows, recipe, base.batcher, label))
        print(table[-1], flush=True)
    large = cost.random_qwen2(384, 6, 8192, 1536)
    random = cost.random_rows(24, 128, 8192)
    table.append(cost.time_ratio(large, random, recipe, Batcher(0), "Qwen2 architecture, random weights"))
    return {"ratios": table, **cost.fold_rate()}


def memory_part(work: Path) -> dict[str, Any]:
    found = {"plain": cost.peak_memory("plain", 1, work)}
    for variant, datasets in (("held", 1), ("streamed", 1), ("streamed", 4), ("streamed", 12), ("streamed", 36)):
        found[f"{variant}, {datasets} datasets"] = cost.peak_memory(variant, datasets, work)
    return found


def machine() -> dict[str, Any]:
    import psutil
    import torch
    import transformers

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--mixture", required=True)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder, about 2 GB for the full mixture")
    parser.add_argument("--include", action="append", help="only these datasets (patterns); may be repeated")
    parser.add_argument("--rows", type=int, default=blocks.ROWS, help="rows per dataset that count as all of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes that measure the blocks")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--part", choices=PARTS, action="append")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    recipe = blocks.make_recipe(given.base, given.mixture, given.max_length, given.include or ["*"])
    file = RESULTS / "conflict.json"
    found: dict[str, Any] = json.loads(file.read_text()) if given.part and file.exists() else {}
    found["machine"] = machine()
    for part in given.part or PARTS:
        print(part, flush=True)
        if part == "time":
            found["time"] = time_part(recipe, given.work)
        elif part == "memory":
            found["memory"] = memory_part(given.work)
        elif part == "blocks":
            found["rows"] = given.rows
            blocks.measure_blocks(recipe, given.work, given.rows, given.jobs)
        elif part == "fidelity":
            found["fidelity"] = fidelity.fidelity(given.work, layout_of(recipe))
        else:
            found["sensitivity"] = calibration.sensitivity(given.work)
            found["schemes"] = calibration.draws_and_splits(given.work)
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "conflict.md").write_text(report(found), encoding="utf-8")


if __name__ == "__main__":
    main()
