"""One loaded model whose weights are set in place: θ0 + Σ c_i d_i for any directions d_i, and back to θ0 bit for bit.

What measures many points in weight space (paths between branches, noise, surfaces, a search for merge weights) loads one
model and moves it. Nothing is copied per point: tensors stream in blocks from their files, and θ0 is restored by reading it
again, so that the memory needed above the model is a few blocks. Model-facing; it chooses no folders and computes no loss.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from merit.errors import CheckpointError
from merit.hf.checkpoint import TensorInfo, pread_into, read_headers
from merit.hf.models import file_names

__all__ = ["Block", "Coefficient", "Direction", "Folder", "Held", "InPlace", "Move", "Noise", "TaskVector", "Values"]

BLOCK = 1 << 20
"""Entries per block: 4 MB in float32."""
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Block:
    """Rows ``start`` to ``stop`` (first dimension; a scalar has one row) of the tensor ``name``, as named in files."""

    name: str
    start: int
    stop: int


class Values(Protocol):
    """Where a point's values come from."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every floating tensor by its name in files."""

    def read(self, block: Block) -> torch.Tensor:
        """The block's values in any floating dtype, on any device."""


class Direction(Protocol):
    """A change of the weights."""

    def change(self, block: Block, base: torch.Tensor) -> torch.Tensor | None:
        """Its entries for one block.

        Args:
            block: Which.
            base: θ0's values there, (rows, ...) float32 on the CPU; not to be changed.

        Returns:
            A tensor of the same shape, float32 on the CPU; None where the direction is zero.
        """


Coefficient = float | Mapping[str, float]
"""One number, or one per tensor: by shell patterns over names in files, of which the first that matches counts."""

Move = Callable[[Sequence[tuple[Coefficient, Direction]]], None]
"""Sets the weights to θ0 + Σ c_i d_i."""


# ---- values and directions ------------------------------------------------------------------------------------------


class Folder:
    """The tensors of a full checkpoint folder, read block by block.

    Args:
        folder: A Hugging Face checkpoint folder.
        tensors: Its tensors under the names by which they are asked for, if these are not the names in its own files.

    Raises:
        CheckpointError: See :func:`merit.hf.checkpoint.read_headers`.
    """

    def __init__(self, folder: str | os.PathLike[str], tensors: Mapping[str, TensorInfo] | None = None) -> None:
        self.head = read_headers(folder, "model")
        chosen = self.head.tensors if tensors is None else tensors
        self._tensors = {name: info for name, info in chosen.items() if info.dtype.tag in TORCH}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: info.shape for name, info in self._tensors.items()}

    def read(self, block: Block) -> torch.Tensor:
        """The block's values in the file's dtype."""
        info = self._tensors[block.name]
        shape = info.shape or (1,)
        row = info.nbytes // max(1, shape[0])
        data = bytearray(row * (block.stop - block.start))
        path = self.head.path(info)
        with path.open("rb") as stream:
            pread_into(stream.fileno(), memoryview(data), info.start + row * block.start, path)
        return torch.frombuffer(data, dtype=TORCH[info.dtype.tag]).view(block.stop - block.start, *shape[1:])


class Held:
    """Tensors that are already in memory, by their name in files: a gradient, an eigenvector, a copy of a model."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    @classmethod
    def copy_of(cls, model: PreTrainedModel) -> Held:
        """A copy of a model's floating tensors: θ0 of a model that no folder has."""
        return cls({name: tensor.detach().clone() for name, tensor in floating_tensors(model).items()})

    def read(self, block: Block) -> torch.Tensor:
        """The block's values: a view."""
        return _rows(self.tensors[block.name])[block.start : block.stop]

    def change(self, block: Block, base: torch.Tensor) -> torch.Tensor | None:
        """The values as a direction; tensors that are not held do not change."""
        return self.read(block).to("cpu", torch.float32) if block.name in self.tensors else None


@dataclass(frozen=True)
class TaskVector:
    """θ_k − θ0, subtracted in float32 block by block.

    Attributes:
        values: θ_k. Tensors that it does not have do not change.
    """

    values: Values

    def change(self, block: Block, base: torch.Tensor) -> torch.Tensor | None:
        """θ_k − θ0 of one block."""
        if block.name not in self.values.shapes:
            return None
        return self.values.read(block).to("cpu", torch.float32) - base


