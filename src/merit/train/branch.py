"""Fine-tune one group from the base: rows in, a Hugging Face checkpoint out, exactly resumable.

It knows one group and no other, so a branch can train on any machine that has the recipe, the split and the base. The
objective is the mean cross-entropy over the target tokens of each optimizer step, over all processes.

Source: METHOD step 5 is Choi & Kim, arXiv 2606.01717, §4 (Algorithm 1): branch k starts from θ0 and sees the datasets of
G_k alone, with the same hyperparameters in every branch and no communication.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch.utils.data import DataLoader

from merit.errors import Interrupted, RecipeError, TrainingError
from merit.files import publish, write_bytes, write_text
from merit.hf.base import Base
from merit.hf.batches import target_losses, to_device
from merit.hf.checkpoint import SECOND_MOMENTS
from merit.hf.models import (
    autocast,
    file_names,
    limit_threads,
    load_model,
    pick_device,
    save_branch,
    trainable_parameters,
)
from merit.mixture import EncodedDataset
from merit.progress import Progress, silent
from merit.recipe.schema import TrainSettings
from merit.signals import StopFlag, graceful
from merit.train import checkpoint
from merit.train.balancing import balancing_of, refuse_large
from merit.train.batches import CPU_OVERHEAD, GroupRows, StepBatch, StepCollator, StepOrder
from merit.train.checkpoint import LOG, Marker, Totals, Training
from merit.train.finch import Finch
from merit.train.guards import kernels, memory_meter, plain_errors, silence_libraries
from merit.train.log import StepLog, final_loss
from merit.train.optimizers import make_schedule, second_moments
from merit.train.processes import Accelerated, Team, tracking
from merit.train.requirements import check_processes, check_requirements
from merit.train.result import BranchResult, RoundShare
from merit.train.rounds import Round, Span
from merit.train.zero import Zero2

CHECKPOINTS, STATE = "checkpoints", "state"
ONLY = Round()


def train_branch(
    rows: Mapping[str, EncodedDataset],
    base: Base,
    folder: Path | str,
    settings: TrainSettings | None = None,
    *,
    seed: int = 0,
    progress: Progress = silent,
    part: Round = ONLY,
) -> BranchResult:
    """Train one group from the base and write ``folder/model``.

    Called again after an interruption, training resumes from the newest complete checkpoint in ``folder`` and ends in the
    same bits as without the interruption (same machine kind, versions, threads and processes).

    Args:
        rows: The group's encoded training rows by dataset; their order does not matter.
        base: The base; its ``settings`` say what is trained, its file dtypes and side files shape ``folder/model``.
        folder: The branch's folder. ``log.jsonl`` gets a line per step; ``checkpoints`` exists until training is done.
        settings: Hyperparameters.
        seed: Seed of new adapters, dropout and, unless ``settings.data_seed`` is set, of the row order.
        progress: Called about twice a second with (steps done, steps in all, figures).
        part: For training in several rounds: which one this is. All but the last write float32 weights and leave what the
            next one goes on from in ``folder/state``.

    Raises:
        TrainingError: Nothing to train on, or a loss or gradient that is not finite.
        RunFolderError: ``folder`` contains checkpoints of other settings, another base or other data.
        ResourceError: Disk or device memory does not suffice, or a package that the settings need is missing.
        Interrupted: Stopped by SIGTERM or SIGINT after writing a checkpoint.
    """
    folder, settings = Path(folder), settings or TrainSettings()
    silence_libraries()
    check_requirements(settings, base.settings)
    check_processes(settings)
    threads = limit_threads(settings.threads)
    group = _group(rows, settings, seed, part)
    if not len(group):
        raise TrainingError(f"{folder}: the group has no training rows ({len(rows)} datasets).")
    span = part.span(len(group), settings.batch_size, settings.epochs)
    team = Team(settings, base.settings, pick_device(settings.device), folder / "trackers")
    unfinished = folder / ".model.partial"
    with graceful() as stop, plain_errors(folder, unfinished), tracking(team, settings, folder), kernels(settings):
        memory = memory_meter(team.device)
        start = team.from_leader(checkpoint.newest(folder / CHECKPOINTS))
        before = Totals() if part.carried is None else checkpoint.totals_of(part.carried)
        provenance = _provenance(rows, base, settings, seed) | part.provenance()
        fresh = Marker(span.first, span.last, Totals(**vars(before)), provenance, _resources(team, threads))
        marker, warnings = _go_on_from(start, fresh)
        if team.leads:
            _start_clean(folder, start, part)
        team.wait()
        training = _load(base, settings, team, span, seed, part, len(group.names))
        if start is not None:
            checkpoint.load(start, training)
        loader = _loader(group, base, settings, team, _order(settings, seed, marker))
        log = StepLog(folder, group.names, span.last, marker.totals, team, memory, progress)
        _take_steps(training, base, settings, loader, log, marker, stop)
        totals = marker.totals
        if not part.is_last:
            settings = settings.model_copy(update={"save_dtype": "float32"})  # else small updates would be rounded away
            ended = replace(marker, step=span.last)
            keep = part.keeps_optimizer
            checkpoint.save(folder / STATE, training, ended, log.path, weights=False, optimizer=keep)
        _save_model(training, base, settings, unfinished, seed)
        if settings.save_second_moments and part.is_last:
            _save_second_moments(training, settings, folder)
        result = BranchResult(
            folder=folder,
            target_tokens=totals.target_tokens,
            tokens=totals.tokens,
            samples=totals.samples,
            steps=totals.steps,
            epochs=settings.epochs,
            rows=len(group),
            seconds=round(totals.seconds, 3),
            peak_memory_bytes=totals.peak_memory_bytes,
            final_loss=final_loss(log.path, totals.steps),
            threads=threads,
            processes=team.size,
            device=torch.cuda.get_device_name(team.device) if team.device.type == "cuda" else "cpu",
            resumed_from=tuple(marker.resumed_from),
            warnings=warnings,
            round=_share(part, before, totals) if part.of > 1 else None,
        )
        if team.leads:
            publish(unfinished, folder / "model")
            result.save(folder)
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        team.wait()
        training.spread.close()
    if team.device.type == "cuda":
        del training, loader
        team.accelerator.free_memory()
    return result


def _share(part: Round, before: Totals, after: Totals) -> RoundShare:
    """What a round added."""
    names = ("target_tokens", "tokens", "samples", "steps")
    counts = {name: getattr(after, name) - getattr(before, name) for name in names}
    return RoundShare(part.number, part.of, **counts)


def _take_steps(
    training: Training,
    base: Base,
    settings: TrainSettings,
    loader: Iterable[StepBatch],
    log: StepLog,
    marker: Marker,
    stop: StopFlag,
) -> None:
    """The loop: a step, its figures, and a checkpoint when one is due or a stop was asked for."""
    folder, team = log.path.parent, training.team
    saved = time.monotonic()
    for step, batch in enumerate(loader, marker.step + 1):
        rate, figures = _take_step(training, base, batch)
        log.note(step, rate, figures, batch)
        if step == marker.steps:
            break
        due = time.monotonic() - saved >= 60 * settings.checkpoint_minutes
        due |= settings.checkpoint_steps is not None and step % settings.checkpoint_steps == 0
        stopping, saving, flushing = team.any_of([stop.asked, due, log.due])
        if stopping or saving or flushing:
            log.flush()
        if stopping or saving:
            checkpoint.save(folder / CHECKPOINTS, training, replace(marker, step=step), log.path)
            saved = time.monotonic()
        if stopping:
            raise Interrupted(f"{folder}: stopped at step {step} of {marker.steps}; a checkpoint is saved.")
    log.flush()


def _take_step(training: Training, base: Base, batch: StepBatch) -> tuple[float, torch.Tensor]:
    """One optimizer step: forward and backward over its micro-batches, clip, update.

    Returns:
        The learning rate; and, on the device, float32: this process's part of the mean loss per target token, the gradient
        norm before clipping, and the summed loss of each of its rows.
    """
    team, spread = training.team, training.spread
    targets = batch.counts[0].to(team.device).clamp(min=1)
    parts, by_row, seen = list[torch.Tensor](), list[torch.Tensor](), 0
    for number, micro in enumerate(batch.micro, 1):
        with spread.micro_batch(last=number == len(batch.micro)):
            with autocast(base.settings, team.device):
                losses, _ = target_losses(spread.module, to_device(micro, team.device))
            loss = losses.sum() / targets
            if not loss.requires_grad or (team.size > 1 and base.family is not None):
                # Rows without an image leave encoder and projector out; here every parameter has a gradient.
                loss = loss + sum(parameter.sum() * 0 for parameter in trainable_parameters(training.model).values())
            if training.balancing is None:
                spread.backward(loss * team.size if team.size > 1 else loss)  # the processes average
            else:
                training.balancing.add(losses, batch.datasets[seen : seen + len(losses)], targets)
        parts.append(loss.detach())
        by_row.append(losses.detach())
        seen += len(losses)
    if training.balancing is not None:
        training.balancing.finish(batch.targets)
    mean = torch.stack(parts).sum()
    if isinstance(training.schedule, Finch):
        training.schedule.observe(float(team.total(mean.double().cpu())))
    rate = float(training.schedule.get_last_lr()[0])
    norm = spread.update()
    if not team.accelerator.optimizer_step_was_skipped:
        training.schedule.step()
    return rate, torch.cat([torch.stack([mean, norm.to(parts[0])]), *by_row])


def _provenance(
    rows: Mapping[str, EncodedDataset], base: Base, settings: TrainSettings, seed: int
) -> dict[str, object]:
    """What the weights depend on; a checkpoint of anything else is refused."""
    data = {name: dataset.fingerprint for name, dataset in rows.items()}
    blocks = {"train": settings.deciding(), "model": base.settings.deciding()}
    return {"base": base.fingerprint, "seed": seed, **blocks, "data": data}


def _resources(team: Team, threads: int) -> dict[str, int]:
    """What changes the last bits of the result and nothing else."""
    return {"threads": threads, "processes": team.size}


def _go_on_from(start: Path | None, fresh: Marker) -> tuple[Marker, tuple[str, ...]]:
    """Where training begins, and what to say about it."""
    if start is None:
        return fresh, ()
    found = checkpoint.read_marker(start, fresh.provenance)
    warnings = tuple(
        f"{key} changed from {found.resources.get(key)} to {value} between step {found.step} and the next: the result "
        f"differs in its last bits from that of an unchanged run; set train.{key} to keep it"
        for key, value in fresh.resources.items()
        if found.resources.get(key) != value
    )
    resumed = [*found.resumed_from, found.step]
    return replace(fresh, step=found.step, totals=found.totals, resumed_from=resumed), warnings


def _group(rows: Mapping[str, EncodedDataset], settings: TrainSettings, seed: int, part: Round) -> GroupRows:
    """The group's rows; after a new split, those of them whose turn it is."""
    if not part.resplit:
        return GroupRows(rows)
    order = seed if settings.data_seed is None else settings.data_seed
    return GroupRows(
        rows, {name: part.visits(name, len(dataset), settings.epochs, order) for name, dataset in rows.items()}
    )


