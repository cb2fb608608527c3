"""Exact gradients of a real mixture in blocks of 25 examples: the raw material of the fidelity and calibration figures.

Any union of blocks is a calibration sample whose gradient is known, up to "the whole dataset" (at most ``rows`` rows); the
blocks follow the seeded draw, so that the first eight are the default sample of 200. Kept of them are inner products,
sketches, and the mean gradient of that sample. Resumable by dataset.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from merit.conflict.reliability import PARTS
from merit.hf.base import Base, open_base
from merit.mixture import Datasets, find_datasets, load_split
from merit.recipe.load import parse_recipe
from merit.recipe.schema import Recipe

BLOCK = 25
ROWS = 1000
SKETCH = 2**16
SAMPLE = 200


@dataclass(frozen=True)
class Blocks:
    """One dataset's measured blocks.

    Attributes:
        name: The dataset.
        gram: Inner products of the gradient sums of all quarters of all blocks (blocks, 4, blocks, 4) float64.
        sketches: The same sums, sketched (blocks, 4, SKETCH) float32.
        examples: Rows of every quarter (blocks, 4).
        rows: Rows measured, at most ``rows``.
        sample: Mean gradient of the first ``SAMPLE`` rows (parameters,) float32.
    """

    name: str
    gram: np.ndarray
    sketches: np.ndarray
    examples: np.ndarray
    rows: int
    sample: np.ndarray


def read_blocks(work: Path) -> Iterator[Blocks]:
    """All that were measured, one dataset in memory at a time."""
    for file in sorted((work / "blocks").glob("*.npz")):
        with np.load(file) as stored:
            yield Blocks(file.stem, **{key: stored[key] for key in ("gram", "sketches", "examples", "rows", "sample")})


def make_recipe(base: str, mixture: str, max_length: int, include: list[str]) -> Recipe:
    return parse_recipe(
        {
            "name": "bench-conflict",
            "model": {"base": base},
            "mixture": {
                "folder": mixture,
                "include": include,
                "unrepresentable": {"max_share": 0.02, "action": "leave_out"},
            },
            "train": {"max_length": max_length},
        },
        folder=Path.cwd(),
    )


def open_mixture(recipe: Recipe, work: Path) -> tuple[Base, Datasets]:
    """The base and encoded training rows, prepared once in ``work/mixture``."""
    from merit.mixture.stage import encode_mixture

    base, folder = open_base(recipe.model), work / "mixture"
    if not (folder / "datasets.json").exists():
        encode_mixture(find_datasets(recipe.mixture), base, folder, max_length=recipe.train.max_length)
    return base, load_split(folder, "train")


def measure_blocks(recipe: Recipe, work: Path, rows: int = ROWS, jobs: int = 1) -> None:
    """Write ``work/blocks/<dataset>.npz`` for every dataset that has none."""
    (work / "blocks").mkdir(exist_ok=True)
    _, mixture = open_mixture(recipe, work)
    missing = [name for name in mixture if not (work / "blocks" / f"{name}.npz").exists()]
    missing.sort(key=lambda name: -int(mixture[name].lengths.sum()))
    if jobs == 1:
        _measure(recipe, work, rows, missing)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for done in [pool.submit(_measure, recipe, work, rows, missing[k::jobs]) for k in range(jobs)]:
            done.result()


def _measure(recipe: Recipe, work: Path, most: int, names: list[str]) -> None:
    import torch

    from merit.conflict.compare import compress
    from merit.conflict.geometry import gram_matrix
    from merit.conflict.gradients import GradientMeter
    from merit.conflict.store import Sums
    from merit.hf.models import load_model, trainable_parameters
    from merit.mixture import draw

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    base, mixture = open_mixture(recipe, work)
    exact = recipe.conflict.model_copy(update={"representation": "exact"})
    model = load_model(base, cpu, trainable=True)
    layout = {name: parameter.numel() for name, parameter in trainable_parameters(model).items()}
    meter = GradientMeter(model, exact, seed=recipe.seed, batcher=base.batcher, device=cpu, memory="held")
    for name in names:
        started, rows = time.perf_counter(), mixture[name]
        order = draw(len(rows), most, recipe.seed, name)
        starts = range(0, len(order), BLOCK)
        vectors = np.zeros((len(starts), PARTS, meter.width), dtype=np.float32)
        sizes: list[list[int]] = []
        for block, start in enumerate(starts):
            sums = Sums()
            meter.measure(name, [rows[int(i)] for i in order[start : start + BLOCK]], vectors[block], sums)
            sizes.append(sums.examples)
        flat = list(vectors.reshape(-1, meter.width))
        sample = vectors[: SAMPLE // BLOCK].sum(axis=(0, 1), dtype=np.float64) / min(len(order), SAMPLE)
        unfinished = work / "blocks" / f"{name}.partial"
        found: dict[str, Any] = {
            "gram": gram_matrix(flat, np.float32).reshape(len(starts), PARTS, len(starts), PARTS),
            "sketches": np.array([compress(vector, layout, "sketch", SKETCH, 0) for vector in flat]).reshape(
                len(starts), PARTS, SKETCH
            ),
            "examples": np.array(sizes),
            "rows": np.array(len(order)),
            "sample": sample.astype(np.float32),
        }
        with unfinished.open("wb") as file:
            np.savez(file, **found)
        unfinished.rename(work / "blocks" / f"{name}.npz")
        print(f"{name}: {len(order)} rows in {time.perf_counter() - started:.0f} s", flush=True)
