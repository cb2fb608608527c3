"""A stop is obeyed where it arrives, and where it got lost on the way."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import typer
from typer.testing import CliRunner

from merit import cli
from merit.errors import Interrupted, MeritError
from merit.progress import Reporter, Stop, ask_to_stop, forget_stops, stop_if_asked


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    forget_stops()
    yield
    forget_stops()
    signal.signal(signal.SIGTERM, before)


def test_a_lost_stop_comes_up_at_the_next_report() -> None:
    reporter = Reporter(quiet=True)
    reporter.stage("mixture")
    with reporter.progress() as tick:
        tick(1, 2)
        ask_to_stop("stopped by SIGTERM")
        with pytest.raises(Interrupted, match="SIGTERM"):
            tick(2, 2)
    for report in (lambda: reporter.stage("x"), lambda: reporter.say("x"), lambda: reporter.note("x"), stop_if_asked):
        with pytest.raises(Interrupted):
            report()
    forget_stops()
    reporter.say("x")


def test_no_library_takes_a_stop_for_its_own_error() -> None:
    assert not issubclass(Stop, Exception)
    assert issubclass(Stop, KeyboardInterrupt)
    assert not issubclass(Stop, MeritError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("lost", [False, True])
def test_sigterm_in_a_command_exits_with_75(lost: bool) -> None:
    app = typer.Typer(cls=cli._Commands)

    class Careless:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    @app.command()
    def work() -> None:
        if lost:
            one = Careless()
            del one  # Python drops what is raised in here
        else:
            try:
                signal.raise_signal(signal.SIGTERM)
            except Exception:
                raise AssertionError("taken for an error of a library") from None
        Reporter(quiet=True).stage("next")
        raise AssertionError("went on")

    @app.command()
    def other() -> None:
        """Two commands make a group."""

    result = CliRunner().invoke(app, ["work"])
    assert result.exit_code == 75, result.output
    assert "stopped by SIGTERM" in result.stderr
    assert "Run the same command again" in result.stderr
