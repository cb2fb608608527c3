"""What a person sees while a run goes on: stage lines, progress with an ETA, notes. All of it goes to stderr.

It renders; it computes no result and knows no stage. Tables of results are printed by the command line, on stdout.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from merit.progress import Progress, duration
from merit.signals import stop_if_asked

_EVERY = 10.0  # seconds between progress lines where stderr is no terminal


class Reporter:
    """Stage lines and progress bars; silent when ``quiet``. Whatever is reported, a stop that was asked for comes first.

    Args:
        quiet: Say nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str, style: str | None = None) -> None:
        """One line."""
        stop_if_asked()
        self.console.print(text, style=style, markup=False)

    def stage(self, name: str, detail: str = "") -> None:
        """A stage begins."""
        stop_if_asked()
        from rich.text import Text

        self.console.print(Text.assemble((f"▸ {name}", "bold"), f"  {detail}" if detail else ""))

    def note(self, text: str) -> None:
        """Something to know that is no error."""
        self.say(f"  note: {text}", style="yellow")

    @contextlib.contextmanager
    def progress(self, unit: str = "") -> Iterator[Progress]:
        """A progress bar with an ETA (lines every ten seconds where stderr is no terminal)."""
        if self.quiet:
            yield lambda _done, _total, _label="", /: stop_if_asked()
        elif self.console.is_terminal:
            with self._bar(unit) as tick:
                yield tick
        else:
            yield _LinePrinter(unit)

    @contextlib.contextmanager
    def _bar(self, unit: str) -> Iterator[Progress]:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(unit, total=None)

            def tick(done: float, total: float, label: str = "", /) -> None:
                stop_if_asked()
                bar.update(task, completed=done, total=total, description=f"{unit} {label}".strip()[:60].ljust(24))

            yield tick


class _LinePrinter:
    """Progress for logs: one line every ten seconds, none for what is over sooner."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.started = self.last = time.monotonic()

    def __call__(self, done: float, total: float, label: str = "", /) -> None:
        stop_if_asked()
        now = time.monotonic()
        if now - self.last < _EVERY or not done:
            return
        self.last = now
        left = (now - self.started) * (total - done) / done
        share = f"{done / total:.0%}" if total else ""
        print(f"  {self.unit} {share}, about {duration(left)} left  {label}".rstrip(), file=sys.stderr, flush=True)
