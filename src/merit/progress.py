"""How work reports its progress, and figures in the form a person reads. It prints nothing."""

from __future__ import annotations

from collections.abc import Callable

Tick = Callable[..., None]
"""Called as ``tick(done, total, label)`` by whatever does the work."""


def duration(seconds: float) -> str:
    """Seconds in the form a person reads: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes in the form a person reads: 812 B, 1.3 MiB, 14 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
