"""Optimizers and schedules against PyTorch's and transformers' own."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import Adafactor, get_scheduler

from merit.recipe.schema import TrainSettings
from merit.train.optimizers import make_optimizer, make_schedule


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    made[0].weight.requires_grad_(True)
    return made


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("steps", "warmup"), [(40, 0.1), (7, 0.0), (1, 0.5)])
def test_schedule_is_the_librarys_with_a_warm_up_above_zero(name: str, steps: int, warmup: float) -> None:
    settings = TrainSettings(scheduler=name, warmup_ratio=warmup, learning_rate=0.5, min_lr_ratio=0.2)  # type: ignore[arg-type]
    optimizer = make_optimizer(model(), settings)
    schedule = make_schedule(optimizer, settings, steps)
    ours = []
    for _ in range(steps):
        ours.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    width = math.ceil(warmup * steps)
    reference = torch.optim.SGD(model().parameters(), lr=0.5)
    options: dict[str, Any] = {"min_lr_rate": 0.2} if name == "cosine_with_min_lr" else {}
    theirs = get_scheduler(name, reference, width, steps, scheduler_specific_kwargs=options)
    for step in range(steps):
        if step < width and name != "constant":
            assert ours[step] == pytest.approx(0.5 * (step + 1) / (width + 1))
        else:
            assert ours[step] == pytest.approx(theirs.get_last_lr()[0])
        reference.step()
        theirs.step()


def step(optimizer: torch.optim.Optimizer, made: torch.nn.Module) -> list[torch.Tensor]:
    for _ in range(3):
        optimizer.zero_grad()
        made(torch.tensor([[1.0, -2.0, 0.5]])).square().mul(torch.tensor([1.0, 3.0])).sum().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in made.parameters()]


@pytest.mark.parametrize(
    ("name", "options", "peer"),
    [
        (
            "adamw",
            {"betas": (0.8, 0.9), "epsilon": 1e-3},
            lambda g: torch.optim.AdamW(g, lr=0.1, betas=(0.8, 0.9), eps=1e-3),
        ),
        ("adamw_fused", {}, lambda g: torch.optim.AdamW(g, lr=0.1, fused=True)),
        ("adamw_torch", {}, lambda g: torch.optim.AdamW(g, lr=0.1)),
        ("sgd", {"momentum": 0.9}, lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9)),
        ("adafactor", {}, lambda g: Adafactor(g, lr=0.1, scale_parameter=False, relative_step=False)),
    ],
)
def test_optimizer_is_the_named_one_with_decay_on_weights_alone(name: str, options: dict[str, Any], peer: Any) -> None:
    ours, theirs = model(), model()
    settings = TrainSettings(optimizer=name, learning_rate=0.1, weight_decay=0.3, **options)  # type: ignore[arg-type]
    weight, *rest = theirs.parameters()
    found = step(make_optimizer(ours, settings), ours)
    expected = step(peer([{"params": [weight], "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]), theirs)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("name", "kind"), [("adamw_8bit", "AdamW8bit"), ("adamw_8bit_paged", "PagedAdamW8bit")])
def test_8bit_optimizers_are_those_of_bitsandbytes(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("bitsandbytes")
    fake.optim = ModuleType("optim")  # type: ignore[attr-defined]
    setattr(fake.optim, kind, lambda groups, **options: (groups, options))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    groups, options = make_optimizer(model(), TrainSettings(optimizer=name, weight_decay=0.1))  # type: ignore[arg-type, misc]
    assert options == {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
