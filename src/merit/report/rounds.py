"""The table of a run's rounds: what each merged, what it moved, and what was missing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table

from merit.progress import duration, size
from merit.run.round_stages import RoundLine


def table(lines: Sequence[RoundLine], title: str) -> list[RenderableType]:
    """The rounds as a table, with the sum of what moved; nothing for a run of one round."""
    if not lines:
        return []
    shown = Table(
        "round", "merged", "to the merge", "to the branches", "time", "missing", title=title, title_justify="left"
    )
    for line in lines:
        missing = ", ".join(map(str, line.missing))
        moved = [size(count) if count else "" for count in (line.bytes_in, line.bytes_out)]
        shown.add_row(str(line.number), str(line.merged), *moved, duration(line.seconds), missing)
    total = [size(sum(line.bytes_in for line in lines)), size(sum(line.bytes_out for line in lines))]
    shown.add_row("all", "", *total, duration(sum(line.seconds for line in lines)), "", style="bold")
    return [shown]
