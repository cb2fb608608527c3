"""Fine-tune one group from the base: settings in, a Hugging Face checkpoint out, exactly resumable.

It knows one group and no other, so a branch can train on any machine that has the recipe, the split and the base. It does
not encode data, place branches on machines (:mod:`merit.launch`) or merge. One process, one device.

The objective is the mean cross-entropy over the target tokens of each optimizer step; AdamW and schedule are the
library's. Source: METHOD step 5 is Choi & Kim, arXiv 2606.01717, §4 (Algorithm 1): branch k starts from θ0 and sees the
datasets of G_k alone, with the same hyperparameters in every branch and no communication.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit.errors import Interrupted, RecipeError, ResourceError, RunFolderError, TrainingError, nearest
from merit.files import differences

if TYPE_CHECKING:
    import torch

    from merit.hf.base import Base
    from merit.mixture import EncodedDataset
    from merit.recipe.schema import Recipe
    from merit.train.trainer import Totals

# fmt: off
PASSED_ON = frozenset({
    "activation_checkpointing_kwargs", "activation_offloading", "adam_beta1", "adam_beta2", "adam_epsilon",
    "dataloader_multiprocessing_context", "dataloader_num_workers", "dataloader_persistent_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "full_determinism", "logging_first_step", "logging_steps",
    "logging_strategy", "lr_scheduler_kwargs", "neftune_noise_alpha", "optim_args", "optim_target_modules", "project",
    "report_to", "run_name", "save_steps", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "torch_empty_cache_steps", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
})
# fmt: on
"""Keys of ``train.trainer`` that go to TRL's SFTConfig as they are."""

RECIPE_KEYS = {
    "output_dir": "--output",
    "seed": "seed",
    "data_seed": "seed",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.epochs",
    "learning_rate": "train.learning_rate",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size with train.micro_batch_size",
    "auto_find_batch_size": "train.micro_batch_size",
    "max_length": "train.max_length",
    "lr_scheduler_type": "train.scheduler",
    "warmup_steps": "train.warmup_ratio",
    "warmup_ratio": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
    "optim": "train.optimizer",
    "max_grad_norm": "train.max_grad_norm",
    "activation_checkpointing": "train.gradient_checkpointing",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "train.trainer.activation_checkpointing_kwargs",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "use_cpu": "train.device",
    "save_strategy": "train.checkpoint_minutes",
    "chat_template_path": "model.chat_template",
    "trust_remote_code": "model.trust_remote_code",
}
"""Keys of SFTConfig that the recipe sets itself, and where."""


def check_trainer_options(recipe: Recipe) -> None:
    """Check ``train.trainer`` without a model.

    Raises:
        RecipeError: A key is unknown, belongs to another recipe key, or has an impossible value.
    """
    from trl import SFTConfig

    for key in recipe.train.trainer:
        if key in PASSED_ON:
            continue
        if key in RECIPE_KEYS:
            raise RecipeError(
                f"train.trainer.{key}: this is set by {RECIPE_KEYS[key]}.", f"Set {RECIPE_KEYS[key]} instead."
            )
        if key in {field.name for field in fields(SFTConfig)}:
            raise RecipeError(
                f"train.trainer.{key}: TRL knows it, but a branch cannot use it: data, loss, checkpoints and the one "
                "device of a branch are handled here.",
                f"Usable keys: {', '.join(sorted(PASSED_ON))}.",
            )
        raise RecipeError(
            f"train.trainer: unknown key {key}.{nearest(key, sorted(PASSED_ON | RECIPE_KEYS.keys()))}",
            f"Usable keys: {', '.join(sorted(PASSED_ON))}.",
        )
    from transformers.integrations import get_reporting_integration_callbacks

    with tempfile.TemporaryDirectory() as scratch:
        args = _training_arguments(recipe, Path(scratch), cpu=True)
    try:
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()  # says what is not installed
    except (ValueError, RuntimeError, ImportError) as error:
        raise RecipeError(f"train.trainer.report_to: {str(error).splitlines()[0]}") from None


def steps_for(rows: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of a branch: ceil(epochs * ceil(rows / batch_size)); an epoch's last batch may be smaller."""
    return math.ceil(epochs * math.ceil(rows / batch_size))


def train_branch(
    recipe: Recipe,
    datasets: Mapping[str, EncodedDataset],
    folder: Path,
    *,
    base: Base,
    device: torch.device,
    threads: int | None,
    progress: Callable[[int, int, dict[str, Any]], None] | None = None,
    provenance: Mapping[str, str],
    data_seed: int | None = None,
) -> dict[str, Any]:
    """Train one group from the base and write ``folder/model``.

    Args:
        recipe: ``model``, ``train`` and ``seed`` are read.
        datasets: The group's encoded training rows by name; their order does not matter.
        folder: The branch's folder. ``log.jsonl`` gets a line per step; ``checkpoints`` exists until training is done.
            Called again after an interruption, training goes on from the newest complete checkpoint there and ends in
            the same bits as without the interruption (same machine kind, versions and threads).
        base: The base; its file dtypes and side files shape ``folder/model``.
        device: Where to compute.
        threads: CPU threads (None leaves them).
        progress: Called about twice a second with (step, steps, facts); facts hold loss (mean per target token, nats),
            learning_rate, grad_norm, target_tokens (of that step) and tokens_per_second (target tokens).
        provenance: Fingerprints of what the result depends on; a checkpoint with other ones is refused.
        data_seed: Seed of the row order (None: ``recipe.seed``); model initialization always takes ``recipe.seed``.

    Returns:
        Facts for the branch's record: target_tokens, tokens and samples actually trained (integers, all epochs), steps,
        epochs, rows, seconds, peak_memory_bytes (process on a CPU, device memory on a GPU), final_loss (mean per
        target token over the last tenth of the steps), threads, device, resumed_from (steps).

    Raises:
        TrainingError: Nothing to train on, or a loss or gradient that is not finite.
        RunFolderError: ``folder`` holds checkpoints of another recipe, base or data.
        RecipeError: ``train.trainer`` is wrong.
        ResourceError: Disk or device memory does not suffice.
        Interrupted: Stopped by SIGTERM or SIGINT after writing a checkpoint.
    """
    _silence()
    _refuse_distributed()
    check_trainer_options(recipe)
    import torch
    from datasets import Dataset

    from merit.hf.models import limit_threads, load_model, save_branch, trainable_parameters
    from merit.train.trainer import (
        CPU_OVERHEAD,
        LOG,
        EpochOrder,
        GroupRows,
        GroupTrainer,
        StepCollator,
        StopRequest,
        newest_checkpoint,
    )

    threads = limit_threads(threads)
    rows = GroupRows(datasets)
    if not len(rows):
        raise TrainingError(f"{folder}: the group has no training rows ({len(datasets)} datasets).")
    train = recipe.train
    seed = recipe.seed if data_seed is None else data_seed
    data = {f"data.{name}": dataset.fingerprint for name, dataset in datasets.items()}
    provenance = {**provenance, **data, "data_seed": str(seed)}
    checkpoints = folder / "checkpoints"
    start = newest_checkpoint(checkpoints)
    totals, resumed_from = _go_on_from(start, provenance)
    log = folder / LOG
    _start_clean(folder, start)
    provenance["resumed_from"] = json.dumps(resumed_from)
    args = _training_arguments(recipe, checkpoints, cpu=device.type == "cpu")
    args.n_gpu  # noqa: B018  finds the devices; the next line keeps one of them
    args._n_gpu = min(args._n_gpu, 1)
    with _memory_meter(device) as memory, StopRequest() as stop, _plain_errors(folder):
        model = load_model(base, device, trainable=True, seed=recipe.seed)
        if not trainable_parameters(model):
            raise TrainingError("model.trainable leaves no parameter to train.")
        trainer = GroupTrainer(
            order=EpochOrder(len(rows), seed),
            log_path=log,
            totals=totals,
            provenance=provenance,
            stop=stop,
            checkpoint_seconds=60 * train.checkpoint_minutes,
            memory=memory,
            progress=progress,
            model=model,
            args=args,
            processing_class=base.tokenizer,
            train_dataset=Dataset.from_dict({"row": range(len(rows))}),
            data_collator=StepCollator(
                rows,
                train.micro_batch_size or train.batch_size,
                base.batcher,
                overhead=CPU_OVERHEAD if device.type == "cpu" else None,
            ),
        )
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        step, steps = trainer.state.global_step, trainer.state.max_steps
        if step < steps:
            raise Interrupted(f"{folder}: stopped at step {step} of {steps}; the same command goes on from there.")
        partial = folder / ".model.partial"
        save_branch(trainer.model, partial, base, save_dtype=train.save_dtype)
        partial.rename(folder / "model")
    shutil.rmtree(checkpoints, ignore_errors=True)
    del trainer, model
    gc.collect()  # the trainer and its callbacks hold each other, and with them the model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "target_tokens": totals.target_tokens,
        "tokens": totals.tokens,
        "samples": totals.samples,
        "steps": steps,
        "epochs": train.epochs,
        "rows": len(rows),
        "seconds": round(totals.seconds, 3),
        "peak_memory_bytes": totals.peak_memory_bytes,
        "final_loss": _final_loss(log, steps),
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "resumed_from": resumed_from,
        "stop_asked": stop.asked,
    }


