"""FINCH: the learning rate of a step follows the loss, lower while it is high and rising as the model learns.

Source: Prashant et al., Fine-Tuning Without Forgetting via Loss-Adaptive Learning Rates, arXiv 2605.20005: a step's
forgetting is bounded by the learning rate times the square root of the loss; so η = η_base / √L̄ up to η_max, with L̄ the
moving average of the steps' losses. docs/study.md says what was known of the paper's schedule and what was chosen here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["Finch"]

SMOOTHING = 0.9
"""α: the share of the moving average that a step keeps."""
_LEAST = 1e-12


class Finch(LRScheduler):
    """Learning rates that :meth:`observe` sets from the loss of the step about to be taken.

    Args:
        optimizer: Whose rates are set.
        rate: η_base: the rate at a loss of 1 nat per target token.
        highest: η_max.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rate: float, highest: float) -> None:
        self.smoothed: float | None = None
        self.rate = rate
        self.highest = highest
        super().__init__(optimizer)

    def observe(self, loss: float) -> None:
        """Take the step's mean loss (nats per target token) into the average and set the rate; the first begins it."""
        self.smoothed = loss if self.smoothed is None else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        self._last_lr: list[Any] = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[Any]:
        """The same rate for every group of parameters; η_base before any loss was seen."""
        rate = self.rate if self.smoothed is None else self.rate / math.sqrt(max(self.smoothed, _LEAST))
        return [min(rate, self.highest)] * len(self.optimizer.param_groups)
