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


def open_mixture(recipe: Recipe, work: Path) -> tuple[Any, dict[str, Any]]:
    """Tokenizer and encoded training rows, prepared once in ``work/mixture``."""
    from merit.hf.models import load_tokenizer
    from merit.mixture import load_split, prepare_mixture

    tokenizer = load_tokenizer(recipe.model)
    if not (work / "mixture" / "datasets.json").exists():
        prepare_mixture(recipe, tokenizer, work / "mixture")
    return tokenizer, load_split(work / "mixture", "train")


def measure_blocks(recipe: Recipe, work: Path, *, only: list[str] | None = None) -> None:
    """Write ``work/blocks/<dataset>.npy`` (blocks, 2, parameters) float32 gradient sums and ``.json`` facts."""
    import torch

    from merit.conflict.gradients import GradientMeter
    from merit.hf.batches import Batcher
    from merit.hf.models import load_model
    from merit.mixture import draw

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    tokenizer, mixture = open_mixture(recipe, work)
    exact = recipe.conflict.model_copy(update={"representation": "exact"})
    model = load_model(recipe.model, cpu, trainable=True)
    meter = GradientMeter(model, exact, seed=recipe.seed, batcher=Batcher.of(tokenizer), device=cpu, memory="held")
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
            facts = meter.measure(name, [rows[int(i)] for i in order[start : start + BLOCK]], out[block])
            sizes.append(facts["examples"])
        out.flush()
        facts_file.write_text(json.dumps({"examples": sizes, "rows": len(order), "dataset_rows": len(rows)}))
        print(f"{name}: {len(order)} rows in {time.perf_counter() - started:.0f} s", flush=True)
