"""The training loop of one group: TRL's SFTTrainer with our batches, our loss, our log and exact checkpoints.

Only what differs from TRL is here. It does not choose settings, folders or which checkpoint to go on from
(:mod:`merit.train.branch`), and knows no recipe and no other group. One process and one device.

What differs, and why:

- *Order* is a pure function of (seed, epoch), so a resumed run sees the same batches as one that was never stopped.
- *One optimizer step is one batch* of the loader, cut into micro-batches of rows of like length on the CPU. The loss is
  the mean over the target tokens of the whole step, so the cut changes padding and memory, not the gradient.
- *Loss* is :func:`merit.hf.batches.target_losses`, the same as in gradients and evaluation: logits at target positions only.
- *Warm-up* starts above 0 (:meth:`GroupTrainer.create_scheduler`).
- *Counts, losses and norms* stay on the device and come over together about twice a second, in
  :meth:`GroupTrainer.flush`, which is also where a non-finite value is found, and always before anything is saved.
- *Checkpoints* hold the trainable parameters by name, optimizer, schedule, scaler and random state; ``complete.json`` is
  written last, with every file's size, so that a checkpoint that was cut short is never taken for a whole one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import TrainerCallback, get_scheduler
from transformers.trainer_callback import PrinterCallback
from trl import SFTTrainer

from merit.errors import TrainingError
from merit.files import write_json
from merit.hf.batches import Batcher, target_losses
from merit.hf.models import trainable_parameters

if TYPE_CHECKING:
    from merit.hf.rows import EncodedRow
    from merit.mixture import EncodedDataset

MARKER = "complete.json"
LOG = "log.jsonl"
_WEIGHTS = "trainable.safetensors"
_FLUSH_SECONDS = 0.5
CPU_OVERHEAD = 32
"""What one more micro-batch costs on a CPU, in tokens: for a small model a few milliseconds, measured."""
_FP16_SKIPS = 25
"""Steps in a row that float16's loss scaler may skip before it counts as divergence (65536 = 2^16 halves to under 1)."""


