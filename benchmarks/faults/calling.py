"""A `merit` command in this process: how it ended, and what it said."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 60
"""CPU seconds after which a command counts as hanging: other work on the machine must not make it one."""
_WAITING = 30
"""A command that waits without computing is given this many times as long."""


def settle() -> None:
    """One thread, no network, no colours; before torch is imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ.update(
        TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", COLUMNS="100", NO_COLOR="1"
    )


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        code: Exit code; 1 where an exception escaped, -1 where it took longer.
        out: What it printed on stdout.
        err: What it printed on stderr; the traceback where there was one.
    """

    code: int
    out: str
    err: str


class _Hang(BaseException):
    pass


def _late(_number: int, _frame: object) -> None:
    raise _Hang


def limited(work: Callable[[], Any], limit: int = LIMIT) -> Outcome:
    """Call ``work``; a MeritError is exit code 2, any other exception 1."""
    from merit.errors import MeritError

    before = {number: signal.signal(number, _late) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, limit)
    signal.setitimer(signal.ITIMER_REAL, _WAITING * limit)
    try:
        work()
    except MeritError as error:
        return Outcome(error.exit_code, "", str(error))
    except _Hang:
        return Outcome(-1, "", traceback.format_exc(limit=-6))
    except (Exception, SystemExit, KeyboardInterrupt):
        return Outcome(1, "", traceback.format_exc(limit=-6))
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    return Outcome(0, "", "")


def command(*words: object, limit: int = LIMIT) -> Outcome:
    """Run a `merit` command, or with ``-m`` a module that a launcher starts."""
    if words[0] == "-m":
        return _module(*map(str, words[1:]), limit=limit)
    from typer.testing import CliRunner

    from merit.cli.commands import app

    result: Any = None

    def invoke() -> None:
        nonlocal result
        result = CliRunner().invoke(app, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception

    found = limited(invoke, limit)
    if found.code in (1, -1):
        return found
    return Outcome(result.exit_code, result.stdout, result.stderr)


def _module(name: str, *words: str, limit: int) -> Outcome:
    from merit.launch import one
    from merit.run import worker

    code, files = 0, list(map(Path, words))

    def invoke() -> None:
        nonlocal code
        code = one.main(*files) if name == one.__name__ else worker.run_job(lambda: worker.train(files[0]), files[1])

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = limited(invoke, limit)
    if found.code in (1, -1):
        return found
    return Outcome(found.code or code, out.getvalue(), err.getvalue() + found.err)
