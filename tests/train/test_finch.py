"""FINCH's schedule against a plain restatement of it, and inside a branch: what it trains with, and after a cut."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.train import cases
from tests.train.cases import assert_same_bits, log_rows, train_elsewhere, weights
from tests.train.test_processes import train_together

from merit.train.finch import Finch

SETTINGS = ("train.scheduler=finch", "train.max_lr_ratio=0.6", "train.learning_rate=1e-3")


def rates(losses: list[float], rate: float, highest: float) -> list[float]:
    """η = min(η_base / √L̄, η_max), L̄ = 0.9 L̄ + 0.1 L, from the first loss on (arXiv 2605.20005)."""
    average, found = losses[0], []
    for number, loss in enumerate(losses):
        average = loss if number == 0 else 0.9 * average + 0.1 * loss
        found.append(min(rate / math.sqrt(average), highest))
    return found


def beside(folder: Path, base: Path) -> Path:
    """Another root with the same base."""
    (folder / "other").mkdir()
    (folder / "other" / "base").symlink_to(base)
    return folder / "other"


@given(st.lists(st.floats(0.01, 30), min_size=1, max_size=20))
def test_rates_follow_the_loss(losses: list[float]) -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimizer = torch.optim.SGD(groups, lr=0.2)
    schedule = Finch(optimizer, 0.2, 0.5)
    found = []
    for loss in losses:
        schedule.observe(loss)
        assert {group["lr"] for group in optimizer.param_groups} == set(schedule.get_last_lr())
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(rates(losses, 0.2, 0.5))


def test_a_branch_trains_with_them(root: Path) -> None:
    cases.train(root, *SETTINGS)
    rows = log_rows(root)
    assert [row["learning_rate"] for row in rows] == pytest.approx(
        rates([row["loss"] for row in rows], 1e-3, 6e-4), rel=1e-6
    )
    assert len({row["learning_rate"] for row in rows}) > 5  # not at the highest throughout


def test_a_killed_branch_resumes_to_the_same_bits(root: Path, base: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, "train.checkpoint_steps=2")
    words = [word for item in settings for word in ("--set", item)]
    whole = beside(tmp_path, base)
    cases.train(whole, *settings)
    assert train_elsewhere(root, *words, "--kill-after-step", "5") == -signal.SIGKILL
    assert cases.train(root, *settings).resumed_from == (4,)
    assert_same_bits(weights(whole), weights(root))
    assert [row["learning_rate"] for row in log_rows(root)] == [row["learning_rate"] for row in log_rows(whole)]


def test_all_processes_see_the_whole_steps_loss(root: Path, base: Path, tmp_path: Path) -> None:
    words = [word for item in SETTINGS for word in ("--set", item)]
    assert train_together(root, *words) == [0, 0]
    one = beside(tmp_path, base)
    cases.train(one, *SETTINGS, "train.batch_size=5")
    alone, together = ([row["learning_rate"] for row in log_rows(folder)] for folder in (one, root))
    assert together == pytest.approx(alone, rel=1e-4)


def test_later_rounds_go_on_from_the_recipes_rate() -> None:
    """An optimizer that comes from a round before holds the rate of its last step; the schedule does not build on it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    Finch(optimizer, 0.2, 1.0).observe(100.0)
    carried = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    carried.load_state_dict(optimizer.state_dict())
    again = Finch(carried, 0.2, 1.0)
    again.observe(4.0)
    assert carried.param_groups[0]["lr"] == pytest.approx(0.1)
