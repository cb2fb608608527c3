"""Exact checkpoints of a branch in training: weights, optimizer, schedule, random state, log and counts.

A checkpoint has the trained parameters by name and whole, whatever the number of processes. ``complete.json`` is written
last, with every file's hash and its own checksum, so that a truncated or damaged checkpoint is never resumed from.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from merit.errors import RunFolderError, TrainingError
from merit.files import checksum, content_hash, differences, read_as, read_json, sealed, sync, write_json, writing
from merit.hf.models import trainable_parameters
from merit.train.balancing import Balancing
from merit.train.processes import Spread, Team, part_like, whole

MARKER = "complete.json"
LOG = "log.jsonl"
_WEIGHTS = "trainable.safetensors"
_STATE = "state.pt"


@dataclass
class Totals:
    """What has been trained on so far, over all resumed parts and all rounds."""

    target_tokens: int = 0
    tokens: int = 0
    samples: int = 0
    steps: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Marker:
    """What ``complete.json`` says.

    Attributes:
        step: Optimizer steps taken.
        steps: Optimizer steps in all.
        totals: Counts up to here.
        provenance: What the result depends on: settings, and fingerprints of base and data.
        resources: Threads and processes that it was trained with so far.
        resumed_from: Steps of the checkpoints that training was resumed from.
        files: Content hash of every file by name.
        checksum: Of all the rest.
    """

    step: int
    steps: int
    totals: Totals
    provenance: dict[str, object]
    resources: dict[str, int]
    resumed_from: list[int] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    checksum: str = ""


@dataclass(frozen=True)
class Training:
    """Everything in a process that changes from step to step.

    Attributes:
        model: The model, by its own parameter names.
        spread: The same as its processes train it, with the optimizer.
        schedule: Learning rates.
        team: The processes.
        balancing: What joins the datasets' gradients, if they are not just added.
    """

    model: PreTrainedModel
    spread: Spread
    schedule: LRScheduler
    team: Team
    balancing: Balancing | None = None


def step_of(checkpoint: Path) -> int:
    """Optimizer steps in a checkpoint folder, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``: its marker stands as written, and every file's content is what it says."""
    for checkpoint in sorted(_checkpoints(folder), key=step_of, reverse=True):
        try:
            marker = read_json(checkpoint / MARKER)
            if marker["checksum"] == checksum(marker) and all(
                content_hash(checkpoint / name) == value for name, value in marker["files"].items()
            ):
                return checkpoint
        except (RunFolderError, OSError, KeyError, TypeError, AttributeError):
            continue
    return None


def read_marker(checkpoint: Path, provenance: Mapping[str, object]) -> Marker:
    """The marker of a checkpoint to resume from.

    Raises:
        RunFolderError: It is of other settings, another base or other data.
    """
    marker = read_as(checkpoint / MARKER, Marker)
    changed = differences(marker.provenance, dict(provenance))
    if changed:
        raise RunFolderError(
            f"{checkpoint.parent} contains a half-trained branch of other settings: {'; '.join(changed)}.",
            f"Set the recipe back to resume from step {marker.step}, remove that folder to start the branch over, "
            "or use another folder (for a run: --output DIR).",
            "Nothing was changed.",
        )
    return marker


def totals_of(checkpoint: Path) -> Totals:
    """What had been trained on when a checkpoint was written.

    Raises:
        RunFolderError: It is damaged.
    """
    return read_as(checkpoint / MARKER, Marker).totals


def save(
    folder: Path, training: Training, marker: Marker, log: Path, *, weights: bool = True, optimizer: bool = True
) -> None:
    """Write ``folder/checkpoint-<step>`` and remove older ones; every process has to call it, the leading one writes.

    Without ``weights`` or ``optimizer`` it is what the next round continues from (:func:`carry`).
    """
    team = training.team
    stored = gathered(training.model, keep=team.leads) if weights else {}
    moments = training.spread.optimizer_state(keep=team.leads) if optimizer else None
    random = team.everyones(_random_state())
    if team.leads:
        checkpoint = folder / f"checkpoint-{marker.step}"
        shutil.rmtree(checkpoint, ignore_errors=True)
        checkpoint.mkdir(parents=True)
        if weights:
            save_file(stored, checkpoint / _WEIGHTS)
        scaler = team.accelerator.scaler
        state = {
            "optimizer": moments,
            "schedule": training.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": random,
            "balancing": training.balancing.balancer.state() if training.balancing is not None else {},
        }
        with writing(checkpoint / _STATE) as file:
            torch.save(state, file)
        shutil.copyfile(log, checkpoint / LOG)
        files = sorted(checkpoint.iterdir())
        for path in files:
            sync(path)
        content = {path.name: content_hash(path) for path in files}
        write_json(checkpoint / MARKER, sealed(asdict(marker) | {"files": content}))
        sync(checkpoint)
        for other in folder.glob("checkpoint-*"):
            if other != checkpoint:
                shutil.rmtree(other)
    team.wait()


def load(checkpoint: Path, training: Training) -> None:
    """Put a checkpoint's state back into everything that :func:`save` took it from.

    Raises:
        TrainingError: Its parameters are not those that the model trains.
    """
    stored, state = load_file(checkpoint / _WEIGHTS), _state(training.model)
    if stored.keys() != state.keys():
        different = sorted(stored.keys() ^ state.keys())
        raise TrainingError(
            f"{checkpoint} contains other parameters than this model trains, first {different[0]}.",
            "Remove the branch's checkpoints folder to start it over.",
        )
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(part_like(stored[name], tensor))
    saved = torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True)
    training.spread.load_optimizer_state(saved["optimizer"])
    training.schedule.load_state_dict(saved["schedule"])
    if training.balancing is not None:
        training.balancing.balancer.load(saved["balancing"])
    _go_on(saved, training.team)


def carry(checkpoint: Path, spread: Spread, team: Team, *, optimizer: bool) -> None:
    """Go on from the end of an earlier round: random numbers, the loss scaler and, if asked for, the optimizer's state."""
    saved = torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True)
    if optimizer and saved["optimizer"] is not None:
        spread.load_optimizer_state(saved["optimizer"])
    _go_on(saved, team)


def _go_on(saved: Mapping[str, Any], team: Team) -> None:
    if saved["scaler"] is not None and team.accelerator.scaler is not None:
        team.accelerator.scaler.load_state_dict(saved["scaler"])
    if len(saved["random"]) == team.size:
        _set_random_state(saved["random"][team.rank])


def gathered(model: PreTrainedModel, *, keep: bool) -> dict[str, torch.Tensor]:
    """Trained parameters and persistent buffers by name, whole; every process has to call it, one ``keep``s them."""
    found = {name: whole(tensor).contiguous() for name, tensor in _state(model).items()}
    return found if keep else {}


def put(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy what :func:`gathered` gave into a model of one process."""
    with torch.no_grad():
        for name, tensor in _state(model).items():
            tensor.copy_(weights[name])


def _state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in named}
    return {name: tensor.detach() for name, tensor in {**trainable_parameters(model), **buffers}.items()}


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
