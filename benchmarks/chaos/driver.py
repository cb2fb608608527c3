"""A `merit` command as a process of its own that needs no start-up: forked from one that has the libraries loaded.

It is a real process with its own session, signals and exit code; only the seconds of importing are saved. Workers and tasks
of a cluster are started as always.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

_STOPS = (signal.SIGTERM, signal.SIGINT)
_LIBRARIES = ("torch", "transformers.models.llama.modeling_llama", "peft", "accelerate", "datasets", "merit.run.chain")


def load_libraries() -> None:
    """Import what commands need, once."""
    for name in (*_LIBRARIES, "merit.cli.commands", "merit.report.run", "merit.evaluation.stage"):
        importlib.import_module(name)


class Driver:
    """A command that runs.

    Args:
        words: Of the command.
        log: Its stdout and stderr are appended here.
        environment: Added to this process's.
    """

    def __init__(self, words: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # a command that has begun to start is one that can be stopped
        self.pid = os.fork()
        self._code: int | None = None
        if not self.pid:
            _become(words, log, environment or {})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def code(self) -> int | None:
        """Its exit code, below 0 for a signal; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def until(self, there: Callable[[], bool], seconds: float = 900.0, every: float = 0.003) -> bool:
        """Wait for something, asked for ``every`` so many seconds; False if the command ended before."""
        until = time.monotonic() + seconds
        while self.code() is None and time.monotonic() < until:
            if there():
                return True
            time.sleep(every)
        return False

    def wait(self, seconds: float) -> int:
        """Wait for its end; killed after ``seconds``."""
        if self.until(lambda: False, seconds) or self.code() is None:
            self.send(signal.SIGKILL)
            self.until(lambda: False)
            return -99
        code = self.code()
        assert code is not None
        return code

    def send(self, number: int) -> None:
        """Send it a signal."""
        if self.code() is None:
            os.kill(self.pid, number)

    def close(self) -> None:
        """End it."""
        self.send(signal.SIGKILL)
        self.until(lambda: False)


def _become(words: list[str], log: Path, environment: dict[str, str]) -> None:
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
        for number in _STOPS:
            signal.signal(number, signal.default_int_handler)
        os.environ.update(environment)
        sys.argv = ["merit", *words]
        cli = importlib.import_module("merit.cli")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        cli.main()
        code = 0
    except KeyboardInterrupt:
        code = 75
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1 if error.code else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