def _start_clean(folder: Path, start: Path | None, part: Round) -> None:
    """Remove what an earlier attempt left, and set the log back to the checkpoint's, or an earlier round's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model", ".model.partial", STATE):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / f"{SECOND_MOMENTS}.safetensors").unlink(missing_ok=True)
    if (start := start or part.carried) is not None:
        shutil.copyfile(start / LOG, folder / LOG)
    else:
        write_text(folder / LOG, "")


def _load(
    base: Base, settings: TrainSettings, team: Team, span: Span, seed: int, part: Round, datasets: int
) -> Training:
    """The model at the base or a round's start with its trainable subset marked, its optimizer and its schedule."""
    quantize = base.settings.quantize
    model = load_model(base, team.device, part.start, trainable=True, seed=seed, quantize=quantize)
    trained = trainable_parameters(model)
    if not trained:
        raise TrainingError("model.trainable leaves no parameter to train.")
    refuse_large(settings, datasets, sum(parameter.numel() for parameter in trained.values()))
    if any("lm_head.lora_" in name for name in trained):  # PEFT would store the layer itself next to its adapter
        raise RecipeError("model.lora.target_modules: an adapter on lm_head cannot be trained.", "Leave lm_head out.")
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    torch.manual_seed(seed + part.number - 1)
    kind = Zero2 if settings.sharding == "deepspeed" else Accelerated
    spread = kind(team, model, settings, base.settings.dtype)
    if part.carried is not None:
        checkpoint.carry(part.carried, spread, team, optimizer=part.keeps_optimizer)
    schedule = make_schedule(spread.optimizer, settings, span.total, span.first)
    if settings.compile:
        model.compile(dynamic=True)
    balancing = balancing_of(settings, datasets, list(trained.values()))
    return Training(model, spread, schedule, team, balancing)


