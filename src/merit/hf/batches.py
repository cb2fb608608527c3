"""From encoded rows to batches, and from a batch to the one loss that every stage uses.

Training, gradients and evaluation all pad, decode images and compute cross-entropy here, so that a figure means the same
everywhere. Rows and model are passed in.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from merit.hf.image_inputs import ImageInputs
from merit.hf.rows import EncodedRow

IGNORE = -100
"""Label of a token that is not a target."""


class Batcher:
    """Rows → one padded batch, as every stage feeds it to a model.

    Args:
        pad_id: Token to pad with; it is masked.
        images: How the base processes images; None for a text-only base.
    """

    def __init__(self, pad_id: int, images: ImageInputs | None = None) -> None:
        self.pad_id = pad_id
        self.images = images

    def __call__(self, rows: Sequence[EncodedRow], *, left: bool = False) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels`` (−100 where no target), each (B, L) int64.

        Vision-language models also get pixels (float32, all images of the batch in order, decoded now) if a
        row of the batch has an image, and the input that marks image tokens (B, L) if the model needs one.

        Args:
            rows: The batch.
            left: Pad on the left (to generate) instead of the right.

        Raises:
            MixtureError: An image can no longer be read.
        """
        longest = max(len(row.input_ids) for row in rows)
        input_ids = np.full((len(rows), longest), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        labels = np.full((len(rows), longest), IGNORE, dtype=np.int64)
        for i, row in enumerate(rows):
            n = len(row.input_ids)
            place = slice(longest - n, longest) if left else slice(n)
            input_ids[i, place] = row.input_ids
            mask[i, place] = 1
            labels[i, place] = np.where(row.targets, row.input_ids, IGNORE)
        batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        pictures = [image for row in rows for image in row.images]
        if not pictures:
            return {name: torch.from_numpy(array) for name, array in batch.items()}
        assert self.images is not None, "rows with images were encoded for a vision-language base"
        if self.images.types:
            batch[self.images.types] = (input_ids == self.images.token_id) * mask
        return {name: torch.from_numpy(array) for name, array in batch.items()} | self.images.tensors(pictures)


def target_losses(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every example's target tokens: the loss of training, gradients and evaluation alike.

    Logits are computed only at positions where some example of the batch has a target (the vocabulary projection is most
    of a small model's cost), and the log-softmax runs in float32.

    Args:
        model: A causal or vision-language LM, possibly wrapped (PEFT, DDP).
        batch: From :class:`Batcher`, on the model's device.

    Returns:
        Summed loss per example (B,) float32 in nats, and target tokens per example (B,) int64.
    """
    labels = batch["labels"][:, 1:]
    positions = (labels != IGNORE).any(dim=0).nonzero().squeeze(1)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if accepts(model, "logits_to_keep"):
        logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, positions]
    kept = labels[:, positions]
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), kept.flatten(), ignore_index=IGNORE, reduction="none"
    ).view_as(kept)
    return losses.sum(dim=1), (kept != IGNORE).sum(dim=1)


def accepts(model: torch.nn.Module, argument: str) -> bool:
    """Whether the model class's own ``forward`` has this argument (wrappers such as PEFT's and DDP's hide it)."""
    while isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    # Trainers wrap `forward` on the instance; the class's own signature is the one that counts.
    return argument in inspect.signature(type(model).forward).parameters


def length_sorted_batches(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Indices grouped so that rows of similar length share a batch of at most ``max_tokens`` padded tokens.

    Longest first, so that a batch that does not fit in memory fails at once. A row longer than ``max_tokens`` gets its
    own batch. Ties keep their order, so the result is deterministic.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        stop = start + max(1, max_tokens // longest)
        batches.append(order[start:stop])
        start = stop
    return batches


def to_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on ``device``."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


class Rows(Protocol):
    """Rows by number: a list, or a dataset on disk."""

    def __getitem__(self, index: int, /) -> EncodedRow:
        """Row ``index``."""


def iterate_batches(
    rows: Rows, indices: Iterable[np.ndarray], batcher: Batcher, device: torch.device
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """Yield (indices, batch on device) for index groups such as :func:`length_sorted_batches` makes."""
    for group in indices:
        yield group, to_device(batcher([rows[int(i)] for i in group]), device)
