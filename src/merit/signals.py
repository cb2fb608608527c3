"""One graceful stop for the whole package: what SIGTERM and Ctrl-C ask for, and where it is noticed."""

from __future__ import annotations

from merit.errors import Interrupted


class Stop(KeyboardInterrupt):
    """SIGTERM, as it happens: like Ctrl-C no ``except Exception`` of a library takes it for an error of its own."""


_asked: list[str] = []


def ask_to_stop(reason: str) -> None:
    """Remember that a stop was asked for, should the exception get lost (in a destructor, say)."""
    _asked.append(reason)


def forget_stops() -> None:
    """A new command begins."""
    _asked.clear()


def stop_if_asked() -> None:
    """Called wherever something is reported.

    Raises:
        Interrupted: A stop was asked for and got lost.
    """
    if _asked:
        raise Interrupted(_asked[0])
