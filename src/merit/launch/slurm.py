"""Branches as tasks of a Slurm job array: a script that people can read, submitted with sbatch and watched with squeue.

Nothing else of Slurm is used: no accounting, no daemon. A stopped watcher leaves the array in the queue; the same command
finds it again. The script requeues a task that was told to stop before its time limit, or that was killed.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from merit.errors import Interrupted, MeritError, ResourceError, RunFolderError
from merit.files import read_sealed, write_sealed, write_text
from merit.launch.job import BranchCrashed, BranchJob, log_end, progress_of
from merit.launch.one import KILLED
from merit.launch.outcome import Outcome
from merit.progress import Progress
from merit.recipe.launch import SlurmSettings
from merit.signals import StopFlag, graceful

_STATE = "submitted.json"
_KILLED_RETRIES = 3
"""A task that is killed more often is not requeued: it probably needs more memory."""
_OUTCOME_SECONDS = 60.0
"""How long an outcome file may take to be seen here after its task left the queue (shared disks are slow to tell)."""


@dataclass(frozen=True)
class Submitted:
    """A job array that was submitted.

    Attributes:
        number: Slurm's job id.
        tasks: Fingerprint of each task's job, by the job's name, in order of task numbers.
    """

    number: int
    tasks: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Queue:
    """What the last call left in the queue."""

    arrays: tuple[Submitted, ...]


@dataclass(frozen=True)
class Slurm:
    """A cluster, from one of its login nodes.

    Attributes:
        settings: The recipe's ``launch.slurm``.
        name: Of the array.
        cpus: Of one task.
    """

    settings: SlurmSettings
    name: str
    cpus: int

    @property
    def side_by_side(self) -> int | None:
        """The cluster decides."""
        return None

    def run(self, jobs: Sequence[BranchJob], progress: Progress) -> None:
        """Submit what is not queued yet and wait for all of it.

        Raises:
            ResourceError: There is no Slurm here, or it refuses the array.
            UserError: A command ended with an error that the user can fix: that error; the others go on. Or one left the
                queue and no outcome of it can be read.
            BranchCrashed: A command ended in another way.
            Interrupted: Stopped from outside; the array goes on in the queue.
        """
        if shutil.which("sbatch") is None:
            raise ResourceError(
                "launch.where: slurm, but there is no sbatch here.",
                "Run this on a login node of the cluster, or use --launch local.",
            )
        folder = jobs[0].log_path.parent / "slurm"
        where = {job.name: job for job in jobs}
        with graceful() as stop:
            queued = _still_queued(folder, jobs)
            known = _taken_care_of(queued, jobs)
            new = [job for job in jobs if job.name not in known]
            if new:
                queued.append(self._submit(new, folder))
            write_sealed(folder / _STATE, {"arrays": [asdict(array) for array in queued]})
            begun, left_at = time.time(), dict[str, float]()
            ended: list[BranchJob] = []
            while len(ended) < len(jobs):
                active = _active(queued)
                for name in where.keys() - active.keys() - {job.name for job in ended}:
                    since = left_at.setdefault(name, time.monotonic())
                    outcome = Outcome.load(where[name].outcome_path)
                    if outcome is not None and outcome.ok:
                        ended.append(where[name])
                    elif outcome is not None or time.monotonic() - since > _OUTCOME_SECONDS:
                        raise _error(where[name], outcome)
                running = [where[name] for name in active if name in where]
                progress(*progress_of(jobs, ended, running, begun))
                if stop.asked:
                    numbers = " ".join(str(array.number) for array in queued)
                    raise Interrupted(
                        f"stopped watching; Slurm goes on with {len(jobs) - len(ended)} branches (scancel {numbers} ends "
                        "them; each writes a checkpoint)."
                    )
                if len(ended) < len(jobs):
                    _sleep(self.settings.poll_seconds, stop)

    def script(self, jobs: Sequence[BranchJob], folder: Path) -> str:
        """The array's script; task i runs command i.

        Args:
            jobs: The commands.
            folder: Of their job files, and of what they print.
        """
        own = self.settings
        limit = "" if own.at_once is None else f"%{own.at_once}"
        wanted = {
            "job-name": self.name,
            "array": f"0-{len(jobs) - 1}{limit}",
            "nodes": 1,
            "ntasks": 1,
            "cpus-per-task": own.cpus or self.cpus,
            "gpus-per-node": own.gpus or None,
            "mem": own.memory,
            "time": _clock(own.hours),
            "partition": own.partition,
            "account": own.account,
            "output": _quoted(f"{str(folder).replace('%', '%%')}/%A_%a.txt"),
            "open-mode": "append",
            "signal": f"B:TERM@{own.grace_seconds}",
        }
        lines = [f"#SBATCH --{key}={value}" for key, value in wanted.items() if value is not None]
        lines += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in own.options)]
        files = "\n".join(f"  {shlex.quote(str(_job_file(job)))}  # branch {job.name}" for job in jobs)
        setup = "".join(f"{line}\n" for line in own.setup)
        return _SCRIPT.format(
            head="\n".join(lines),
            files=files,
            setup=setup,
            python=shlex.quote(sys.executable),
            interrupted=Interrupted.exit_code,
            killed=KILLED,
            requeues=own.requeues,
            killed_retries=_KILLED_RETRIES,
            folder=shlex.quote(str(folder)),
        )

    def _submit(self, jobs: Sequence[BranchJob], folder: Path) -> Submitted:
        for job in jobs:
            job.save(_job_file(job))
            job.outcome_path.unlink(missing_ok=True)
        file = folder / "train.sbatch"
        write_text(file, self.script(jobs, folder))
        said = _call("sbatch", "--parsable", str(file))
        if said.returncode or not said.stdout.split(";")[0].strip().isdecimal():
            raise ResourceError(
                f"sbatch refused {file}: {said.stderr.strip() or said.stdout.strip()}",
                "Change launch.slurm in the recipe (merit schema lists it), or submit the script by hand.",
            )
        return Submitted(int(said.stdout.split(";")[0]), {job.name: job.fingerprint for job in jobs})


def _quoted(text: str) -> str:
    """As sbatch reads one value of an ``#SBATCH`` line."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


