"""A model's line θ0 + λ(θ̄ − θ0), measured: one loaded base is moved from λ to λ. Model-facing; it chooses no folders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from merit.evaluation.figures import PARTS, Part
from merit.evaluation.fixed import FixedBatches
from merit.evaluation.forward import Forward
from merit.evaluation.measure import HeldOut
from merit.hf.base import Base
from merit.hf.inplace import Folder, InPlace, TaskVector, blocks_of
from merit.hf.models import autocast, load_model
from merit.hf.rows import EncodedRow
from merit.mixture import draw
from merit.progress import Progress, silent
from merit.recipe.schema import EvaluateSettings
from merit.study.figures import Line, Point

__all__ = ["Rows", "measure_line", "rows_by_part"]

Rows = Mapping[Part, Mapping[str, Sequence[EncodedRow]]]
"""Rows of every dataset, by part."""
Move = Callable[[float], None]


def rows_by_part(held_out: HeldOut, settings: EvaluateSettings, seed: int) -> Rows:
    """The rows of every dataset that the evaluation measures too, by part."""
    drawn: dict[Part, dict[str, list[EncodedRow]]] = {}
    for part in PARTS:
        datasets = held_out.of(part) if settings.heldout or part != "mixture" else {}
        for name, dataset in datasets.items():
            count = len(dataset) if settings.max_examples is None else settings.max_examples
            order = np.sort(draw(len(dataset), count, seed, name, purpose=f"evaluate {part}"))
            if len(order):
                drawn.setdefault(part, {})[name] = [dataset[int(i)] for i in order]
    return drawn


def measure_line(
    base: Base, folder: Path, rows: Rows, scales: Sequence[float], forward: Forward, progress: Progress = silent
) -> Line:
    """Macro losses at every λ, and how far the model is from the base.

    Args:
        base: θ0.
        folder: θ̄: a checkpoint folder, or a LoRA adapter's.
        rows: What is measured.
        scales: Every λ; 0 and 1 are added.
        forward: How rows go through the model.
        progress: In λ.
    """
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    model = load_model(base, forward.device, adapter)
    batches = {part: FixedBatches(datasets, forward, model) for part, datasets in rows.items()}
    points = []
    wanted = sorted({0.0, 1.0, *scales})
    with _along_adapter(model) if adapter else _along(model, base, folder) as (move, displacement):
        for number, scale in enumerate(wanted):
            progress(number, len(wanted), f"λ = {scale:g}")
            move(scale)
            with autocast(base.settings, forward.device):
                points.append(Point(scale, {part: fixed.losses(model).macro for part, fixed in batches.items()}))
    return Line(tuple(points), displacement)


@contextmanager
def _along(model: PreTrainedModel, base: Base, folder: Path) -> Iterator[tuple[Move, float]]:
    """What moves the model to a λ, and ‖θ̄ − θ0‖₂ (float64)."""
    there, direction = InPlace(model, Folder(base.folder)), TaskVector(Folder(folder))
    squares = 0.0
    for name, tensor in there.tensors.items():
        for block in blocks_of(name, tensor.shape):
            change = direction.change(block, there.base.read(block).float())
            squares += 0.0 if change is None else float(change.double().square().sum())
    with there.moving() as move:
        yield lambda scale: move([(scale, direction)]), math.sqrt(squares)


@contextmanager
def _along_adapter(model: PreTrainedModel) -> Iterator[tuple[Move, float]]:
    """The same for a loaded adapter, whose update is proportional to its scaling."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    full = [dict(layer.scaling) for layer in layers]
    updates = (layer.get_delta_weight(name) for layer in layers for name in layer.scaling)
    squares = sum(float(update.double().square().sum()) for update in updates)

    def move(scale: float) -> None:
        for layer, scaling in zip(layers, full, strict=True):
            layer.scaling = {name: scale * value for name, value in scaling.items()}

    yield move, math.sqrt(squares)
