"""The branches' second moments next to their checkpoints: which file they are in, and whether they fit together."""

from __future__ import annotations

from collections.abc import Sequence

from merit.errors import CheckpointError, MergeError
from merit.hf.checkpoint import SECOND_MOMENTS, Checkpoint, read_headers
from merit.merge.weights import Branch

__all__ = ["read_moments"]


def read_moments(base: Checkpoint, branches: Sequence[Branch]) -> tuple[Checkpoint, ...]:
    """Headers of every branch's second moments: in its checkpoint folder, or next to it if that is called ``model``.

    Raises:
        MergeError: A branch has none, or they are not of the same tensors of this base.
        CheckpointError: A file is damaged.
    """
    heads: list[Checkpoint] = []
    for branch in branches:
        folders = [branch.path.parent, branch.path][branch.path.absolute().name != "model" :]
        folder = next((place for place in folders if (place / f"{SECOND_MOMENTS}.safetensors").is_file()), None)
        if folder is None:
            raise MergeError(
                f"{branch.name} has no second moments: {folders[0] / SECOND_MOMENTS}.safetensors is missing.",
                "Branches save them if train.save_second_moments is true while they train; otherwise use another operator.",
            )
        head = read_headers(folder, SECOND_MOMENTS)
        for name, tensor in head.tensors.items():
            stored = base.tensors.get(name)
            if stored is None or stored.shape != tensor.shape or tensor.dtype.tag != "F32":
                raise CheckpointError(
                    f"{folder}: the second moments of {name} are {tensor.dtype.tag} {list(tensor.shape)}; the base has "
                    f"{'no such tensor' if stored is None else list(stored.shape)}, and float32 is expected."
                )
        if heads and heads[0].tensors.keys() != head.tensors.keys():
            odd = sorted(heads[0].tensors.keys() ^ head.tensors.keys())
            raise MergeError(
                f"{branch.name} and {branches[0].name} have second moments of different tensors, first {odd[0]}.",
                "They trained different parts of the model (model.trainable).",
            )
        heads.append(head)
    return tuple(heads)
