"""The processes that train one branch together, through accelerate: DDP, FSDP2 or just one. It knows no data and no loss.

With FSDP2 a parameter is a DTensor, of which every process holds a part; :func:`whole` and :func:`part_like` go from one
to the other, so that checkpoints look the same however many processes wrote them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from merit.recipe.schema import ModelSettings, TrainSettings

_T = TypeVar("_T")


class Team:
    """The processes of one branch, as one of them sees it.

    Attributes:
        accelerator: Gradient scaling, clipping, optimizer and trackers.
        size: How many processes there are.
        rank: This one's number.
        device: Where it computes.
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
        self.sharded = settings.sharding == "fsdp2"
        self._policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, model.dtype) if precision != "no" else None, reduce_dtype=torch.float32
        )
        self._talk = distributed.new_group(backend="gloo") if self.size > 1 else None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files."""
        return bool(self.rank == 0)

    def spread(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, ready to be trained by all; its parameters may be replaced, so make the optimizer afterwards."""
        if not self.sharded:
            prepared: torch.nn.Module = self.accelerator.prepare_model(model)
            return prepared
        inner = getattr(model, "base_model", model)  # of an adapter model, or of the plain one
        blocks = set(getattr(inner, "_no_split_modules", None) or ())
        for module in [module for module in model.modules() if type(module).__name__ in blocks]:
            fully_shard(module, mp_policy=self._policy)
        fully_shard(model, mp_policy=self._policy)
        return model

    def from_leader(self, make: _T) -> _T:
        """What the leading process has, in every process."""
        return make if self.size == 1 else broadcast_object_list([make])[0]

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


@contextlib.contextmanager
def trackers(team: Team, settings: TrainSettings) -> Iterator[None]:
    """Experiment trackers are open inside."""
    if settings.report_to:
        team.accelerator.init_trackers("merit", {key: str(value) for key, value in settings.deciding().items()})
    try:
        yield
    finally:
        for tracker in team.accelerator.trackers if settings.report_to else ():
            tracker.finish()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be cut up; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, cut up as ``like`` is where it has its shape."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor


def whole_optimizer(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, object]:
    """The optimizer's state with whole tensors on the CPU; every process has to call it, one ``keep``s the result."""
    stored = optimizer.state_dict()
    state = {}
    for number, entries in stored["state"].items():
        values = {key: whole(value) if isinstance(value, torch.Tensor) else value for key, value in entries.items()}
        if keep:
            state[number] = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    return {"state": state, "param_groups": stored["param_groups"]}


def load_optimizer(optimizer: torch.optim.Optimizer, stored: Mapping[str, object]) -> None:
    """Put back what :func:`whole_optimizer` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: Mapping[int, Mapping[str, object]] = stored["state"]  # type: ignore[assignment]
    parts = {
        number: {
            key: part_like(value, parameters[number]) if isinstance(value, torch.Tensor) else value
            for key, value in entries.items()
        }
        for number, entries in state.items()
    }
    optimizer.load_state_dict({"state": parts, "param_groups": stored["param_groups"]})
