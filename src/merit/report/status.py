"""`merit status` on the terminal: one row per stage, once or repeatedly."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from merit.progress import duration, size
from merit.run.status import Row, Status

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


def render_branches(branches: Sequence[Row], now: float) -> RenderableType:
    """Every branch with its figures, wherever it runs.

    Args:
        branches: Their rows.
        now: Unix time (seconds).
    """
    table = Table("branch", "state", "step", "loss", "tokens/s", "time left", "machine", "last sign of life")
    for row in branches:
        table.add_row(row.stage, f"[{_COLOURS[row.state]}]{row.state}[/]", *map(escape, _figures(row, now)))
    return table


def _figures(row: Row, now: float) -> tuple[str, ...]:
    live = row.live
    if live is None:
        return ("", "", "", "", "", row.finished or "")
    loss = "" if live.loss is None else f"{live.loss:.4f}"
    speed = "" if live.tokens_per_second is None else f"{live.tokens_per_second:,.0f}"
    left = "" if live.seconds_left is None or row.state != "running" else duration(live.seconds_left)
    ago = f"{duration(max(0.0, now - live.seen))} ago"
    return (f"{live.step:,} of {live.steps:,}", loss, speed, left, live.machine, ago)


def watch(look: Callable[[], Status], console: Console | None = None) -> None:
    """Refresh the status every two seconds, until interrupted or until all is done and nothing is running.

    Without a terminal it prints a line for each branch whose state changed, and every half minute one for each that runs.

    Args:
        look: Gives the status.
        console: Where it is shown; default: standard output.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    told: dict[str, tuple[str, float]] = {}
    shown = Live(console=console, refresh_per_second=4) if console.is_terminal else contextlib.nullcontext()
    with shown as live:
        while True:
            status, now = look(), time.time()
            branches = [row for row in status.stages if row.kind == "branch"]
            if live is not None:
                live.update(
                    Group(*render(status), *([render_branches(branches, now)] if branches else [])), refresh=True
                )
            else:
                for row in branches:
                    state, at = told.get(row.stage, ("", 0.0))
                    if row.state != state or (row.state == "running" and now - at >= _LINE_SECONDS):
                        told[row.stage] = row.state, now
                        console.print(_line(row, now), markup=False)
            if not status.running and all(row.state == "done" for row in status.stages):
                return
            time.sleep(2)


_LINE_SECONDS = 30.0


def _line(row: Row, now: float) -> str:
    step, loss, speed, left, machine, seen = _figures(row, now)
    told = f" ({row.detail})" if row.state == "partial" and row.detail else ""
    parts = [f"{row.stage}: {row.state}{told}", f"step {step}" if step else "", f"loss {loss}" if loss else ""]
    parts += [f"{speed} target tokens/s" if speed else "", f"{left} left" if left else "", machine]
    return ", ".join(part for part in [*parts, f"last seen {seen}" if row.live else ""] if part)
