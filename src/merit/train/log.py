"""The figures of every step: kept on the device, brought over about twice a second, checked, counted and written down."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from merit.errors import TrainingError
from merit.files import appending
from merit.launch.job import ProgressFile
from merit.progress import Progress
from merit.train.batches import StepBatch
from merit.train.checkpoint import Totals, newest, step_of
from merit.train.processes import Team
from merit.train.trackers import plain_name

_FLUSH_SECONDS = 0.5
_FP16_SKIPS = 25
"""Steps in a row that float16's loss scaler may skip before it counts as divergence (65536 = 2^16 halves to under 1)."""


class _Step(NamedTuple):
    number: int
    rate: float
    skipped: bool
    figures: torch.Tensor  # loss (this process's part), gradient norm, then the summed loss of each row
    batch: StepBatch


class StepLog:
    """One JSON line per optimizer step, and the running totals.

    Args:
        folder: The branch's folder; ``log.jsonl`` and ``progress.json`` lie there, ``checkpoints`` is named in errors.
        names: The group's datasets, by index.
        steps: Optimizer steps in all.
        totals: Counts to go on from; kept up to date.
        team: The processes whose figures are added up.
        memory: Gives the peak memory so far (bytes).
        progress: Told of every flush.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        steps: int,
        totals: Totals,
        team: Team,
        memory: Callable[[], int],
        progress: Progress,
    ) -> None:
        self.path = folder / "log.jsonl"
        self.totals = totals
        self._checkpoints = folder / "checkpoints"
        self._names = names
        self._steps = steps
        self._team = team
        self._memory = memory
        self._show = progress
        self._note = ProgressFile(folder / "progress.json")
        self._pending: list[_Step] = []
        self._skipped_in_a_row = 0
        self._flushed = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to flush."""
        return time.monotonic() - self._flushed >= _FLUSH_SECONDS

    def note(self, number: int, rate: float, figures: torch.Tensor, batch: StepBatch) -> None:
        """Keep the figures of the step just taken, still on the device."""
        skipped = self._team.accelerator.optimizer_step_was_skipped
        light = batch._replace(micro=[])
        self._pending.append(_Step(number, rate, skipped, figures, light))

    def flush(self) -> None:
        """Bring the pending figures over, check them, count them and write them to the log.

        Raises:
            TrainingError: A loss or gradient norm is not finite.
        """
        now = time.monotonic()
        elapsed, self._flushed = now - self._flushed, now
        self.totals.seconds += elapsed
        self.totals.peak_memory_bytes = max(self.totals.peak_memory_bytes, self._memory())
        if not self._pending:
            return
        lines, trained = [], 0
        for step, (loss, norm, by_dataset) in zip(self._pending, self._figures(), strict=True):
            self._check_finite(step, loss, norm)
            targets, tokens, samples = step.batch.counts.tolist()
            self.totals.target_tokens += targets
            self.totals.tokens += tokens
            self.totals.samples += samples
            self.totals.steps += 1
            trained += targets
            line = {
                "step": step.number,
                "loss": loss,
                "learning_rate": step.rate,
                "grad_norm": norm if math.isfinite(norm) else None,  # float16: the scaler skipped this step
                "target_tokens": targets,
                "datasets": by_dataset,
            }
            lines.append(json.dumps(line) + "\n")
            self._track(line, by_dataset)
        self._pending.clear()
        if self._team.leads:
            with appending(self.path) as log:
                log.write("".join(lines).encode())
            speed = trained / elapsed if elapsed > 0 else 0.0
            facts = line | {"tokens_per_second": round(speed, 1)}
            self._note(step.number, self._steps, facts)
            self._show(step.number, self._steps, f"loss {loss:.4g}, {speed:,.0f} target tokens/s")

    def _figures(self) -> list[tuple[float, float, dict[str, tuple[float, int]]]]:
        """Loss, gradient norm and {dataset: (summed loss, target tokens)} of every pending step, over all processes."""
        flat = torch.cat([step.figures for step in self._pending]).tolist()
        sums = torch.zeros((len(self._pending), 1 + len(self._names)), dtype=torch.float64)
        norms, at = [], 0
        for row, step in zip(sums, self._pending, strict=True):
            count = len(step.batch.datasets)
            row[0] = flat[at]
            norms.append(flat[at + 1])
            row[1:].index_add_(0, step.batch.datasets, torch.tensor(flat[at + 2 : at + 2 + count], dtype=row.dtype))
            at += 2 + count
        return [
            (row[0], norm, {self._names[which]: (row[1 + which], n) for which, n in sorted(step.batch.targets.items())})
            for row, norm, step in zip(self._team.total(sums).tolist(), norms, self._pending, strict=True)
        ]

    def _track(self, line: dict[str, object], by_dataset: dict[str, tuple[float, int]]) -> None:
        if self._team.accelerator.trackers:
            means = {
                plain_name(f"dataset_loss/{name}"): loss / targets
                for name, (loss, targets) in by_dataset.items()
                if targets
            }
            plain = {key: value for key, value in line.items() if key not in ("step", "datasets") and value is not None}
            self._team.accelerator.log(plain | means, step=line["step"])

    def _check_finite(self, step: _Step, loss: float, norm: float) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if step.skipped else 0
        if math.isfinite(loss) and (math.isfinite(norm) or 0 < self._skipped_in_a_row < _FP16_SKIPS):
            return
        name, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", norm)
        kept = newest(self._checkpoints)
        raise TrainingError(
            f"{self.path.parent}: the {name} is {value} at step {step.number} of {self._steps} "
            f"(learning rate {step.rate:g}).",
            "Ways out: a lower train.learning_rate, a longer train.warmup_ratio, a smaller train.max_grad_norm; with "
            "model.dtype float16, use bfloat16 or float32.",
            f"No model was written. The checkpoint of step {step_of(kept)} is kept."
            if kept
            else "No model and no checkpoint was written.",
        )


def final_loss(log: Path, steps: int) -> float:
    """Mean loss per target token (nats) over the last tenth of the steps."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()][-math.ceil(steps / 10) :]
    targets = sum(row["target_tokens"] for row in rows)
    return float(sum(row["loss"] * row["target_tokens"] for row in rows) / max(targets, 1))
