"""Run commands in parallel on this machine, each in one or more processes.

It starts commands, watches them and forwards signals. Commands report back through small files:
:class:`ProgressFile` while they run, and :class:`merit.launch.outcome.Outcome` when they end.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merit.errors import Interrupted, MeritError
from merit.files import appending, write_json
from merit.launch.outcome import Outcome, outcome_of
from merit.progress import Progress, silent
from merit.signals import graceful

_POLL_SECONDS = 0.2
_TAIL_CHARACTERS = 4000
_PATIENCE_SECONDS = 20
"""How long a command's other processes may take to end once one of them has failed: they might wait for it forever."""


class BranchCrashed(MeritError):
    """A branch's process crashed through no fault of the user: its traceback is in the message."""


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
    """

    name: str
    argv: Sequence[str]
    log_path: Path
    outcome_path: Path
    work: float = 0
    progress_paths: Sequence[Path] = ()
    threads: int = 1
    processes: int = 1


class ProgressFile:
    """Writes progress to a small JSON file at most once a second, and at the last step.

    Call it as ``(step, steps, facts)``; the file has step, steps, loss, learning_rate and tokens_per_second (those
    given in the facts) and the Unix time of writing (seconds).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written = -float("inf")

    def __call__(self, step: int, steps: int, facts: Mapping[str, Any]) -> None:
        """Record the progress."""
        now = time.monotonic()
        if now - self._written < 1 and step < steps:
            return
        self._written = now
        shown = {key: facts[key] for key in ("loss", "learning_rate", "tokens_per_second") if key in facts}
        write_json(self.path, {"step": step, "steps": steps, **shown, "time": round(time.time(), 3)})


def read_progress(path: Path) -> dict[str, Any] | None:
    """The content of a :class:`ProgressFile`, or None if there is none (yet)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["steps"] > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_branches(jobs: Sequence[BranchJob], workers: int, progress: Progress = silent) -> None:
    """Run commands, at most ``workers`` at once, longest first.

    If one fails, no others are started and running ones are told to stop (SIGTERM: they write a checkpoint first).
    SIGTERM and SIGINT to this process do the same; a second signal kills.

    Args:
        jobs: The commands.
        workers: How many at once.
        progress: Called a few times a second with (work done, total work, a short text).

    Raises:
        UserError: A command ended with an error that the user can fix: that error.
        BranchCrashed: A command ended in another way; the message has the end of its log.
        Interrupted: Stopped from outside, after the commands wrote their checkpoints.
    """
    waiting = sorted(jobs, key=lambda job: -job.work)
    running: list[_Running] = []
    failed: list[_Running] = []
    ended: list[BranchJob] = []
    begun = time.time()
    with graceful() as stop:
        try:
            while running or (waiting and not failed and not stop.asked):
                while waiting and len(running) < workers and not failed and not stop.asked:
                    running.append(_Running.start(waiting.pop(0)))
                for one in [one for one in running if one.has_ended()]:
                    running.remove(one)
                    if any(one.codes()):
                        failed.append(one)
                    else:
                        ended.append(one.job)
                if failed or stop.asked:
                    for one in running:
                        one.tell_to_stop()
                progress(*_progress(jobs, ended, running, begun))
                if running:
                    time.sleep(_POLL_SECONDS)
        finally:
            for one in running:  # only left by a second signal or an error of ours
                one.kill()
    crashed = [one for one in failed if not one.was_stopped()]
    if crashed:
        raise crashed[0].error()
    if stop.asked or failed:
        left = len(jobs) - len(ended)
        raise Interrupted(
            f"stopped; {left} of {len(jobs)} branch processes are not done and will resume from their checkpoints."
        )


@dataclass
class _Running:
    job: BranchJob
    processes: list[subprocess.Popen[bytes]]
    log_start: int
    told: bool = field(default=False)
    first_failure: float | None = None

    @classmethod
    def start(cls, job: BranchJob) -> _Running:
        for rank in range(job.processes):
            outcome_of(job.outcome_path, rank).unlink(missing_ok=True)
        port = _free_port() if job.processes > 1 else 0
        with appending(job.log_path) as log:
            start = log.tell()
            processes = [
                subprocess.Popen(
                    list(job.argv),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(job, rank, port),
                    start_new_session=True,  # Ctrl-C reaches it only through us, and once
                    preexec_fn=_stop_with_parent if sys.platform == "linux" else None,
                )
                for rank in range(job.processes)
            ]
        return cls(job, processes, start)

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def has_ended(self) -> bool:
        """Whether all processes have ended; those waiting for a failed one are killed after a while."""
        codes = self.codes()
        if None in codes and any(codes):
            self.first_failure = self.first_failure or time.monotonic()
            if time.monotonic() - self.first_failure > _PATIENCE_SECONDS:
                self.kill()
        return None not in self.codes()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def tell_to_stop(self) -> None:
        if not self.told:
            self.told = True
            for process in self.processes:
                process.send_signal(signal.SIGTERM)

    def was_stopped(self) -> bool:
        return all(
            code in (0, Interrupted.exit_code) or (self.told and code == -signal.SIGTERM) for code in self.codes()
        )

    def error(self) -> MeritError:
        outcomes = [Outcome.load(outcome_of(self.job.outcome_path, rank)) for rank in range(len(self.processes))]
        for outcome in outcomes:
            error = outcome.user_error(f"branch {self.job.name}") if outcome else None
            if error is not None:
                return error
        with self.job.log_path.open("rb") as log:
            log.seek(self.log_start)
            text = log.read().decode("utf-8", "replace").strip()
        # A process that was killed takes the others with it: they lose the connection to it.
        code = min(code for code in self.codes() if code)
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (often: out of memory; fewer --jobs, a smaller train.micro_batch_size)"
        return BranchCrashed(
            f"branch {self.job.name} ended with {how}.\nThe whole output: {self.job.log_path}; its end:\n"
            f"{text[-_TAIL_CHARACTERS:]}"
        )


def _environment(job: BranchJob, rank: int, port: int) -> dict[str, str]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    threads = str(job.threads)
    environment |= {name: threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    if job.processes > 1:
        number, count = str(rank), str(job.processes)
        environment |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _stop_with_parent() -> None:
    """In the new process: SIGTERM when the parent dies, so that a killed run leaves no trainers behind."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _progress(
    jobs: Sequence[BranchJob], ended: Sequence[BranchJob], running: Sequence[_Running], begun: float
) -> tuple[float, float, str]:
    """Work done (whole commands, plus each running one's share of steps), total work, and branches done as text."""
    work = sum(job.work for job in ended)
    branches = sum(_branches(job) for job in ended)
    speed = 0.0
    for one in running:
        found = [read_progress(path) for path in one.job.progress_paths]
        fresh = [item for item in found if item and item["time"] >= begun]
        shares = [item["step"] / item["steps"] for item in fresh]
        work += one.job.work * sum(shares) / max(1, len(found))
        branches += sum(share == 1 for share in shares)
        if fresh:
            speed += max(fresh, key=lambda item: item["time"]).get("tokens_per_second") or 0.0
    text = f"{branches} of {sum(map(_branches, jobs))} branches done"
    text += f", {speed:,.0f} target tokens/s" if speed else ""
    return work, sum(job.work for job in jobs), text


def _branches(job: BranchJob) -> int:
    return len(job.progress_paths) or 1
