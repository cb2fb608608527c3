"""The processes that train one branch together, through accelerate: DDP, FSDP2 or just one. It knows no data and no loss.

With FSDP2 a parameter is a DTensor, of which every process has a part; :func:`whole` and :func:`part_like` go from one
to the other, so that checkpoints look the same however many processes wrote them. DeepSpeed is :mod:`merit.train.zero`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from merit.recipe.schema import ModelSettings, TrainSettings
from merit.train import trackers
from merit.train.optimizers import make_optimizer

_T = TypeVar("_T")


class Team:
    """The processes of one branch, as one of them sees it.

    Attributes:
        accelerator: Gradient scaling, clipping, optimizer and trackers.
        size: How many processes there are.
        rank: This one's number.
        device: Where it computes.
        sharded: Whether no process has the whole training state.
    """

    def __init__(self, settings: TrainSettings, model: ModelSettings, device: torch.device, trackers: Path) -> None:
        on_gpu = device.type == "cuda"
        precision = {"float16": "fp16", "bfloat16": "bf16"}.get(model.dtype, "no") if on_gpu else "no"
        AcceleratorState._reset_state()  # noqa: SLF001  it has no public way to train again with another precision
        self.accelerator = Accelerator(
            cpu=not on_gpu,
            mixed_precision=precision,
            log_with=list(settings.report_to) or None,
            project_dir=str(trackers),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.size = self.accelerator.num_processes
        self.rank = self.accelerator.process_index
        self.device = self.accelerator.device
        self.sharded = settings.sharding != "none"
        self._talk = distributed.new_group(backend="gloo") if self.size > 1 else None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files."""
        return bool(self.rank == 0)

    def from_leader(self, make: _T) -> _T:
        """What the leading process has, in every process."""
        return make if self.size == 1 else broadcast_object_list([make])[0]

    def to_leader(self, part: torch.Tensor) -> list[torch.Tensor]:
        """This tensor of every process on the CPU, in order of rank, in the leading process; in others nothing."""
        part = part.detach().cpu().contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.leads else []
        distributed.gather(part, parts or None, group=self._talk)
        return parts

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Each flag, true where it is in any process; on the CPU, so that no GPU is waited for."""
        if self._talk is None:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        distributed.all_reduce(votes, op=distributed.ReduceOp.MAX, group=self._talk)
        return [bool(vote) for vote in votes.tolist()]

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the processes of a CPU tensor."""
        if self._talk is not None:
            distributed.all_reduce(values, group=self._talk)
        return values

    def everyones(self, value: _T) -> list[_T]:
        """This value of every process, in order of rank."""
        values: list[_T] = [value] * self.size
        if self._talk is not None:
            distributed.all_gather_object(values, value, group=self._talk)
        return values

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self._talk is not None:
            distributed.barrier(group=self._talk)


class Spread(Protocol):
    """A model as its processes train it together, with its optimizer."""

    @property
    def module(self) -> torch.nn.Module:
        """What is called for a forward pass."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What the schedule sets the learning rates of."""

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        """Around the forward and backward pass of a micro-batch; after the step's last, gradients are complete."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss; they are averaged over the processes."""

    def update(self) -> torch.Tensor:
        """Clip the gradients, take a step and drop them; the norm before clipping."""

    def optimizer_state(self, *, keep: bool) -> dict[str, object]:
        """The optimizer's state with whole tensors on the CPU; every process has to call it, one ``keep``s the result."""

    def load_optimizer_state(self, stored: Mapping[str, object]) -> None:
        """Put back what :meth:`optimizer_state` gave, of any kind of spread, once the model's weights are back."""

    def close(self) -> None:
        """Let go of the model."""


class Accelerated:
    """A model that accelerate spreads: each process has all of it (DDP), or a part (FSDP2)."""

    def __init__(self, team: Team, model: PreTrainedModel, settings: TrainSettings, dtype: str) -> None:
        self._accelerator = team.accelerator
        self._model = model
        self._max_norm = settings.max_grad_norm
        self.module: torch.nn.Module
        if team.sharded:
            self.module = _cut_up(model, getattr(torch, dtype) if team.accelerator.mixed_precision != "no" else None)
        else:
            self.module = team.accelerator.prepare_model(model)
        self.optimizer = make_optimizer(model, settings)  # over the parameters that FSDP2 put there
        self._stepper = team.accelerator.prepare_optimizer(self.optimizer)

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        """Gradients travel in the last one's backward pass alone."""
        none = contextlib.nullcontext()
        return none if last else self._accelerator.no_sync(self.module)

    def backward(self, loss: torch.Tensor) -> None:
        """With float16 the loss is scaled."""
        self._accelerator.backward(loss)

    def update(self) -> torch.Tensor:
        """With float16 a step whose gradients overflowed is skipped."""
        norm = whole(self._accelerator.clip_grad_norm_(self._model.parameters(), self._max_norm))
        self._stepper.step()
        self._stepper.zero_grad()
        return norm

    def optimizer_state(self, *, keep: bool) -> dict[str, object]:
        """By parameter number."""
        stored = self.optimizer.state_dict()
        state = {}
        for number, entries in stored["state"].items():
            values = {key: whole(value) if isinstance(value, torch.Tensor) else value for key, value in entries.items()}
            if keep:
                state[number] = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        return {"state": state, "param_groups": stored["param_groups"]}

    def load_optimizer_state(self, stored: Mapping[str, object]) -> None:
        """Cut up as the parameters are."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state: Mapping[int, Mapping[str, object]] = stored["state"]  # type: ignore[assignment]
        parts = {
            number: {
                key: part_like(value, parameters[number]) if isinstance(value, torch.Tensor) else value
                for key, value in entries.items()
            }
            for number, entries in state.items()
        }
        self.optimizer.load_state_dict({"state": parts, "param_groups": stored["param_groups"]})

    def close(self) -> None:
        """Nothing to do."""


def _cut_up(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Its parameters are replaced by parts."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    inner = getattr(model, "base_model", model)  # of an adapter model, or of the plain one
    blocks = set(getattr(inner, "_no_split_modules", None) or ())
    for module in [module for module in model.modules() if type(module).__name__ in blocks]:
        fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


@contextlib.contextmanager
def tracking(team: Team, settings: TrainSettings, folder: Path) -> Iterator[None]:
    """Experiment trackers are open inside; the run is named after the last parts of the branch's ``folder``."""
    if not settings.report_to:
        yield
        return
    own = folder / "trackers"
    name = "/".join(folder.absolute().parts[-3:])
    with trackers.own_folder(own, settings.report_to):
        own.mkdir(parents=True, exist_ok=True)
        values = {key: str(value) for key, value in settings.deciding().items()}
        team.accelerator.init_trackers(trackers.PROJECT, values, trackers.keyword_arguments(own, name))
        try:
            yield
        finally:
            for tracker in team.accelerator.trackers:
                tracker.finish()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, sharded like ``like`` if it has its shape."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor
