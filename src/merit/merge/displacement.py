"""How far branches and their merge lie from the base, ‖θ − θ0‖₂: every file is read once, block by block.

Model-facing, with torch; no model is loaded. What the layers contribute and how alike the displacements are is measured by
:mod:`merit.diagnostics.displacement`. Source: §3, Appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from merit.hf.inplace import Folder, blocks_of
from merit.merge.direction import branch_direction
from merit.merge.result import Displacements
from merit.progress import Progress, silent

__all__ = ["measure_displacements"]


def measure_displacements(
    base: Path, branches: Sequence[Path], merged: Path, names: Collection[str], progress: Progress = silent
) -> Displacements:
    """‖θ − θ0‖₂ of every branch and of their merge.

    Args:
        base: Folder of θ0.
        branches: Checkpoint or adapter folders.
        merged: Folder of the merged model.
        names: The weights that training may change, by their names in the base's files.
        progress: In tensors.

    Raises:
        CheckpointError: A folder cannot be read.
        MergeError: A model's tensors are not those of the base.
    """
    origin = Folder(base)
    models = [branch_direction(origin, folder, folder.name) for folder in (*branches, merged)]
    squares = [0.0] * (1 + len(models))
    counted = [(name, shape) for name, shape in origin.shapes.items() if name in names]
    for done, (name, shape) in enumerate(counted, 1):
        for block in blocks_of(name, shape):
            values = origin.read(block).float()
            squares[0] += _square(values)
            for place, model in enumerate(models, 1):
                change = model.change(block, values)
                squares[place] += 0.0 if change is None else _square(change)
        progress(done, len(counted), "displacements")
    norms = [math.sqrt(square) for square in squares]
    return Displacements(norms[0], tuple(norms[1:-1]), norms[-1])


def _square(values: torch.Tensor) -> float:
    """Σ x² in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
