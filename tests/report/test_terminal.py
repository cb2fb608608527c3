"""Progress says how much time is left only when it can know."""

from __future__ import annotations

import pytest

from merit.report import terminal
from merit.report.terminal import Eta, Terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_no_time_is_named_before_it_is_known(clock: list[float]) -> None:
    """On commit f5727a1 the first line of a run of three minutes says 98 minutes."""
    eta = Eta()
    assert eta(0, 100) == ""
    clock[0] += 30  # loading the model: nothing is done yet
    assert eta(0.5, 100) == ""
    clock[0] += 10
    assert eta(5, 100) == "about 12 min 40 s left"  # 5 % in 40 s


def test_time_left_follows_the_rate_since_work_began(clock: list[float]) -> None:
    eta = Eta()
    eta(10, 100)
    clock[0] += 20
    assert eta(50, 100) == "about 25 s left"


def test_time_left_falls_between_two_gains_and_is_silent_when_it_was_wrong(clock: list[float]) -> None:
    """A cluster's task that ends in few large steps: on the version before, the time left rose while one went on."""
    eta = Eta()
    eta(0, 4)
    clock[0] += 30
    assert eta(1, 4) == "about 90 s left"
    clock[0] += 20
    assert eta(1, 4) == "about 70 s left"
    clock[0] += 80
    assert eta(1, 4) == ""
    assert eta(2, 4) == "about 2 min 10 s left"


def test_a_second_pass_begins_anew(clock: list[float]) -> None:
    eta = Eta()
    eta(0, 10)
    clock[0] += 20
    assert eta(8, 10)
    assert eta(1, 10) == ""


def test_lines_for_logs_come_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal().progress("datasets") as tick:
        tick(1, 4, "a")
        clock[0] += 11
        tick(2, 4, "b")
        clock[0] += 5
        tick(3, 4, "c")
    assert capsys.readouterr().err.splitlines() == ["  datasets 50%, about 22 s left, b"]
