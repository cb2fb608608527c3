"""A stop is obeyed where it arrives, and where it got lost on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from merit import cli
from merit.errors import Interrupted, MeritError
from merit.report.terminal import Reporter
from merit.signals import Stop, ask_to_stop, forget_stops, stop_if_asked


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


def test_a_stop_after_the_last_word_fails_nothing() -> None:
    """Python gives signals their default effect while it shuts down, which with torch loaded takes a second."""
    code = (
        "import atexit, os, signal, sys; import merit.cli; sys.argv = ['merit', '--version']\n"
        "for number in (signal.SIGTERM, signal.SIGINT): atexit.register(os.kill, os.getpid(), number)\n"
        "merit.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_only_lost_stops_are_passed_over_in_silence() -> None:
    code = (
        "import sys; from merit import cli; from merit.signals import Stop; sys.unraisablehook = cli._quiet_about_stops\n"
        "class Lost:\n"
        "    def __init__(self, error): self.error = error\n"
        "    def __del__(self): raise self.error\n"
        "Lost(Stop('stopped')); Lost(ValueError('of a library'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "of a library" in done.stderr
    assert "stopped" not in done.stderr


def _write_late(path: str) -> None:
    Path(path).with_suffix(".begun").touch()
    time.sleep(4)
    Path(path).write_text("waited for")


def test_a_stop_does_not_wait_for_the_workers_datasets(tmp_path: Path) -> None:
    """Workers that are in the middle of a dataset are stopped; Ctrl-C in a terminal reaches only the parent."""
    import torch

    from merit.conflict.stage import _deaf_to_interrupts, _pool

    late = tmp_path / "late"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _pool(str, torch.device("cpu"), None, None, 1) as pool:  # type: ignore[arg-type]
        with _deaf_to_interrupts():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            worker = pool.submit(os.getpid).result()
        assert signal.getsignal(signal.SIGINT) == before
        os.kill(worker, signal.SIGINT)  # ignored
        assert pool.submit(os.getpid).result() == worker
        pool.submit(_write_late, str(late))
        while not late.with_suffix(".begun").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert not late.exists()
    assert not psutil.pid_exists(worker)
