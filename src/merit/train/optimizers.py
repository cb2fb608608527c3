"""Optimizers by name and learning-rate schedules: settings in, torch objects out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import Adafactor, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from merit.recipe.schema import TrainSettings
from merit.train.finch import Finch

_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Parameters without weight decay, by name, as transformers' trainer has it."""


def make_optimizer(model: torch.nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer of ``train.optimizer`` over the trainable parameters; biases and norms get no weight decay."""
    trained = dict(model.named_parameters())
    groups = [
        {"params": [trained[name] for name in names], "weight_decay": decay}
        for names, decay in zip(_grouped(model), (settings.weight_decay, 0.0), strict=True)
        if names
    ]
    rate = settings.learning_rate
    adam: dict[str, Any] = {"lr": rate, "betas": settings.betas, "eps": settings.epsilon}
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(groups, **adam),
        "adamw_fused": lambda: torch.optim.AdamW(groups, **adam, fused=True),
        "adamw_8bit": lambda: import_module("bitsandbytes").optim.AdamW8bit(groups, **adam),
        "adamw_8bit_paged": lambda: import_module("bitsandbytes").optim.PagedAdamW8bit(groups, **adam),
        "adafactor": lambda: Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False),
        "sgd": lambda: torch.optim.SGD(groups, lr=rate, momentum=settings.momentum),
    }
    return kinds[settings.optimizer]()


def _grouped(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """Names of the trained parameters with and without weight decay."""
    decaying = set(get_parameter_names(model, [torch.nn.LayerNorm], _NO_DECAY))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [name for name in trained if name in decaying], [name for name in trained if name not in decaying]


def second_moments(
    model: torch.nn.Module, state: Mapping[int, Mapping[str, Any]], decay: float
) -> dict[str, torch.Tensor]:
    """AdamW's estimates of the mean squared gradient by parameter name, bias-corrected: v / (1 − β2^t), float32.

    Args:
        model: The trained model.
        state: The optimizer's state by parameter number, with whole tensors.
        decay: β2.

    Source: Kingma & Ba, Adam: a method for stochastic optimization, arXiv:1412.6980, §3.
    """
    with_decay, without = _grouped(model)
    return {
        name: (state[number]["exp_avg_sq"].double() / (1 - decay ** float(state[number]["step"]))).float()
        for number, name in enumerate([*with_decay, *without])
        if number in state
    }


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings, steps: int, taken: int = 0) -> LRScheduler:
    """transformers' schedule over ``steps``, of which some are ``taken`` already; or FINCH's, which follows the loss.

    Its warm-up is 1/(W+1) ... W/(W+1) of the peak instead of 0 ... (W-1)/W.
    The library's first step has learning rate 0: it would train nothing, and a group of one step nothing at all. From
    step W = ceil(warmup_ratio * steps) on the two are equal.
    """
    options = {"min_lr_rate": settings.min_lr_ratio} if settings.scheduler == "cosine_with_min_lr" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stepping the schedule before the optimizer is meant here
        schedule: LRScheduler
        if settings.scheduler == "finch":
            rate = settings.learning_rate
            schedule = Finch(optimizer, rate, settings.max_lr_ratio * rate)
        else:
            schedule = get_scheduler(
                settings.scheduler,
                optimizer,
                num_warmup_steps=math.ceil(settings.warmup_ratio * steps) + 1,
                num_training_steps=steps + 1,
                scheduler_specific_kwargs=options,
            )
        for _ in range(1 + taken):
            schedule.step()
    return schedule