@dataclass(frozen=True)
class Noise:
    """Standard normal entries that depend on seed, tensor and block alone: equal on every device and for every subset.

    Attributes:
        seed: Its seed.
        relative: Multiply every tensor's entries by the root mean square of θ0's block (in float64): noise of the size of
            the weights instead of the same size everywhere.
    """

    seed: int
    relative: bool = False

    def change(self, block: Block, base: torch.Tensor) -> torch.Tensor:
        """The block's noise."""
        digest = hashlib.sha256(f"noise\0{self.seed}\0{block.name}\0{block.start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        noise = torch.randn(base.shape, generator=generator, dtype=torch.float32)
        return noise * float(base.double().square().mean().sqrt()) if self.relative else noise


# ---- the model ------------------------------------------------------------------------------------------------------


class InPlace:
    """A model that moves in weight space and comes back.

    Args:
        model: In any floating dtype, at θ0; quantized and adapter-wrapped models cannot be moved.
        base: θ0: ``Folder(base.folder)`` for a loaded base, ``Held.copy_of(model)`` for a model in memory only.
        names: Tensors that move, by their names in files: the trainable subset, say. None: all floating tensors.

    Raises:
        CheckpointError: A tensor of the model is missing from the base, or has another shape there.
    """

    def __init__(self, model: PreTrainedModel, base: Values, names: Collection[str] | None = None) -> None:
        self.model, self.base = model, base
        found = floating_tensors(model, base.shapes)
        shapes = base.shapes
        moving = [name for name in found if names is None or name in names]
        for name in moving:
            if shapes.get(name) != tuple(found[name].shape):
                raise CheckpointError(
                    f"{name} is {tuple(found[name].shape)} in the model, but {shapes.get(name, 'missing')} in its base.",
                    "A model can be moved only from the weights that it was loaded with.",
                )
        self.tensors = {name: found[name] for name in moving}

    @property
    def size(self) -> int:
        """Number of entries that move."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @contextlib.contextmanager
    def moving(self) -> Iterator[Move]:
        """Within this context the weights may be set any number of times; at its end, also by an error, they are θ0."""
        try:
            yield self._set
        finally:
            self._set(())

    @contextlib.contextmanager
    def at(self, *terms: tuple[Coefficient, Direction]) -> Iterator[PreTrainedModel]:
        """The model at θ0 + Σ c_i d_i within this context."""
        with self.moving() as move:
            move(terms)
            yield self.model

    @torch.no_grad()
    def _set(self, terms: Sequence[tuple[Coefficient, Direction]]) -> None:
        """Set every moving tensor: sums in float32, rounded once to the model's dtype; θ0 itself is copied."""
        for name, tensor in self.tensors.items():
            factors = [(coefficient_of(c, name), direction) for c, direction in terms]
            factors = [(c, direction) for c, direction in factors if c]
            rows = _rows(tensor)
            for block in blocks_of(name, tensor.shape):
                values = self.base.read(block)
                if factors:
                    base = values.to("cpu", torch.float32)
                    values = base.clone()
                    for factor, direction in factors:
                        change = direction.change(block, base)
                        if change is not None:
                            values.add_(change, alpha=factor)
                rows[block.start : block.stop].copy_(values)


def coefficient_of(coefficient: Coefficient, name: str) -> float:
    """A tensor's coefficient.

    Raises:
        ValueError: No pattern matches the tensor.
    """
    if not isinstance(coefficient, Mapping):
        return float(coefficient)
    for pattern, value in coefficient.items():
        if fnmatch.fnmatchcase(name, pattern):
            return float(value)
    raise ValueError(f"none of the patterns {', '.join(map(repr, coefficient))} matches {name}; end with '*'")


def blocks_of(name: str, shape: Sequence[int]) -> Iterator[Block]:
    """A tensor's blocks in order; none of an empty tensor."""
    rows = int(shape[0]) if len(shape) else 1
    entries = int(np.prod(shape, dtype=np.int64))
    if not entries:
        return
    step = max(1, BLOCK // (entries // rows))
    for start in range(0, rows, step):
        yield Block(name, start, min(rows, start + step))


def floating_tensors(model: PreTrainedModel, known: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """The model's own floating parameters and saved buffers by their names in files.

    Args:
        model: The model.
        known: Names by which a tied tensor, which has several, should be called; else its first name is used.
    """
    names = file_names(model)
    aliases: dict[tuple[object, ...], list[str]] = {}
    tensors = {
        names[name]: tensor.detach() for name, tensor in model.state_dict().items() if tensor.is_floating_point()
    }
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        aliases.setdefault(place, []).append(name)
    chosen = (next((name for name in group if name in known), group[0]) for group in aliases.values())
    return {name: tensors[name] for name in chosen}


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() else tensor.unsqueeze(0)
