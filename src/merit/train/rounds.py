"""One round of a branch's training: which of its steps, from which weights, with what from the round before. No model.

Training in R rounds takes the steps of one in R parts. Step numbers, row order and learning rates are those of the whole
budget, so the rounds of a branch see exactly the batches that it would see in one go. After a new split a branch has
another group; then it is each *dataset* whose visits are cut into R parts, whichever branches it belongs to.

Source: rounds of local training are those of DiLoCo, Douillard et al., arXiv 2311.08105 (Algorithm 1); the paper has one.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from merit.errors import TrainingError
from merit.train.batches import epoch_order, steps_for, visits_for


class Span(NamedTuple):
    """Optimizer steps: from ``first`` up to ``last`` of the ``total`` that the learning rates run over."""

    first: int
    last: int
    total: int


@dataclass(frozen=True)
class Round:
    """One of the rounds in which a branch trains; the default is the only one.

    Attributes:
        number: From 1.
        of: R.
        start: Checkpoint folder that it starts from; None: the base.
        content: That checkpoint's fingerprint.
        carried: Checkpoint with which an earlier round of this branch ended (:func:`merit.train.checkpoint.carry`), if any.
        keeps_optimizer: Whether the optimizer's state is carried, too.
        resplit: Whether groups change between rounds: the group's rows are then cut, not its steps.
    """

    number: int = 1
    of: int = 1
    start: Path | None = None
    content: str = ""
    carried: Path | None = None
    keeps_optimizer: bool = True
    resplit: bool = False

    @property
    def is_last(self) -> bool:
        """Whether the run's own branches come from it."""
        return self.number == self.of

    def provenance(self) -> dict[str, object]:
        """What a checkpoint inside the round depends on besides settings and data; nothing where there is one round."""
        if self.of == 1:
            return {}
        return {"round": {"number": self.number, "start": self.content, "goes on": self.carried is not None}}

    def span(self, rows: int, batch_size: int, epochs: float) -> Span:
        """This round's steps.

        Args:
            rows: Rows of the group; with ``resplit`` this round's alone.
            batch_size: Rows per step.
            epochs: Passes over the group's rows in all rounds.

        Raises:
            TrainingError: The branch has fewer steps than there are rounds.
        """
        if self.resplit:
            mine = steps_for(rows, batch_size, 1)
            return Span(mine * (self.number - 1), mine * self.number, mine * self.of)
        total = steps_for(rows, batch_size, epochs)
        if total < self.of:
            raise TrainingError(
                f"train.rounds: {self.of} rounds, but this branch has only {total} steps ({rows} rows, train.batch_size "
                f"{batch_size}, train.epochs {epochs:g}).",
                "Use fewer rounds or a smaller batch.",
            )
        return Span(total * (self.number - 1) // self.of, total * self.number // self.of, total)

    def visits(self, name: str, rows: int, epochs: float, seed: int) -> np.ndarray:
        """Rows of a dataset that are this round's after a new split, (visits,) int64, in the order of their turn.

        Over all rounds a dataset is visited ceil(epochs * rows) times: every row once in each pass, in an order that depends
        on (seed, pass, name) alone. Which branches it belongs to changes nothing.
        """
        own = zlib.crc32(name.encode()) ^ seed
        count = visits_for(rows, epochs)
        passes = [epoch_order(rows, own, number) for number in range(-(-count // rows))] if rows else []
        order = np.concatenate([np.zeros(0, np.int64), *passes])[:count]
        return order[count * (self.number - 1) // self.of : count * self.number // self.of]