_SCRIPT = """#!/bin/bash
# Written by merit: one array task per branch. Tasks do not talk to each other.
{head}

jobs=(
{files}
)
{setup}
# Before the time limit and at preemption Slurm sends TERM to this script; the branch then writes a checkpoint.
{python} -m merit.launch.one "${{jobs[$SLURM_ARRAY_TASK_ID]}}" &
branch=$!
trap 'kill -TERM $branch 2>/dev/null' TERM
wait $branch; code=$?
while kill -0 $branch 2>/dev/null; do wait $branch; code=$?; done  # a signal ends a wait early

kills={folder}/kills_${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID  # a line each; Slurm's own count has preemptions, too
[ $code -ne {killed} ] || date >> "$kills"
if [ ${{SLURM_RESTART_COUNT:-0}} -lt {requeues} ] && {{ [ $code -eq {interrupted} ] ||
   {{ [ $code -eq {killed} ] && [ $(wc -l < "$kills") -le {killed_retries} ]; }}; }}; then
  scontrol requeue "$SLURM_JOB_ID"  # back into the queue; it goes on from its checkpoint
fi
exit $code
"""


def _clock(hours: float) -> str:
    """As sbatch takes a time limit: HH:MM:SS."""
    seconds = round(3600 * hours)
    return f"{seconds // 3600:02d}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


def _job_file(job: BranchJob) -> Path:
    return job.outcome_path.with_name(job.outcome_path.name.replace(".outcome.", ".launch."))


def _still_queued(folder: Path, jobs: Sequence[BranchJob]) -> list[Submitted]:
    """Arrays of an earlier call of this command that have not ended.

    Raises:
        RunFolderError: One trains a branch with other settings, or the note of them is damaged.
    """
    file = folder / _STATE
    if not file.exists():
        return []
    try:
        arrays = read_sealed(file, _Queue).arrays
    except RunFolderError as error:
        raise RunFolderError(
            error.message,
            "It says which arrays of this run are in the queue. If squeue shows any, end them (scancel); then remove the "
            "file and run this again. Nothing was submitted.",
        ) from None
    active = _active(arrays)
    kept = [array for array in arrays if array.tasks.keys() & active.keys()]
    for job in jobs:
        for array in kept:
            if job.name in active and array.tasks.get(job.name, job.fingerprint) != job.fingerprint:
                raise RunFolderError(
                    f"Slurm job {array.number} still trains branch {job.name} with other settings or inputs.",
                    f"End it (scancel {array.number}), or change the recipe back. Nothing was submitted.",
                )
    return kept


def _taken_care_of(arrays: Sequence[Submitted], jobs: Sequence[BranchJob]) -> set[str]:
    """Names of commands that are queued, or that have ended well in an array that is still watched."""
    same = {job.name: job for job in jobs if any(array.tasks.get(job.name) == job.fingerprint for array in arrays)}
    ended = {name for name, job in same.items() if (found := Outcome.load(job.outcome_path)) and found.ok}
    return ended | set(_active(arrays))


def _active(arrays: Sequence[Submitted]) -> Mapping[str, str]:
    """State of every task that is in the queue, by the name of its job.

    Raises:
        ResourceError: The queue cannot be read for several minutes.
    """
    for wait in (0, 2, 5, 15, 30, 60, 120):
        time.sleep(wait)
        said = _call("squeue", "--me", "--noheader", "--array", "--format=%F %K %T")
        if said.returncode == 0:
            break
    else:
        raise ResourceError(
            f"squeue does not answer: {said.stderr.strip()}",
            "The branches go on in the queue; the same command watches them again.",
        )
    names = {(array.number, place): name for array in arrays for place, name in enumerate(array.tasks)}
    found = {}
    for line in said.stdout.splitlines():
        number, place, state = [*line.split(), "", "", ""][:3]
        if number.isdecimal() and place.isdecimal() and (int(number), int(place)) in names:
            found[names[int(number), int(place)]] = state
    return found


def _error(job: BranchJob, outcome: Outcome | None) -> MeritError:
    if outcome is not None and outcome.error == Interrupted.__name__:
        return Interrupted(f"branch {job.name} was stopped and is not requeued; it goes on from its checkpoint.")
    error = outcome.user_error(f"branch {job.name}") if outcome else None
    if error is not None:
        return error
    if outcome is None:
        return ResourceError(
            f"branch {job.name} left the queue, and how it ended cannot be read: {job.outcome_path} is missing or damaged.",
            "Run this again: what is finished is kept, the rest goes on from its checkpoint. Other branches go on.",
            log_end(job),
        )
    why = outcome.message.splitlines()[0] if outcome.message else "It ended without a word."
    return BranchCrashed(f"branch {job.name}: {why}\nOther branches go on.\n{log_end(job)}")


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


def _sleep(seconds: float, stop: StopFlag) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stop.asked:
        time.sleep(min(0.2, seconds))
