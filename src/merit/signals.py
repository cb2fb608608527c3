"""One graceful stop for the whole package: what SIGTERM and Ctrl-C ask for, and where it is noticed.

Outside of :func:`graceful` a stop is an exception (:class:`Stop`), raised wherever the process is. Inside, it is a flag that
the loop at hand reads when it is ready; a second signal is an exception again.
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
    """SIGTERM, as it happens: like Ctrl-C no ``except Exception`` of a library takes it for an error of its own."""


class StopFlag:
    """Whether a stop was asked for.

    Attributes:
        asked: True from the first signal on.
    """

    asked = False


_asked: list[str] = []
_flags: list[StopFlag] = []


def stop_on_sigterm() -> None:
    """A command begins: from here on SIGTERM raises :class:`Stop`, and earlier stops are forgotten."""
    _asked.clear()
    signal.signal(signal.SIGTERM, _raise)


def _raise(number: int, _frame: FrameType | None) -> None:
    reason = f"stopped by {signal.Signals(number).name}"
    _asked.append(reason)
    raise Stop(reason)


def ignore_from_now_on() -> None:
    """All is done and said: a signal during the interpreter's end must not make a failure of it."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_if_asked() -> None:
    """Called wherever progress is reported: a stop that was lost in a destructor comes up here.

    Raises:
        Interrupted: A stop was asked for and got lost.
    """
    if _asked:
        raise Interrupted(_asked[0])


@contextlib.contextmanager
def graceful() -> Iterator[StopFlag]:
    """Inside, the first SIGTERM or SIGINT sets ``asked`` and nothing else; the second has its usual effect.

    Inside another block of its kind it yields that one's flag.
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
    """Processes that are started in here ignore Ctrl-C, which a terminal sends to all: their parent stops them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