def _order(settings: TrainSettings, seed: int, marker: Marker) -> tuple[int, int, int]:
    return (seed if settings.data_seed is None else settings.data_seed), marker.steps, marker.step


def _loader(
    group: GroupRows, base: Base, settings: TrainSettings, team: Team, order: tuple[int, int, int]
) -> DataLoader[StepBatch]:
    """The steps from ``order`` = (seed, steps, steps taken) on."""
    seed, steps, start = order
    collator = StepCollator(
        group,
        settings.micro_batch_size or settings.batch_size,
        base.batcher,
        CPU_OVERHEAD if team.device.type == "cpu" else None,
        share=(team.rank, team.size),
    )
    return DataLoader(
        range(len(group)),  # type: ignore[arg-type]  # row numbers; the collator reads the rows
        batch_sampler=StepOrder(len(group), settings.batch_size, seed, steps, start),
        collate_fn=collator,
        num_workers=settings.loader_workers,
        pin_memory=team.device.type == "cuda",
        generator=torch.Generator(),  # else it would draw from the model's random numbers
    )


def _save_model(training: Training, base: Base, settings: TrainSettings, folder: Path, seed: int) -> None:
    """Write the trained model as a Hugging Face checkpoint; every process has to call it, the leading one writes."""
    team, model = training.team, training.model
    if team.sharded:
        weights = checkpoint.gathered(model, keep=team.leads)
        if team.leads:
            model = load_model(base, torch.device("cpu"), trainable=True, seed=seed)
            checkpoint.put(model, weights)
    if team.leads:
        save_branch(model, folder, base, save_dtype=settings.save_dtype)


def _save_second_moments(training: Training, settings: TrainSettings, folder: Path) -> None:
    """Write ``second_moments.safetensors``; every process has to call it, the leading one writes.

    The parameters that AdamW has no state for (without a gradient in any step) have no entry.
    """
    team = training.team
    found = training.spread.optimizer_state(keep=team.leads)
    if team.leads:
        names = file_names(training.model)
        state: Mapping[int, Mapping[str, object]] = found["state"]  # type: ignore[assignment]
        moments = second_moments(training.model, state, settings.betas[1])
        data = save({names[name]: tensor.contiguous() for name, tensor in moments.items()}, {"format": "pt"})
        write_bytes(folder / f"{SECOND_MOMENTS}.safetensors", data)
