"""From a group's rows to optimizer steps: which rows, in which order, cut into which micro-batches. No model.

The order is a pure function of (seed, epoch), so a resumed run sees the batches of one that was never stopped. One step is
always ``batch_size`` rows of the group; how they are shared out among processes and cut into micro-batches changes padding
and memory, not the gradient, since the loss is a mean over the target tokens of the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from merit.hf.batches import Batcher
from merit.hf.rows import EncodedRow
from merit.mixture import EncodedDataset

CPU_OVERHEAD = 32
"""What one more micro-batch costs on a CPU, in tokens: for a small model a few milliseconds, measured."""


class GroupRows:
    """The rows of a group: its datasets one after another, in name order, so that recipe order does not matter.

    Args:
        datasets: By name.
        visits: Numbers of the rows that are meant, by dataset. Default: all.

    Attributes:
        names: The datasets, sorted.
        lengths: (rows,) int64 tokens per row.
        targets: (rows,) int64 target tokens per row.
        dataset: (rows,) int64 index of each row's dataset in ``names``.
    """

    def __init__(self, datasets: Mapping[str, EncodedDataset], visits: Mapping[str, np.ndarray] | None = None) -> None:
        self.names = sorted(datasets)
        self._datasets = [datasets[name] for name in self.names]
        self._visits = [
            np.arange(len(datasets[name])) if visits is None else np.sort(visits[name]) for name in self.names
        ]
        sizes = [len(numbers) for numbers in self._visits]
        parts = list(zip(self._datasets, self._visits, strict=True))
        empty = np.zeros(0, np.int64)
        self.lengths = np.concatenate([empty, *(dataset.lengths[numbers] for dataset, numbers in parts)])
        self.targets = np.concatenate([empty, *(dataset.target_counts[numbers] for dataset, numbers in parts)])
        self.dataset = np.repeat(np.arange(len(sizes)), sizes)
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> EncodedRow:
        which = self.dataset[index]
        row: EncodedRow = self._datasets[which][int(self._visits[which][index - int(self._starts[which])])]
        return row


class StepOrder(Sampler[list[int]]):
    """Row numbers of every optimizer step from ``start`` on: each epoch is a permutation of all rows, cut into batches.

    Args:
        rows: Rows of the group.
        batch_size: Rows per step; an epoch's last step may have fewer.
        seed: With the epoch it decides the permutation.
        steps: Steps in all.
        start: Steps that were taken before.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, steps: int, start: int = 0) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self.start = start

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        epoch = lru_cache(maxsize=1)(lambda number: epoch_order(self.rows, self.seed, number))
        for step in range(self.start, self.steps):
            number, at = divmod(step, math.ceil(self.rows / self.batch_size))
            yield epoch(number)[at * self.batch_size : (at + 1) * self.batch_size].tolist()


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Every row once, (rows,) int64, in an order that depends on (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def steps_for(rows: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of a branch: ceil(epochs * ceil(rows / batch_size)); an epoch's last batch may be smaller."""
    return math.ceil(epochs * math.ceil(rows / batch_size))


def visits_for(rows: int, epochs: float) -> int:
    """How often rows of a dataset are visited in all: ceil(epochs * rows)."""
    return math.ceil(epochs * rows)


class StepBatch(NamedTuple):
    """One optimizer step as one process sees it.

    Attributes:
        micro: Its micro-batches, from :class:`merit.hf.batches.Batcher`.
        datasets: Dataset index of each row, micro-batch by micro-batch: (rows of this process,) int64.
        counts: Target tokens, tokens and samples of the whole step, over all processes: (3,) int64.
        targets: Target tokens of the whole step by dataset index.
    """

    micro: list[dict[str, torch.Tensor]]
    datasets: torch.Tensor
    counts: torch.Tensor
    targets: dict[int, int]


class StepCollator:
    """Makes one process's share of an optimizer step: micro-batches, longest rows first, and the step's totals.

    Rows are dealt out to processes by length, so that all have equal work and the same number of micro-batches; a process
    that is a row short gets one without targets.

    Args:
        rows: The group's rows.
        micro_batch_size: Rows per micro-batch at most.
        batcher: Makes the batches.
        overhead: Tokens that one more micro-batch is worth (:func:`cut_by_length`); None makes as few as can be.
        share: This process's number, and how many there are.
    """

    def __init__(
        self,
        rows: GroupRows,
        micro_batch_size: int,
        batcher: Batcher,
        overhead: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.rows = rows
        self.micro_batch_size = micro_batch_size
        self.batcher = batcher
        self.overhead = overhead
        self.share = share

    def __call__(self, numbers: Sequence[int]) -> StepBatch:
        """The step that these rows of the group make."""
        rows, (rank, processes) = self.rows, self.share
        ordered = sorted(numbers, key=lambda number: -rows.lengths[number])
        lengths = [int(rows.lengths[number]) for number in ordered[::processes]]  # of process 0, whose rows are longest
        overhead = lengths[0] * len(lengths) if self.overhead is None else self.overhead
        mine = ordered[rank::processes]
        chosen = [rows[number] for number in mine]
        if len(mine) < len(lengths):
            mine, chosen = [*mine, ordered[-1]], [*chosen, _without_targets(rows[ordered[-1]])]
        micro = []
        stop = 0
        for size in cut_by_length(lengths, self.micro_batch_size, overhead):
            stop += size
            micro.append(self.batcher(chosen[stop - size : stop]))
        counts = [int(rows.targets[numbers].sum()), int(rows.lengths[numbers].sum()), len(numbers)]
        targets: dict[int, int] = {}
        for number in ordered:
            which = int(rows.dataset[number])
            targets[which] = targets.get(which, 0) + int(rows.targets[number])
        return StepBatch(micro, torch.from_numpy(rows.dataset[mine]), torch.tensor(counts), targets)


def _without_targets(row: EncodedRow) -> EncodedRow:
    return EncodedRow(row.input_ids, np.zeros(len(row.input_ids), dtype=bool), images=row.images)


def cut_by_length(lengths: Sequence[int], most: int, overhead: int) -> list[int]:
    """Where to cut rows, sorted by length (longest first), into micro-batches of least cost.

    The cost of a micro-batch is its padded tokens plus ``overhead``. The optimum is found by dynamic programming over the
    cut points: O(rows * most).

    Args:
        lengths: Tokens per row, descending.
        most: Rows per micro-batch at most.
        overhead: What a forward and backward pass costs besides its tokens, in tokens.

    Returns:
        Row counts of the micro-batches, in order; they add up to ``len(lengths)``.
    """
    cost = [0.0] + [math.inf] * len(lengths)
    begin = [0] * (len(lengths) + 1)
    for stop in range(1, len(lengths) + 1):
        for start in range(max(0, stop - most), stop):
            candidate = cost[start] + lengths[start] * (stop - start) + overhead
            if candidate < cost[stop]:
                cost[stop], begin[stop] = candidate, start
    sizes: list[int] = []
    stop = len(lengths)
    while stop:
        sizes.append(stop - begin[stop])
        stop = begin[stop]
    return sizes[::-1]
