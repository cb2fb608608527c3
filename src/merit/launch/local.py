"""Run branches side by side on this machine, each in a process of its own.

It starts commands, watches them and passes signals on; what the commands do is theirs. It neither retries a command nor
reads its results. The one channel back while it runs is the small file of :class:`ProgressFile`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from merit.errors import Interrupted, MeritError, UserError
from merit.files import write_json

_POLL_SECONDS = 0.2
_TAIL_CHARACTERS = 4000


class BranchCrashed(MeritError):
    """A branch's process ended in a way that is not the user's doing: its traceback is in the message."""


@dataclass(frozen=True)
class BranchJob:
    """One command to run.

    Attributes:
        name: As people say it.
        argv: The command.
        log_path: Its stdout and stderr are appended here.
        work: How long it will take, in any unit (target tokens); the longest is started first.
        progress_paths: Files that it writes with :class:`ProgressFile`, one per branch that it trains.
    """

    name: str
    argv: Sequence[str]
    log_path: Path
    work: float = 0
    progress_paths: Sequence[Path] = ()


class ProgressFile:
    """Writes progress to a small JSON file at most once a second, and at the last step.

    Call it as ``(step, steps, facts)``; the file holds step, steps, loss, learning_rate and tokens_per_second (those that
    are among the facts) and the Unix time of writing (seconds).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written = -float("inf")

    def __call__(self, step: int, steps: int, facts: Mapping[str, Any]) -> None:
        """Note the progress."""
        now = time.monotonic()
        if now - self._written < 1 and step < steps:
            return
        self._written = now
        shown = {key: facts[key] for key in ("loss", "learning_rate", "tokens_per_second") if key in facts}
        write_json(self.path, {"step": step, "steps": steps, **shown, "time": round(time.time(), 3)})


def read_progress(path: Path) -> dict[str, Any] | None:
    """What a :class:`ProgressFile` holds, or None where there is none (yet)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["steps"] > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_branches(
    jobs: Sequence[BranchJob], workers: int, progress: Callable[[float, float, str], None] | None = None
) -> None:
    """Run commands, at most ``workers`` at once, longest first, each with its share of the cores as OMP threads.

    When one fails, no other is started and those that run are told to stop (SIGTERM: they write a checkpoint first).
    SIGTERM and SIGINT to this process do the same; a second signal kills.

    Args:
        jobs: The commands.
        workers: How many at once.
        progress: Called a few times a second with (work done, work in all, a short text).

    Raises:
        UserError: A command ended with exit code 2; the message is the command's own.
        BranchCrashed: A command ended with another code; the message holds the end of its log.
        Interrupted: Stopped from outside, after the commands wrote their checkpoints.
    """
    waiting = sorted(jobs, key=lambda job: -job.work)
    threads = str(max(1, (os.cpu_count() or 1) // max(1, workers)))
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    environment |= {name: threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    running: list[_Running] = []
    failed: list[_Running] = []
    ended: list[BranchJob] = []
    begun = time.time()
    with _signals() as signals:
        try:
            while running or (waiting and not failed and not signals.seen):
                while waiting and len(running) < workers and not failed and not signals.seen:
                    running.append(_Running.start(waiting.pop(0), environment))
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    if one.process.returncode:
                        failed.append(one)
                    else:
                        ended.append(one.job)
                if failed or signals.seen:
                    for one in running:
                        one.tell_to_stop()
                if progress is not None:
                    _report(jobs, ended, running, begun, progress)
                if running:
                    time.sleep(_POLL_SECONDS)
        finally:
            for one in running:  # only left by a second signal or an error of ours
                one.process.kill()
                one.process.wait()
    crashed = [one for one in failed if not one.was_stopped()]
    if crashed:
        raise crashed[0].error()
    if signals.seen or failed:
        left = len(jobs) - len(ended)
        raise Interrupted(
            f"stopped; {left} of {len(jobs)} branch processes are not done and go on from their checkpoints."
        )


@dataclass
class _Running:
    job: BranchJob
    process: subprocess.Popen[bytes]
    log_start: int
    told: bool = field(default=False)

    @classmethod
    def start(cls, job: BranchJob, environment: Mapping[str, str]) -> _Running:
        job.log_path.parent.mkdir(parents=True, exist_ok=True)
        with job.log_path.open("ab") as log:
            start = log.tell()
            process = subprocess.Popen(
                list(job.argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C reaches it through us alone, and once
                preexec_fn=_stop_with_parent if sys.platform == "linux" else None,
            )
        return cls(job, process, start)

    def tell_to_stop(self) -> None:
        if not self.told:
            self.told = True
            self.process.send_signal(signal.SIGTERM)

    def was_stopped(self) -> bool:
        code = self.process.returncode
        return code == Interrupted.exit_code or (self.told and code == -signal.SIGTERM)

    def error(self) -> MeritError:
        with self.job.log_path.open("rb") as log:
            log.seek(self.log_start)
            text = log.read().decode("utf-8", "replace").strip()
        code = self.process.returncode
        where = f"The whole output: {self.job.log_path}"
        if code == UserError.exit_code:
            message = text[text.rfind("\nmerit: ") + 1 :].removeprefix("merit: ")
            return UserError(f"branch {self.job.name}: {message}", where)
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (often: out of memory; fewer --jobs, a smaller train.micro_batch_size)"
        return BranchCrashed(f"branch {self.job.name} ended with {how}.\n{where}; its end:\n{text[-_TAIL_CHARACTERS:]}")


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _stop_with_parent() -> None:
    """In the new process: SIGTERM when the parent dies, so that a killed run leaves no trainers behind."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Seen:
    seen = False


@contextlib.contextmanager
def _signals() -> Iterator[_Seen]:
    """Note the first SIGTERM or SIGINT; the second raises KeyboardInterrupt."""
    state = _Seen()

    def note(number: int, frame: FrameType | None) -> None:
        if state.seen:
            raise KeyboardInterrupt
        state.seen = True

    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield state
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _report(
    jobs: Sequence[BranchJob],
    ended: Sequence[BranchJob],
    running: Sequence[_Running],
    begun: float,
    progress: Callable[[float, float, str], None],
) -> None:
    """Work done: whole commands, plus each running one's share of steps (its branches count alike)."""
    done = sum(job.work for job in ended)
    speed = 0.0
    for one in running:
        found = [read_progress(path) for path in one.job.progress_paths]
        fresh = [item for item in found if item and item["time"] >= begun]
        done += one.job.work * sum(item["step"] / item["steps"] for item in fresh) / max(1, len(found))
        if fresh:
            speed += max(fresh, key=lambda item: item["time"]).get("tokens_per_second") or 0.0
    text = f"{len(ended)}/{len(jobs)} done" + (f", {speed:,.0f} target tokens/s" if speed else "")
    progress(done, sum(job.work for job in jobs), text)
