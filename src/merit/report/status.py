"""`merit status` on the terminal: one row per stage, once or repeatedly."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from merit.progress import duration, size
from merit.run.status import Status

_COLOURS = {
    "done": "green",
    "stale": "red",
    "damaged": "red",
    "running": "cyan",
    "partial": "yellow",
    "missing": "dim",
}


def render(status: Status) -> list[RenderableType]:
    """The status as a table."""
    state = " (running)" if status.running else ""
    title = escape(f"{status.name}: {status.run}{state}")
    table = Table("stage", "state", "time", "size", "", title=title, title_justify="left")
    for row in status.stages:
        taken = duration(row.seconds) if row.seconds is not None else ""
        what = "; ".join(row.changed) if row.changed else row.detail
        state = f"[{_COLOURS[row.state]}]{row.state}[/]"
        table.add_row(row.stage, state, taken, size(row.bytes) if row.bytes else "", escape(what))
    return [table]


def watch(look: Callable[[], Status]) -> None:
    """Refresh the status every two seconds, until interrupted or until all is done and nothing is running."""
    with Live(refresh_per_second=4, transient=False) as live:
        while True:
            status = look()
            live.update(Group(*render(status)))
            if not status.running and all(row.state == "done" for row in status.stages):
                return
            time.sleep(2)
