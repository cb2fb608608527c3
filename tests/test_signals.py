"""A stop is obeyed where it arrives, and where it got lost on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import typer
from typer.testing import CliRunner

from merit.cli import commands
from merit.errors import Interrupted, MeritError
from merit.report.terminal import Terminal
from merit.signals import Stop, deaf_to_interrupts, graceful, stop_if_asked, stop_on_sigterm

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Careless:
    """Python drops what is raised in a destructor."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop_on_sigterm()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    yield
    stop_on_sigterm()
    for number, handler in before.items():
        signal.signal(number, handler)


REPORTS: list[Callable[[Terminal], None]] = [
    lambda terminal: terminal.stage("x"),
    lambda terminal: terminal.say("x"),
    lambda terminal: terminal.note("x"),
    lambda terminal: stop_if_asked(),
]


@pytest.mark.parametrize("report", REPORTS)
def test_a_lost_stop_comes_up_at_the_next_report(report: Callable[[Terminal], None]) -> None:
    terminal = Terminal(quiet=True)
    report(terminal)
    with terminal.progress() as tick:
        tick(1, 2)
        Careless()
        with pytest.raises(Interrupted, match="SIGTERM"):
            tick(2, 2)
    with pytest.raises(Interrupted):
        report(terminal)
    stop_on_sigterm()
    report(terminal)


def test_no_library_takes_a_stop_for_its_own_error() -> None:
    assert not issubclass(Stop, Exception)
    assert issubclass(Stop, KeyboardInterrupt)
    assert not issubclass(Stop, MeritError)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_inside_graceful_the_first_signal_is_a_flag_and_the_second_a_stop(number: signal.Signals) -> None:
    with graceful() as flag:
        assert not flag.asked
        signal.raise_signal(number)
        assert flag.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


@pytest.mark.parametrize("lost", [False, True])
def test_sigterm_in_a_command_exits_with_75(lost: bool) -> None:
    app = typer.Typer(cls=commands.app.info.cls)

    @app.command()
    def work() -> None:
        if lost:
            Careless()
        else:
            try:
                signal.raise_signal(signal.SIGTERM)
            except Exception:
                raise AssertionError("taken for an error of a library") from None
        Terminal(quiet=True).stage("next")
        raise AssertionError("went on")

    @app.command()
    def other() -> None:
        """Two commands make a group."""

    result = CliRunner().invoke(app, ["work"])
    assert result.exit_code == 75, result.output
    assert "SIGTERM" in result.stderr


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_stop_after_the_last_word_fails_nothing() -> None:
    """Python gives signals their default effect while it shuts down, which with torch loaded takes a second."""
    done = run(
        "import atexit, os, signal, sys; import merit.cli; sys.argv = ['merit', '--version']\n"
        "for number in (signal.SIGTERM, signal.SIGINT): atexit.register(os.kill, os.getpid(), number)\n"
        "merit.cli.main()"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stop_while_libraries_load_says_so() -> None:
    """Fails on commit f5727a1 (B14): SIGTERM in the first second ended the command without a word."""
    words = [sys.executable, "-X", "importtime", "-m", "merit", "init"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as command:
        assert command.stderr is not None
        for line in command.stderr:
            if "typer" in line:
                command.send_signal(signal.SIGTERM)
                break
        said = [line for line in command.stderr.read().splitlines() if not line.startswith("import time")]
    assert command.returncode == 75
    assert said == ["merit: stopped by SIGTERM before anything was done."]


@pytest.mark.parametrize("method", ["make_context", "invoke"])
def test_a_stop_while_the_command_line_is_read_says_so(method: str) -> None:
    """Fails on commit 510c342: Typer made an exit code 130 of it, without a word."""
    done = run(
        "import signal, sys; import merit.cli; from merit.cli import commands; sys.argv = ['merit', 'schema']\n"
        f"commands._Commands.{method} = lambda *_, **__: signal.raise_signal(signal.SIGTERM)\n"
        "merit.cli.main()"
    )
    said = "merit: stopped by SIGTERM. Run the same command again to resume."
    assert (done.returncode, done.stderr.strip()) == (75, said)


def test_only_lost_stops_are_passed_over_silently() -> None:
    done = run(
        "import sys; import merit.cli as cli; from merit.signals import Stop; sys.argv = ['merit', '--version']\n"
        "class Lost:\n"
        "    def __init__(self, error): self.error = error\n"
        "    def __del__(self): raise self.error\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "Lost(Stop('stopped')); Lost(ValueError('of a library'))"
    )
    assert "of a library" in done.stderr
    assert "stopped" not in done.stderr


def test_processes_started_in_deaf_to_interrupts_ignore_them() -> None:
    words = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    codes = []
    for deaf in (True, False):
        with deaf_to_interrupts() if deaf else graceful():
            child = subprocess.Popen(words, **pipes)  # type: ignore[call-overload]
        assert child.stdout.readline() == "up\n"
        os.kill(child.pid, signal.SIGINT)
        child.communicate("")
        codes.append(child.returncode)
    assert codes[0] == 0
    assert codes[1] != 0