def _training_arguments(recipe: Recipe, checkpoints: Path, *, cpu: bool) -> Any:
    from trl import SFTConfig

    train, dtype = recipe.train, recipe.model.dtype
    extra = dict(train.trainer)
    if extra.get("report_to", "none") == "none":
        extra["logging_strategy"] = "no"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return SFTConfig(
                **{
                    "report_to": "none",
                    "save_strategy": "steps" if "save_steps" in extra else "no",
                    "dataloader_pin_memory": not cpu,
                    **extra,
                },
                output_dir=str(checkpoints),
                seed=recipe.seed,
                data_seed=recipe.seed,
                num_train_epochs=train.epochs,
                learning_rate=train.learning_rate,
                per_device_train_batch_size=train.batch_size,
                gradient_accumulation_steps=1,
                lr_scheduler_type=train.scheduler,
                warmup_steps=train.warmup_ratio,
                weight_decay=train.weight_decay,
                optim=train.optimizer,
                max_grad_norm=train.max_grad_norm,
                activation_checkpointing=train.gradient_checkpointing,
                use_cpu=cpu,
                bf16=not cpu and dtype == "bfloat16",
                fp16=not cpu and dtype == "float16",
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                remove_unused_columns=False,
                logging_nan_inf_filter=False,
                disable_tqdm=True,
                log_level="error",
            )
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"train.trainer: {str(error).splitlines()[0]}") from None


def _refuse_distributed() -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ResourceError(
            f"A branch trains in one process on one device, but WORLD_SIZE says {processes}.",
            "Start it without torchrun or accelerate launch; run branches side by side with --jobs.",
        )


def _start_clean(folder: Path, start: Path | None) -> None:
    """Remove what an earlier attempt left, and set the log back to the checkpoint's."""
    from merit.train.trainer import LOG

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model", ".model.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)
    if start is not None:
        shutil.copyfile(start / LOG, folder / LOG)
    else:
        (folder / LOG).write_bytes(b"")


def _go_on_from(start: Path | None, provenance: Mapping[str, str]) -> tuple[Totals, list[int]]:
    """Totals and steps at which training was taken up again, from the checkpoint's marker."""
    from merit.train.trainer import MARKER, Totals

    if start is None:
        return Totals(), []
    marker = json.loads((start / MARKER).read_text(encoding="utf-8"))
    stored = dict(marker["provenance"])
    resumed_from = json.loads(stored.pop("resumed_from"))
    changed = differences(stored, dict(provenance))
    if changed:
        raise RunFolderError(
            f"{start.parent} holds a half-trained branch of other settings: {'; '.join(changed)}.",
            f"Set the recipe back to go on from step {marker['step']}, remove that folder to start the branch over, "
            "or use another run folder (--output DIR).",
            "Nothing was changed.",
        )
    return Totals(**marker["totals"]), [*resumed_from, marker["step"]]


def _final_loss(log: Path, steps: int) -> float:
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()][-math.ceil(steps / 10) :]
    targets = sum(row["target_tokens"] for row in rows)
    return sum(row["loss"] * row["target_tokens"] for row in rows) / max(targets, 1)


@contextlib.contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, a full device and TRL's own refusals into messages."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{folder}: out of device memory: {str(error).splitlines()[0]}",
            "Lower train.micro_batch_size (the result stays the same), or set train.gradient_checkpointing: true, or "
            "lower train.max_length.",
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _disk_full(folder, error) from None
    except Exception as error:  # safetensors and torch.save wrap the system's error in their own
        if isinstance(error, ValueError) and "`lm_head` is not supported" in str(error):
            raise RecipeError(
                "model.lora.target_modules: an adapter on lm_head cannot be trained.", "Leave lm_head out."
            ) from None
        if "No space left on device" not in str(error):
            raise
        raise _disk_full(folder, error) from None
    finally:
        shutil.rmtree(folder / ".model.partial", ignore_errors=True)


def _disk_full(folder: Path, error: Exception) -> ResourceError:
    free = shutil.disk_usage(folder).free
    return ResourceError(
        f"{folder}: the disk is full ({free / 2**20:.0f} MiB free): {str(error).splitlines()[0]}",
        "Free some space, then run the same command again: it goes on from the last complete checkpoint.",
    )


@contextlib.contextmanager
def _memory_meter(device: torch.device) -> Iterator[Callable[[], int]]:
    """Peak memory from here on (bytes): of the device on a GPU, of this process on a CPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start the process's high-water mark afresh
    yield _peak_resident


def _peak_resident() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _silence() -> None:
    """No telemetry, no progress bars, no library chatter: what matters is said by our own progress and errors."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers|accelerate|peft)\.")
