"""Exact gradients of a real mixture in blocks of 25 examples: the raw material of the fidelity and calibration figures.

Any union of blocks is a calibration sample whose gradient is known exactly, up to "the whole dataset" (at most ``ROWS``
rows); the blocks follow the seeded draw, so that the first eight are the default sample of 200. Resumable by dataset.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from merit.hf.base import Base, open_base
from merit.recipe.load import parse_recipe
from merit.recipe.schema import Recipe

BLOCK = 25
ROWS = 1000


def make_recipe(base: str, mixture: str, max_length: int, **conflict: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "bench-conflict",
            "model": {"base": base},
            "mixture": {"folder": mixture, "unrepresentable": {"max_share": 0.02, "action": "leave_out"}},
            "train": {"max_length": max_length},
            "conflict": conflict,
        }
    )


def open_mixture(recipe: Recipe, work: Path) -> tuple[Base, dict[str, Any]]:
    """The base and encoded training rows, prepared once in ``work/mixture``."""
    from merit.mixture.stage import load_split, prepare_mixture

    base = open_base(recipe.model)
    if not (work / "mixture" / "datasets.json").exists():
        prepare_mixture(recipe, base, work / "mixture")
    return base, load_split(work / "mixture", "train")


def measure_blocks(recipe: Recipe, work: Path, *, only: list[str] | None = None) -> None:
    """Write ``work/blocks/<dataset>.npy`` (blocks, 2, parameters) float32 gradient sums and ``.json`` facts."""
    import torch

    from merit.conflict.gradients import GradientMeter
    from merit.conflict.store import Sums
    from merit.hf.models import load_model
    from merit.mixture.calibration import draw

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    base, mixture = open_mixture(recipe, work)
    exact = recipe.conflict.model_copy(update={"representation": "exact"})
    model = load_model(base, cpu, trainable=True)
    meter = GradientMeter(model, exact, seed=recipe.seed, batcher=base.batcher, device=cpu, memory="held")
    folder = work / "blocks"
    folder.mkdir(exist_ok=True)
    for name, rows in mixture.items():
        facts_file = folder / f"{name}.json"
        if facts_file.exists() or (only and name not in only):
            continue
        started = time.perf_counter()
        order = draw(len(rows), ROWS, recipe.seed, name)
        starts = range(0, len(order), BLOCK)
        out = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=(len(starts), 2, meter.width)
        )
        sizes = []
        for block, start in enumerate(starts):
            sums = Sums()
            meter.measure(name, [rows[int(i)] for i in order[start : start + BLOCK]], out[block], sums)
            sizes.append(sums.examples)
        out.flush()
        facts_file.write_text(json.dumps({"examples": sizes, "rows": len(order), "dataset_rows": len(rows)}))
        print(f"{name}: {len(order)} rows in {time.perf_counter() - started:.0f} s", flush=True)
