"""DeepSpeed's ZeRO-2 for the processes of one branch: gradients and optimizer state are sharded, weights are whole.

The engine is called directly: accelerate's plugin for it runs on GPUs alone, and takes a step inside ``backward``. Weights
stay float32 and the arithmetic of a GPU is torch's autocast, as without DeepSpeed, so that the result is the same up to
rounding. The optimizer's state is gathered by parameter: a checkpoint does not tell how it was trained.

Source: Rajbhandari et al., arXiv 1910.02054 (ZeRO).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from transformers import PreTrainedModel

from merit.errors import ResourceError, TrainingError
from merit.recipe.schema import TrainSettings
from merit.train.optimizers import make_optimizer
from merit.train.processes import Team


def engine_config(settings: TrainSettings) -> dict[str, Any]:
    """DeepSpeed's configuration; micro-batches, learning rates and precision are the loop's business."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # our losses are sums: nothing is divided by it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2, "overlap_comm": False, "round_robin_gradients": False},
        "steps_per_print": 2**62,
    }


class Zero2:
    """A model whose gradients and optimizer state are sharded among the processes.

    The parameters of each of the optimizer's groups, one after another, padded at the end, make a vector of which process
    r of N updates the r-th N-th.

    Raises:
        ResourceError: DeepSpeed computes on another kind of device.
        TrainingError: This version of DeepSpeed lays its parameters out otherwise.
    """

    def __init__(self, team: Team, model: PreTrainedModel, settings: TrainSettings, dtype: str) -> None:
        deepspeed = import_module("deepspeed")
        import_module("deepspeed.utils").logger.setLevel(logging.ERROR)
        device = deepspeed.get_accelerator().device_name()
        if device != team.device.type:
            raise ResourceError(
                f"DeepSpeed computes on {device}, but this branch on {team.device.type} (train.device).",
                f"Set the environment variable DS_ACCELERATOR={team.device.type}, or use another train.sharding.",
            )
        if team.accelerator.mixed_precision != "no":  # the engine switches off what is on around its call
            model.forward = torch.autocast(device, dtype=getattr(torch, dtype))(model.forward)
        self._team = team
        self.optimizer = make_optimizer(model, settings)
        self._parameters = [list(group["params"]) for group in self.optimizer.param_groups]
        self.module, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=engine_config(settings), dist_init_required=False
        )
        for parameters, part in zip(self._parameters, self._parts(), strict=True):
            if not torch.equal(part, self._cut(parameters, part)):
                raise TrainingError(
                    f"DeepSpeed {deepspeed.__version__} shards parameters in a way that MERIT does not know.",
                    "Install another version (0.19), or use train.sharding: fsdp2.",
                )

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        """Gradients are communicated in every micro-batch: no process has them whole."""
        self.module.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Each process keeps the gradients of its own part."""
        self.module.backward(loss)

    def update(self) -> torch.Tensor:
        """Each process updates its own part, and the parts are brought together."""
        self.module.step()
        return torch.as_tensor(self.module.get_global_grad_norm())

    def optimizer_state(self, *, keep: bool) -> dict[str, object]:
        """By parameter number, as without DeepSpeed."""
        stored = self.optimizer.state_dict()
        state: dict[int, dict[str, object]] = {}
        groups, first = [], 0
        for parameters, part, group in zip(self._parameters, self._parts(), stored["param_groups"], strict=True):
            numbers = list(range(first, first + len(parameters)))
            first += len(parameters)
            groups.append({**group, "params": numbers})
            for key, value in self.optimizer.state.get(part, {}).items():
                cut_up = isinstance(value, torch.Tensor) and value.shape == part.shape
                pieces = _pieces(self._team.to_leader(value), parameters) if cut_up else [value] * len(numbers)
                for number, piece in zip(numbers, pieces, strict=False):
                    state.setdefault(number, {})[key] = (
                        piece.cpu().clone() if isinstance(piece, torch.Tensor) else piece
                    )
        return {"state": state, "param_groups": groups} if keep else {}

    def load_optimizer_state(self, stored: Mapping[str, Any]) -> None:
        """The parts that are updated are set to the model's weights, too."""
        first = 0
        state = {}
        for number, (parameters, part) in enumerate(zip(self._parameters, self._parts(), strict=True)):
            part.data.copy_(self._cut(parameters, part))
            found = [stored["state"].get(first + index, {}) for index in range(len(parameters))]
            state[number] = {
                key: self._cut([entries[key] for entries in found], part)
                if isinstance(value, torch.Tensor) and value.shape == parameters[0].shape
                else value
                for key, value in found[0].items()
            }
            first += len(parameters)
        groups = [{**group, "params": [number]} for number, group in enumerate(stored["param_groups"])]
        self.optimizer.load_state_dict({"state": {n: s for n, s in state.items() if s}, "param_groups": groups})

    def close(self) -> None:
        """Take the engine's hooks off."""
        self.module.destroy()

    def _parts(self) -> list[torch.Tensor]:
        """What this process updates of each group: 1-D float32."""
        return [group["params"][0] for group in self.optimizer.param_groups]

    def _cut(self, tensors: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """This process's part of tensors that lie one after another; zero where they end before it does."""
        start, size = self._team.rank * len(like), len(like)
        part = torch.zeros_like(like)
        at = 0
        for tensor in tensors:
            low, high = max(at, start), min(at + tensor.numel(), start + size)
            if low < high:
                part[low - start : high - start].copy_(tensor.detach().flatten()[low - at : high - at])
            at += tensor.numel()
        return part


def _pieces(parts: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The parts of all processes, together and cut by parameter; nothing where there are none."""
    if not parts:
        return
    whole = torch.cat(list(parts))
    at = 0
    for parameter in parameters:
        yield whole[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
