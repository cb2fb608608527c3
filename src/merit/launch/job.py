"""What every launcher runs: a command with its files, how far it has got, and how its crash is told. It starts nothing."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from merit.errors import MeritError
from merit.files import read_sealed, write_json, write_sealed
from merit.progress import Progress

_TAIL_CHARACTERS = 4000


class Launcher(Protocol):
    """A place where commands run."""

    @property
    def side_by_side(self) -> int | None:
        """How many commands it runs at once, among which branches are shared out.

        None: each branch is a command of its own, and the place decides.
        """

    def run(self, jobs: Sequence[BranchJob], progress: Progress) -> None:
        """Run the commands to their end.

        Args:
            jobs: The commands.
            progress: Called a few times a second with (work done, total work, a short text).

        Raises:
            UserError: A command ended with an error that the user can fix: that error.
            BranchCrashed: A command ended in another way; the message has the end of its log.
            Interrupted: Stopped from outside; the commands have written checkpoints, or go on elsewhere.
        """


class BranchCrashed(MeritError):
    """A branch's process crashed through no fault of the user: its traceback is in the message."""


class BranchKilled(BranchCrashed):
    """A branch's process was killed from outside (no memory, a lost machine): started again, it goes on where it was."""


@dataclass(frozen=True)
class BranchJob:
    """One command to run.

    Attributes:
        name: Display name.
        argv: The command.
        log_path: Its stdout and stderr are appended here.
        outcome_path: Where it writes its outcome.
        work: How long it will take, in any unit (target tokens); the longest is started first.
        progress_paths: Files that it writes with :class:`ProgressFile`, one per branch that it trains.
        threads: CPU threads of each of its processes.
        processes: How many processes work on it together; they find each other as torchrun's do (RANK, WORLD_SIZE ...).
        unit: What it is one of, in progress.
        fingerprint: Of what it is to make: a command that is still queued elsewhere is only waited for if it makes the same.
    """

    name: str
    argv: Sequence[str]
    log_path: Path
    outcome_path: Path
    work: float = 0
    progress_paths: Sequence[Path] = ()
    threads: int = 1
    processes: int = 1
    fingerprint: str = ""
    unit: str = "branches"

    def save(self, path: Path) -> None:
        """Write it."""
        write_sealed(path, json.loads(json.dumps(asdict(self), default=str)))

    @classmethod
    def load(cls, path: Path) -> BranchJob:
        """Read it.

        Raises:
            RunFolderError: It is missing or damaged.
        """
        return read_sealed(path, cls)

    @property
    def branches(self) -> int:
        """How many branches it trains."""
        return len(self.progress_paths) or 1


_KNOWN_AFTER, _KNOWN_SHARE = 6.0, 0.04
"""Seconds and share of the steps before the time left is told, as on the terminal."""


class ProgressFile:
    """Writes progress to a small JSON file at most once a second, and at the last step.

    Call it as ``(step, steps, facts)``; the file has step, steps, loss, learning_rate and tokens_per_second (those
    given in the facts), the seconds left at the rate since this process began, the machine's name, and the Unix time of
    writing (seconds).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written = -float("inf")
        self._first: tuple[float, int] | None = None

    def __call__(self, step: int, steps: int, facts: Mapping[str, Any]) -> None:
        """Record the progress."""
        now = time.monotonic()
        began, first = self._first = self._first or (now, step)
        if now - self._written < 1 and step < steps:
            return
        self._written = now
        shown = {key: facts[key] for key in ("loss", "learning_rate", "tokens_per_second") if key in facts}
        if now - began >= _KNOWN_AFTER and step - first >= _KNOWN_SHARE * steps:  # before, a rate says little
            shown["seconds_left"] = round((now - began) / (step - first) * (steps - step), 1)
        content = {
            "step": step,
            "steps": steps,
            **shown,
            "machine": socket.gethostname(),
            "time": round(time.time(), 3),
        }
        write_json(self.path, content, durable=False)


def read_progress(path: Path) -> dict[str, Any] | None:
    """The content of a :class:`ProgressFile`, or None if there is none (yet)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["steps"] > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def progress_of(
    jobs: Sequence[BranchJob], ended: Sequence[BranchJob], running: Sequence[BranchJob], begun: float
) -> tuple[float, float, str]:
    """Work done (whole commands, plus each running one's share of steps), total work, and branches (or tasks) done as text.

    Args:
        jobs: All commands, of one unit.
        ended: Those that are done.
        running: Those under way.
        begun: Unix time (seconds); progress files from before it are of an earlier attempt.
    """
    work = sum(job.work for job in ended)
    branches = sum(job.branches for job in ended)
    speed = 0.0
    for job in running:
        found = [read_progress(path) for path in job.progress_paths]
        fresh = [item for item in found if item and item["time"] >= begun]
        shares = [item["step"] / item["steps"] for item in fresh]
        work += job.work * sum(shares) / max(1, len(found))
        branches += sum(share == 1 for share in shares)
        if fresh:
            speed += max(fresh, key=lambda item: item["time"]).get("tokens_per_second") or 0.0
    text = f"{branches} of {sum(job.branches for job in jobs)} {jobs[0].unit} done"
    text += f", {speed:,.0f} target tokens/s" if speed else ""
    return work, sum(job.work for job in jobs), text


def crash(job: BranchJob, code: int, log_start: int = 0) -> BranchCrashed:
    """The error for a command that ended by itself in a way that the user cannot fix.

    Args:
        job: The command.
        code: Its exit code; below 0 the signal that killed it.
        log_start: First byte of its log that it wrote.
    """
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        how += " (often: out of memory; fewer --jobs, a smaller train.micro_batch_size)"
    kind = BranchKilled if code < 0 else BranchCrashed
    return kind(f"branch {job.name} ended with {how}.\n{log_end(job, log_start)}")


def log_end(job: BranchJob, log_start: int = 0) -> str:
    """Where a command's output is, and the end of it."""
    try:
        with job.log_path.open("rb") as log:
            log.seek(log_start)
            text = log.read().decode("utf-8", "replace").strip()
    except OSError:
        text = "(none)"
    return f"The whole output: {job.log_path}; its end:\n{text[-_TAIL_CHARACTERS:]}"
