"""Branches as tasks of a Ray cluster whose nodes share the run folder; a lost task goes on from its checkpoint.

A task starts the same processes that :mod:`merit.launch.local` starts here, so that it may use several GPUs. Ray is imported
when it is used. Its usage statistics are off unless the user turned them on; its tokens stay in the environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from merit import __version__
from merit.errors import Interrupted, MeritError, ResourceError, RunFolderError, install_hint
from merit.launch.job import BranchCrashed, BranchJob, BranchKilled, log_end, progress_of
from merit.launch.local import run_branches
from merit.launch.outcome import Outcome
from merit.progress import Progress
from merit.recipe.launch import RaySettings
from merit.signals import graceful

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Ray:
    """A Ray cluster.

    Attributes:
        settings: The recipe's ``launch.ray``.
        cpus: CPUs of one branch.
        gpus: GPUs of one branch, if the cluster has any.
    """

    settings: RaySettings
    cpus: int
    gpus: int

    @property
    def side_by_side(self) -> int | None:
        """The cluster decides."""
        return None

    def run(self, jobs: Sequence[BranchJob], progress: Progress) -> None:
        """Run every command as a task, longest first.

        Raises:
            ResourceError: Ray is not installed, does not answer, or has no node that is large enough.
            UserError: A command ended with an error that the user can fix: that error.
            BranchCrashed: A command ended in another way, or was lost more often than ``launch.ray.retries``.
            Interrupted: Stopped from outside, after the commands wrote their checkpoints.
        """
        with _connected(self.settings.address) as ray, graceful() as stop:
            remote = self._task(ray)
            waiting = {
                remote.options(name=f"branch {job.name}").remote(job, __version__): job
                for job in sorted(jobs, key=lambda job: -job.work)
            }
            begun, ended, failed = time.time(), list[BranchJob](), list[MeritError]()
            told = False
            try:
                while waiting:
                    ready, _ = ray.wait(list(waiting), timeout=_POLL_SECONDS)
                    for ref in ready:
                        job = waiting.pop(ref)
                        error = _error(ray, ref, job)
                        if error is None:
                            ended.append(job)
                        elif not (told and isinstance(error, Interrupted)):
                            failed.append(error)
                    progress(*progress_of(jobs, ended, list(waiting.values()), begun))
                    if (stop.asked or failed) and not told:
                        told = True
                        for ref in waiting:
                            ray.cancel(ref)
            finally:
                for ref in waiting:  # only left by a second signal or an error of ours
                    ray.cancel(ref, force=True)
        if failed and not stop.asked:
            raise failed[0]
        if stop.asked:
            left = len(jobs) - len(ended)
            raise Interrupted(f"stopped; {left} of {len(jobs)} branches will resume from their checkpoints.")

    def _task(self, ray: Any) -> Any:  # noqa: ANN401  Ray's own, which is imported late
        held = ray.cluster_resources()
        gpus = self.gpus if self.settings.gpus is None else self.settings.gpus
        if self.settings.gpus is None and not held.get("GPU"):
            gpus = 0
        wanted = {"CPU": self.settings.cpus or self.cpus, "GPU": gpus, **self.settings.resources}
        short = {name: count for name, count in wanted.items() if count and _most(ray, name) < count}
        if short:
            name, count = next(iter(short.items()))
            raise ResourceError(
                f"launch.ray: a branch reserves {count:g} {name}, but no node of the cluster has more than "
                f"{_most(ray, name):g}.",
                "Change launch.ray.cpus, launch.ray.gpus or launch.ray.resources, or add a larger node.",
            )
        return ray.remote(
            num_cpus=wanted["CPU"],
            num_gpus=gpus,
            resources=dict(self.settings.resources),
            max_retries=self.settings.retries,
            retry_exceptions=[BranchKilled],
            scheduling_strategy="SPREAD",
        )(_train)


def _most(ray: Any, name: str) -> float:  # noqa: ANN401
    return max((float(node["Resources"].get(name, 0)) for node in ray.nodes() if node["Alive"]), default=0.0)


def _train(job: BranchJob, version: str) -> dict[str, Any]:
    """The task, on some node: the outcome of the command as JSON values.

    Raises:
        BranchKilled: It was stopped or killed on this node, not by the user: to be started again.
    """
    try:
        if version != __version__:
            raise ResourceError(f"this node has merit {__version__}, the run was started with {version}.")
        if not job.outcome_path.parent.is_dir():
            raise RunFolderError(
                f"{job.outcome_path.parent} does not exist on {os.uname().nodename}.",
                "All nodes of the cluster must share the run folder; for machines that share nothing use --launch detached.",
            )
        run_branches([replace(job, argv=[sys.executable, *job.argv[1:]])], 1)
    except Interrupted as error:
        raise BranchKilled(str(error)) from None
    except BranchKilled:
        raise
    except MeritError as error:
        return asdict(Outcome.of(error))
    return asdict(Outcome())


def _error(ray: Any, ref: Any, job: BranchJob) -> MeritError | None:  # noqa: ANN401
    """How a task ended; None if well."""
    try:
        outcome = Outcome(**ray.get(ref))
    except ray.exceptions.TaskCancelledError:
        return Interrupted(f"branch {job.name} was stopped")
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BranchKilled):
            return BranchCrashed(f"{error.cause}\nIt was tried as often as launch.ray.retries says.")
        raise
    except ray.exceptions.RayError as error:
        return BranchCrashed(
            f"branch {job.name} was lost more often than launch.ray.retries says: {error}\n{log_end(job)}"
        )
    if outcome.ok:
        return None
    return outcome.user_error("") or BranchCrashed(outcome.message)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster; the process's own handling of signals stays."""
    if find_spec("ray") is None:
        raise ResourceError("launch.where: ray, but Ray is not installed.", f"Install it ({install_hint('ray')}).")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = import_module("ray")
    if ray.is_initialized():
        yield ray
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)

    try:
        ray.init(
            address=address, include_dashboard=None if address else False, log_to_driver=False, logging_level="ERROR"
        )
    except Exception as error:  # Ray's errors of connecting have no common class
        raise ResourceError(
            f"Ray {address or os.environ.get('RAY_ADDRESS') or ''} does not answer: {str(error).splitlines()[0]}",
            "launch.ray.address is a running cluster's (ray start --head prints it). With token authentication the same "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH is needed here.",
        ) from None
    finally:
        restore()
    try:
        yield ray
    finally:
        ray.shutdown()
        restore()  # Ray's own code, below Python, leaves SIGTERM with its default effect
