"""A fixed set of rows, batched once and kept, on which many points in weight space are measured.

Batches are sorted by length, so that little is padded, and stay on the model's device as long as they fit a budget of
memory; the loss is that of training (:func:`merit.hf.batches.target_losses`). Model-facing; it chooses no rows but by
:func:`choose_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from merit.evaluation.forward import Forward, logits_tokens
from merit.hf.batches import iterate_batches, length_sorted_batches, target_losses
from merit.hf.rows import EncodedRow
from merit.mixture.calibration import draw
from merit.mixture.dataset import EncodedDataset

__all__ = ["FixedBatches", "FixedLosses", "choose_rows"]

CACHE = 2**30
"""Bytes of batches that are kept; what exceeds it is made anew at every pass."""


@dataclass(frozen=True)
class FixedLosses:
    """Losses at one point.

    Attributes:
        sums: (N,) float64, summed target-token loss of every row in nats, in the order given.
        counts: (N,) int64, its target tokens.
        owners: (N,) int64, number of its dataset.
        names: Datasets, in order.
    """

    sums: np.ndarray
    counts: np.ndarray
    owners: np.ndarray
    names: tuple[str, ...]

    @property
    def rows(self) -> np.ndarray:
        """Nats per target token of every row (N,) float64; NaN for a row without targets."""
        means = np.full(len(self.sums), np.nan)
        np.divide(self.sums, self.counts, out=means, where=self.counts > 0)
        return means

    @property
    def datasets(self) -> dict[str, float]:
        """Nats per target token of every dataset."""
        sums = np.bincount(self.owners, weights=self.sums, minlength=len(self.names))
        counts = np.bincount(self.owners, weights=self.counts, minlength=len(self.names))
        return {name: float(s / c) if c else float("nan") for name, s, c in zip(self.names, sums, counts, strict=True)}

    @property
    def mean(self) -> float:
        """Nats per target token over all rows: weighs tokens."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def macro(self) -> float:
        """Unweighted mean over datasets of their nats per target token: weighs datasets."""
        return float(np.mean(list(self.datasets.values())))


class FixedBatches:
    """Rows of several datasets, batched once.

    Args:
        datasets: Rows by dataset; every dataset has a target token.
        forward: How rows go through the model.
        model: Its vocabulary limits the size of a batch.
        cache: Bytes of batches to keep.

    Raises:
        ValueError: There are no rows.
    """

    def __init__(
        self,
        datasets: Mapping[str, Sequence[EncodedRow]],
        forward: Forward,
        model: PreTrainedModel,
        *,
        cache: int = CACHE,
    ) -> None:
        self.rows = [row for rows in datasets.values() for row in rows]
        if not self.rows:
            raise ValueError("a batch set needs at least one row")
        self.names = tuple(datasets)
        self.owners = np.repeat(np.arange(len(datasets)), [len(rows) for rows in datasets.values()])
        self.target_tokens = int(sum(int(row.targets.sum()) for row in self.rows))
        self._forward = forward
        self.groups = length_sorted_batches(
            [len(row.input_ids) for row in self.rows], min(forward.batch_tokens, logits_tokens(model))
        )
        self._kept: list[dict[str, torch.Tensor]] = []
        size = 0
        for _, batch in iterate_batches(self.rows, self.groups, forward.batcher, forward.device):
            size += sum(tensor.nbytes for tensor in batch.values())
            if size > cache:
                break
            self._kept.append(batch)

    def losses(self, model: PreTrainedModel) -> FixedLosses:
        """Losses of a model in eval mode, as it stands."""
        sums, counts = np.zeros(len(self.rows)), np.zeros(len(self.rows), dtype=np.int64)
        with torch.inference_mode():
            for group, loss, count in self.terms(model):
                sums[group], counts[group] = loss.double().cpu().numpy(), count.cpu().numpy()
                self._forward.on_batch(len(group))
        return FixedLosses(sums, counts, self.owners, self.names)

    def terms(self, model: PreTrainedModel) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """(row numbers, their summed losses, their target tokens) of every batch, for a model that may be differentiated."""
        for group, batch in self.batches():
            yield group, *target_losses(model, batch)

    def batches(self) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """(row numbers, batch on the device), the kept ones first."""
        yield from zip(self.groups, self._kept, strict=False)
        rest = self.groups[len(self._kept) :]
        yield from iterate_batches(self.rows, rest, self._forward.batcher, self._forward.device)


def choose_rows(
    datasets: Mapping[str, EncodedDataset], per_dataset: int, seed: int, purpose: str
) -> dict[str, list[EncodedRow]]:
    """Up to ``per_dataset`` rows of every dataset that have a target, by a seeded draw of their own for each purpose.

    Datasets without such a row are left out.
    """
    chosen: dict[str, list[EncodedRow]] = {}
    for name, dataset in datasets.items():
        order = draw(len(dataset), len(dataset), seed, name, purpose=purpose)
        usable = [int(i) for i in order if dataset.target_counts[int(i)] > 0][:per_dataset]
        if usable:
            chosen[name] = [dataset[i] for i in sorted(usable)]
    return chosen
