"""What the user sees while a command runs: stage lines, progress with an ETA, notes. All of it goes to stderr.

It only displays. Results are printed on stdout (:mod:`merit.report`).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from merit.progress import Progress, duration
from merit.signals import stop_if_asked

_EVERY = 10.0  # seconds between progress lines if stderr is not a terminal
_KNOWN_AFTER, _KNOWN_SHARE = 6.0, 0.04  # an ETA is unreliable before this many seconds and this share of the work


class Terminal:
    """Stage lines and progress bars; silent if ``quiet``. Every report first raises a stop that was requested.

    Args:
        quiet: Print nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str, /, style: str | None = None) -> None:
        """One line."""
        stop_if_asked()
        self.console.print(text, style=style, markup=False)

    def stage(self, name: str, detail: str = "", /) -> None:
        """A stage starts, or is already done."""
        stop_if_asked()
        self.console.print(Text.assemble((f"▸ {name}", "bold"), f"  {detail}" if detail else ""))

    def note(self, text: str, /) -> None:
        """Something worth knowing that is not an error."""
        self.say(f"  note: {text}", style="yellow")

    @contextlib.contextmanager
    def progress(self, unit: str = "", /) -> Iterator[Progress]:
        """A progress bar with an ETA (lines every ten seconds if stderr is not a terminal)."""
        if self.quiet:
            yield lambda _done, _total, _label="", /: stop_if_asked()
        elif self.console.is_terminal:
            with self._bar(unit) as tick:
                yield tick
        else:
            yield _Lines(unit)

    @contextlib.contextmanager
    def _bar(self, unit: str) -> Iterator[Progress]:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        eta = Eta()
        with Bar(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(unit, total=None, left="")

            def tick(done: float, total: float, label: str = "", /) -> None:
                stop_if_asked()
                text = f"{unit} {label}".strip()[:60].ljust(24)
                bar.update(task, completed=done, total=total, description=text, left=eta(done, total))

            yield tick


class Output(Console):
    """Standard output: a reader that has seen enough (such as head) is the command line's business, not rich's."""

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles the error."""
        raise BrokenPipeError


class Eta:
    """Time left, from the rate up to the last gain, less the time since; empty while or as soon as that is unreliable.

    So the time left of a task that ends in a few large steps falls between them.
    """

    def __init__(self) -> None:
        self._began: tuple[float, float] | None = None
        self._done = self._gained = 0.0

    def __call__(self, done: float, total: float) -> str:
        """``about 40 s left``, or an empty string."""
        now = time.monotonic()
        again = done < self._done
        if done > self._done:
            self._gained = now
        self._done = done
        if self._began is None or again:
            self._began, self._gained = (now, done), now
            return ""
        elapsed, gained = self._gained - self._began[0], done - self._began[1]
        if elapsed < _KNOWN_AFTER or gained < _KNOWN_SHARE * total:
            return ""
        left = elapsed * (total - done) / gained - (now - self._gained)
        return f"about {duration(left)} left" if left > 0 or done == total else ""


class _Lines:
    """Progress for logs: one line every ten seconds, none for anything shorter."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._last = time.monotonic()
        self._eta = Eta()

    def __call__(self, done: float, total: float, label: str = "", /) -> None:
        stop_if_asked()
        left = self._eta(done, total)
        now = time.monotonic()
        if now - self._last < _EVERY or not done:
            return
        self._last = now
        parts = [f"{self._unit} {done / total:.0%}" if total else self._unit, left, label]
        print(f"  {', '.join(part for part in parts if part)}", file=sys.stderr, flush=True)
