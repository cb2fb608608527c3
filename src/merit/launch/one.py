"""Run one command of a job file on this machine, as a scheduler's task: python -m merit.launch.one JOB.json

The exit code says what the scheduler is to do: 75 when the command was told to stop (start it again, it goes on), 137 when
it was killed (likewise, a few times), any other is final. How it ended is in the job's outcome file.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from merit.errors import Interrupted, MeritError, RunFolderError
from merit.launch.job import BranchJob, BranchKilled
from merit.launch.local import run_branches
from merit.launch.outcome import Outcome
from merit.signals import ignore_from_now_on, stop_on_sigterm

KILLED = 128 + signal.SIGKILL


def main(file: Path) -> int:
    """Do it; returns the exit code."""
    stop_on_sigterm()
    try:
        job = BranchJob.load(file)
    except RunFolderError as error:  # where it would write its outcome is not known: the launcher waits for it in vain
        print(error, file=sys.stderr)
        return error.exit_code
    try:
        run_branches([job], 1)
    except BranchKilled as error:
        print(error, file=sys.stderr)
        Outcome.of(error).save(job.outcome_path)
        return KILLED
    except MeritError as error:
        if not isinstance(error, Interrupted):
            print(error, file=sys.stderr)
        if Outcome.load(job.outcome_path) is None:
            Outcome.of(error).save(job.outcome_path)
        return error.exit_code
    except KeyboardInterrupt as error:
        Outcome.of(Interrupted(str(error) or "interrupted")).save(job.outcome_path)
        return Interrupted.exit_code
    if Outcome.load(job.outcome_path) is None:
        Outcome().save(job.outcome_path)
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    ignore_from_now_on()
    sys.exit(code)
