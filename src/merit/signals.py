"""Graceful stopping for the whole package: how SIGTERM and Ctrl-C are handled.

Outside of :func:`graceful` a stop is an exception (:class:`Stop`), raised wherever the process is. Inside, it is a flag that
the current loop reads when it is ready; a second signal is an exception again.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from merit.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop(KeyboardInterrupt):
    """SIGTERM as an exception; like Ctrl-C, it is not caught by a library's ``except Exception``."""


class StopFlag:
    """Whether a stop was requested.

    Attributes:
        asked: True from the first signal on.
    """

    asked = False


_asked: list[str] = []
_flags: list[StopFlag] = []


def stop_on_sigterm() -> None:
    """Called when a command starts: from here on SIGTERM raises :class:`Stop`, and earlier stops are forgotten."""
    _asked.clear()
    signal.signal(signal.SIGTERM, _raise)


def _raise(number: int, _frame: FrameType | None) -> None:
    reason = f"stopped by {signal.Signals(number).name}"
    _asked.append(reason)
    raise Stop(reason)


def ignore_from_now_on() -> None:
    """Called when all is done: a signal during interpreter shutdown must not turn success into failure."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_if_asked() -> None:
    """Called wherever progress is reported: raises a stop that was lost in a destructor.

    Raises:
        Interrupted: A stop was requested and lost.
    """
    if _asked:
        raise Interrupted(_asked[0])


@contextlib.contextmanager
def graceful() -> Iterator[StopFlag]:
    """Inside the block the first SIGTERM or SIGINT only sets ``asked``; the second has its usual effect.

    Nested inside another such block it yields the outer flag.
    """
    if _flags or threading.current_thread() is not threading.main_thread():
        yield _flags[-1] if _flags else StopFlag()
        return
    flag = StopFlag()
    _flags.append(flag)
    previous = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def ask(_number: int, _frame: FrameType | None) -> None:
        flag.asked = True
        restore()

    for number in _SIGNALS:
        signal.signal(number, ask)
    try:
        yield flag
    finally:
        _flags.clear()
        restore()


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes started in this block ignore Ctrl-C, which a terminal sends to all of them: their parent stops them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
