"""Run commands in parallel on this machine, each in one or more processes.

It starts commands, watches them and forwards signals. Commands report back through small files:
:class:`merit.launch.job.ProgressFile` while they run, and :class:`merit.launch.outcome.Outcome` when they end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from merit.errors import Interrupted, MeritError
from merit.files import appending
from merit.launch.job import BranchJob, crash, progress_of
from merit.launch.outcome import Outcome, outcome_of
from merit.progress import Progress, silent
from merit.signals import graceful

_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 20
"""How long a command's other processes may take to end once one of them has failed: they might wait for it forever."""


@dataclass(frozen=True)
class Local:
    """This machine.

    Attributes:
        side_by_side: How many commands run at once.
    """

    side_by_side: int | None = 1

    def run(self, jobs: Sequence[BranchJob], progress: Progress) -> None:
        """See :func:`run_branches`."""
        run_branches(jobs, self.side_by_side or 1, progress)


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
                progress(*progress_of(jobs, ended, [one.job for one in running], begun))
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
        raise Interrupted(f"stopped: {left} of {len(jobs)} branch processes are not done; their checkpoints are saved.")


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
                    preexec_fn=_stops_with(os.getpid()) if sys.platform == "linux" else None,
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
        # A process that was killed takes the others with it: they lose the connection to it.
        return crash(self.job, min(code for code in self.codes() if code), self.log_start)


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


def _stops_with(parent: int) -> Callable[[], None]:
    """For the new process: SIGTERM when its parent dies, so that a killed run leaves no trainers behind."""

    def arrange() -> None:
        assert _LIBC is not None
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before it could be told
            os._exit(Interrupted.exit_code)

    return arrange