class GroupRows:
    """The rows of a group: its datasets one after another, in name order, so that recipe order does not matter."""

    def __init__(self, datasets: Mapping[str, EncodedDataset]) -> None:
        self.names = sorted(datasets)
        self._datasets = [datasets[name] for name in self.names]
        self._ends = np.cumsum([len(dataset) for dataset in self._datasets], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> EncodedRow:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self._datasets[which][index - (int(self._ends[which - 1]) if which else 0)]


class EpochOrder(Sampler[int]):
    """Every row once per epoch, in an order that depends on (seed, epoch) alone."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng((self.seed, self.epoch)).permutation(self.rows).tolist())

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.epoch = epoch


def cut_by_length(lengths: Sequence[int], most: int, overhead: int) -> list[int]:
    """Where to cut rows, sorted by length (longest first), into micro-batches of least cost.

    The cost of a micro-batch is its padded tokens plus ``overhead``. The optimum is found by dynamic programming over the
    cut points: O(rows * most).

    Args:
        lengths: Tokens per row, descending.
        most: Rows per micro-batch at most.
        overhead: What a forward and backward pass costs beside its tokens, in tokens.

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


class StepCollator:
    """Makes one optimizer step of row numbers: micro-batches, longest rows first, and what they hold.

    Args:
        rows: The group's rows.
        micro_batch_size: Rows per micro-batch at most.
        batcher: Makes the batches.
        overhead: Tokens that one more micro-batch is worth (:func:`cut_by_length`); None makes as few as can be.
    """

    def __init__(
        self,
        rows: Sequence[EncodedRow] | GroupRows,
        micro_batch_size: int,
        batcher: Batcher,
        overhead: int | None = None,
    ) -> None:
        self.rows = rows
        self.micro_batch_size = micro_batch_size
        self.batcher = batcher
        self.overhead = overhead

    def __call__(self, items: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """``{"micro": [batch, ...], "counts": (3,) int64 target tokens, tokens, samples}`` of ``{"row": number}`` items."""
        rows = [self.rows[item["row"]] for item in items]
        rows.sort(key=lambda row: -len(row.input_ids))
        lengths = [len(row.input_ids) for row in rows]
        overhead = lengths[0] * len(lengths) if self.overhead is None else self.overhead
        micro = []
        stop = 0
        for size in cut_by_length(lengths, self.micro_batch_size, overhead):
            stop += size
            micro.append(self.batcher(rows[stop - size : stop]))
        targets = sum(int(row.targets[1:].sum()) for row in rows)
        return {"micro": micro, "counts": torch.tensor([targets, sum(lengths), len(rows)], dtype=torch.int64)}


@dataclass
class Totals:
    """What has been trained on so far, over all resumed parts; lives in every checkpoint's marker."""

    target_tokens: int = 0
    tokens: int = 0
    samples: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0


class StopRequest:
    """SIGTERM and SIGINT ask training to stop after the step at hand; a second signal has its usual effect."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)


class GroupTrainer(SFTTrainer):
    """SFTTrainer over :class:`StepCollator` batches.

    Args:
        order: Row order of each epoch.
        log_path: One JSON line per optimizer step; every checkpoint keeps a copy.
        totals: Counts to go on from.
        provenance: Kept in every checkpoint's marker.
        stop: When asked, a checkpoint is written after the step at hand and training ends.
        checkpoint_seconds: Seconds between checkpoints.
        memory: Returns the peak memory so far (bytes).
        progress: Called with (step, steps, facts) after every flush.
        kwargs: As for SFTTrainer.

    Raises:
        TrainingError: From ``train``: a loss or gradient norm is not finite.
    """

    loss_is_scaled_for_ga: bool | None = True  # type: ignore[assignment]
    model: Any

    def __init__(
        self,
        *,
        order: EpochOrder,
        log_path: Path,
        totals: Totals,
        provenance: Mapping[str, Any],
        stop: StopRequest,
        checkpoint_seconds: float,
        memory: Callable[[], int],
        progress: Callable[[int, int, dict[str, Any]], None] | None,
        **kwargs: Any,
    ) -> None:
        self._order = order
        self._log_path = log_path
        self.totals = totals
        self._provenance = dict(provenance)
        self._memory = memory
        self._progress = progress
        self._pending: list[tuple[int, float, bool, torch.Tensor, torch.Tensor]] = []
        self._skipped_in_a_row = 0
        self._flushed = time.monotonic()
        super().__init__(**kwargs)
        self._checkpoints = Path(str(self.args.output_dir))
        self.remove_callback(PrinterCallback)
        self.add_callback(_Hooks(self, stop, checkpoint_seconds))

    # -- batches and loss -----------------------------------------------------------------------------------------

    def _send_telemetry(self) -> None:
        pass

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        return self._order

    def start_epoch(self, epoch: int) -> None:
        """The next pass of the loader is this epoch's."""
        self._order.set_epoch(epoch)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        self._counts = batch_samples[0]["counts"].to(device)
        return self._counts[0]

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it walks over every parameter at every step."""
        return 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over the step's micro-batches; returns the step's mean loss per target token."""
        losses = [
            super(GroupTrainer, self).training_step(model, micro, num_items_in_batch) for micro in inputs["micro"]
        ]
        self._loss = torch.stack(losses).sum()
        return self._loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Summed loss of the micro-batch over the target tokens of the whole step."""
        losses, _ = target_losses(model, inputs)
        loss = losses.sum() / num_items_in_batch.clamp(min=1)
        if not loss.requires_grad:  # rows without an image, where the projector alone is trained
            loss = loss + sum(parameter.sum() * 0 for parameter in trainable_parameters(self.model).values())
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        self._norm = super()._clip_grad_norm(model)
        return self._norm

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The library's schedule with a warm-up of 1/(W+1) ... W/(W+1) in place of 0 ... (W-1)/W.

        The library's first step has learning rate 0: it would train nothing, and a group of one step nothing at all.
        From step W on the two are equal.
        """
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # stepping the schedule before the optimizer is meant here
                self.lr_scheduler = get_scheduler(
                    self.args.lr_scheduler_type,
                    optimizer=optimizer or self.optimizer,  # type: ignore[arg-type]
                    num_warmup_steps=warmup + 1,
                    num_training_steps=num_training_steps + 1,
                    scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,  # type: ignore[arg-type]
                )
                self.lr_scheduler.step()
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- log and checks -------------------------------------------------------------------------------------------

    def note_step(self, learning_rate: float) -> None:
        """Keep the figures of the step just taken, still on the device."""
        values = torch.stack([self._loss.float(), torch.as_tensor(self._norm, device=self._loss.device).float()])
        skipped = bool(self.accelerator.optimizer_step_was_skipped)
        self._pending.append((self.state.global_step, learning_rate, skipped, values, self._counts))
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring the pending figures over, check them, and write them to the log.

        Raises:
            TrainingError: A loss or gradient norm is not finite.
        """
        now = time.monotonic()
        elapsed, self._flushed = now - self._flushed, now
        self.totals.seconds += elapsed
        self.totals.peak_memory_bytes = max(self.totals.peak_memory_bytes, self._memory())
        if not self._pending:
            return
        values = torch.stack([item[3] for item in self._pending]).tolist()
        counts = torch.stack([item[4] for item in self._pending]).tolist()
        lines, facts = [], {}
        for (step, rate, skipped, _, _), (loss, norm), (targets, tokens, samples) in zip(
            self._pending, values, counts, strict=True
        ):
            self._check_finite(step, rate, loss, norm, skipped)
            self.totals.target_tokens += targets
            self.totals.tokens += tokens
            self.totals.samples += samples
            facts = {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm, "target_tokens": targets}
            if not math.isfinite(norm):
                facts["grad_norm"] = None  # float16: the scaler skipped this step
            lines.append(json.dumps(facts) + "\n")
        with self._log_path.open("a", encoding="utf-8") as log:
            log.writelines(lines)
        trained = sum(item[0] for item in counts)
        self._pending.clear()
        if self._progress is not None:
            facts["tokens_per_second"] = round(trained / elapsed, 1) if elapsed > 0 else None
            self._progress(self.state.global_step, self.state.max_steps, facts)

    def _check_finite(self, step: int, rate: float, loss: float, norm: float, skipped: bool) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if math.isfinite(loss) and (math.isfinite(norm) or 0 < self._skipped_in_a_row < _FP16_SKIPS):
            return
        what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", norm)
        kept = newest_checkpoint(self._checkpoints)
        raise TrainingError(
            f"{self._log_path.parent}: the {what} is {value} at step {step} of {self.state.max_steps} "
            f"(learning rate {rate:g}).",
            "Ways out: a lower train.learning_rate, a longer train.warmup_ratio, a smaller train.max_grad_norm; with "
            "model.dtype float16, use bfloat16 or float32.",
            f"No model was written. The checkpoint of step {step_of(kept)}, from before, is kept."
            if kept
            else "No model and no checkpoint was written.",
        )

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.flush()
        folder = self._checkpoints / f"checkpoint-{self.state.global_step}"
        shutil.rmtree(folder, ignore_errors=True)
        super(SFTTrainer, self)._save_checkpoint(model, trial)
        shutil.copyfile(self._log_path, folder / LOG)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        for path in files:
            _sync(path)
        marker = {
            "step": self.state.global_step,
            "steps": self.state.max_steps,
            "totals": vars(self.totals),
            "provenance": self._provenance,
            "files": {path.name: path.stat().st_size for path in files},
        }
        write_json(folder / MARKER, marker)
        _sync(folder)
        for other in folder.parent.glob("checkpoint-*"):
            if other != folder:
                shutil.rmtree(other)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trainable parameters (and persistent buffers) by name: what a checkpoint has to hold."""
        folder = Path(output_dir or self._checkpoints)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self._state().items()}, folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        stored = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        state = self._state()
        if stored.keys() != state.keys():
            odd = sorted(stored.keys() ^ state.keys())
            raise TrainingError(
                f"{resume_from_checkpoint} holds other parameters than this model trains, first {odd[0]}.",
                "Remove the branch's checkpoints folder to start it over.",
            )
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(stored[name])

    def _state(self) -> dict[str, torch.Tensor]:
        named = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        buffers = {name: tensor for name, tensor in self.model.state_dict().items() if name not in named}
        return {name: tensor.detach() for name, tensor in {**trainable_parameters(self.model), **buffers}.items()}


class _Hooks(TrainerCallback):
    """Epoch order, step figures, timed checkpoints and the graceful stop."""

    def __init__(self, trainer: GroupTrainer, stop: StopRequest, checkpoint_seconds: float) -> None:
        self.trainer = trainer
        self.stop = stop
        self.checkpoint_seconds = checkpoint_seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = self.trainer._flushed = time.monotonic()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.start_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rate = float(self.trainer._get_learning_rate())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.note_step(self.rate)
        if state.global_step >= state.max_steps:
            return
        if self.stop.asked:
            control.should_training_stop = True
        if self.stop.asked or time.monotonic() - self.saved >= self.checkpoint_seconds:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.flush()


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint folder holds, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``: its marker stands and every file has the size written there."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        try:
            files = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
            if all((checkpoint / name).stat().st_size == size for name, size in files.items()):
                return checkpoint
        except (OSError, ValueError, KeyError):
            continue
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
