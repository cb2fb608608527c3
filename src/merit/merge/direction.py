"""A branch's task vector as a direction in which a loaded model can be moved: full weights, or the update of an adapter.

Model-facing, with torch: full weights are read block by block; an adapter's s·B·A is made block by block.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from merit.hf.checkpoint import read_headers
from merit.hf.inplace import Block, Direction, Folder, TaskVector
from merit.merge.adapter import Adapter, read_adapter
from merit.merge.agreement import match_tensors
from merit.merge.weights import Branch

__all__ = ["AdapterDirection", "branch_direction"]


class AdapterDirection:
    """θ_k − θ0 of a LoRA branch: s·B·A, tensors saved in full, and biases; zero elsewhere."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def change(self, block: Block, base: torch.Tensor) -> torch.Tensor | None:
        """The update of one block, computed in float64 and rounded to float32."""
        adapter, name, rows = self.adapter, block.name, slice(block.start, block.stop)
        if name not in adapter.full and name not in adapter.shifts and name not in adapter.pairs:
            return None
        delta = np.zeros(base.shape)
        if name in adapter.full:
            delta += adapter.values(adapter.full[name])[rows] - base.double().numpy()
        if name in adapter.shifts:
            bias, scale = adapter.shifts[name]
            delta += scale * adapter.values(bias)[rows]
        if name in adapter.pairs:
            left, right = adapter.factors(name)
            delta += left[rows] @ right
        return torch.from_numpy(delta.astype(np.float32))


def branch_direction(base: Folder, folder: Path, name: str) -> Direction:
    """θ_k − θ0 for a branch's checkpoint folder, or its adapter folder.

    Args:
        base: θ0.
        folder: The branch's.
        name: Its name in messages.

    Raises:
        CheckpointError: The folder cannot be read.
        MergeError: Its tensors are not those of the base, or its kind of adapter is not known to be exactly s·B·A.
    """
    if (folder / "adapter_config.json").is_file():
        return AdapterDirection(read_adapter(Branch(folder, 1, name), base.head))
    tensors, _, _ = match_tensors(base.head, read_headers(folder, "model"), name, True)
    return TaskVector(Folder(folder, tensors))
