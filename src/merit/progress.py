"""Progress protocols, and human-readable figures. Nothing is printed here."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """Called by long-running work; implemented by whoever shows it. It may raise a stop that was requested."""

    def __call__(self, done: float, total: float, label: str = "", /) -> None:
        """``done`` of ``total`` units are finished; ``label`` names the current item."""


class Reporter(Protocol):
    """What a command tells the user while it runs; :class:`merit.report.terminal.Terminal` shows it."""

    def say(self, text: str, /) -> None:
        """One line."""

    def stage(self, name: str, detail: str = "", /) -> None:
        """A stage starts, or is already done."""

    def note(self, text: str, /) -> None:
        """Something worth knowing that is not an error."""

    def progress(self, unit: str = "", /) -> AbstractContextManager[Progress]:
        """Progress of the work in the block."""
        ...


def silent(done: float, total: float, label: str = "", /) -> None:
    """Progress that is ignored."""


class Silent:
    """A reporter that says nothing."""

    def say(self, _text: str, /) -> None:
        """Nothing."""

    def stage(self, _name: str, _detail: str = "", /) -> None:
        """Nothing."""

    def note(self, _text: str, /) -> None:
        """Nothing."""

    def progress(self, _unit: str = "", /) -> AbstractContextManager[Progress]:
        """Progress that is ignored."""
        return nullcontext(silent)


def count(number: float, noun: str, plural: str = "") -> str:
    """A number with its noun: ``1 row``, ``1,200 rows``, ``2 branches``; ``plural`` where neither -s nor -es makes it."""
    if number == 1:
        return f"1 {noun}"
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {plural or noun + ('es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's')}"


def duration(seconds: float) -> str:
    """Human-readable seconds: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(number: float) -> str:
    """Human-readable bytes, in powers of 1000 like disks and files: 812 B, 1.3 MB, 14 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
