"""The outer step of training in rounds: from a round's start past, to or short of its merge, with momentum.

    g = start - merged          the outer gradient
    v = momentum * v + g        the velocity, 0 at first
    next start = start - scale * (g + momentum * v  if Nesterov's, else v)

Float32 in the files, float64 in between; one tensor at a time besides the shard that is being written.

Source: DiLoCo, Douillard et al., arXiv 2311.08105, Algorithm 1 with OuterOpt = SGD with Nesterov momentum.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from merit.hf.checkpoint import Checkpoint, read_headers, read_tensor
from merit.hf.dtypes import to_float
from merit.hf.side_files import copy_files
from merit.recipe.schema import OuterSettings


def outer_step(start: Path, merged: Path, velocity: Path | None, folder: Path, settings: OuterSettings) -> None:
    """Write ``folder/model`` (a checkpoint like ``merged``) and ``folder/momentum`` (v, float32, by tensor name).

    Args:
        start: Checkpoint that the round started from.
        merged: Its merge, in float32, with the same tensors.
        velocity: The last round's ``momentum`` folder; None in the first round.
        folder: Existing folder for both.
        settings: Scale and momentum.
    """
    old, new = read_headers(start, "model"), read_headers(merged, "model")
    known = None if velocity is None else read_headers(velocity, "model")
    model, momentum = folder / "model", folder / "momentum"
    model.mkdir()
    momentum.mkdir()
    for file in new.files.values():
        weights: dict[str, np.ndarray] = {}
        kept: dict[str, np.ndarray] = {}
        for tensor in file.tensors:
            if tensor.dtype.kind != "float":
                weights[tensor.name] = read_tensor(new, tensor.name)
                continue
            before = _values(old, tensor.name)
            gradient = before - _values(new, tensor.name)
            speed = gradient if known is None else settings.momentum * _values(known, tensor.name) + gradient
            step = gradient + settings.momentum * speed if settings.nesterov else speed
            weights[tensor.name] = (before - settings.scale * step).astype(np.float32)
            kept[tensor.name] = speed.astype(np.float32)
        save_file(weights, model / file.name, file.metadata or {"format": "pt"})
        save_file(kept, momentum / file.name)
    copy_files({path.name: path for path in merged.iterdir() if path.is_file() and path.name not in new.files}, model)
    index = merged / f"{new.stem}.safetensors.index.json"
    if index.is_file():
        copy_files({index.name: index}, momentum)


def _values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor, float64."""
    return to_float(read_tensor(checkpoint, name), checkpoint.tensors[name].dtype)
