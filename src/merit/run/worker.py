"""A worker process: trains the branches of a job file and writes the outcome.

python -m merit.run.worker JOB.json OUTCOME.json
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from merit.errors import Interrupted, MeritError
from merit.launch.outcome import Outcome, own_outcome
from merit.progress import Silent
from merit.recipe.load import load_recipe
from merit.run.branches import BranchId, stage_of
from merit.run.session import Session
from merit.run.store import wait_for
from merit.run.training import train_here
from merit.signals import ignore_from_now_on, stop_on_sigterm
from merit.train.workers import WorkerJob


def train(file: Path) -> None:
    """Train the branches of a job file."""
    job = WorkerJob.load(file)
    recipe = load_recipe(job.run / "recipe.yaml", [f"train.threads={job.threads}"])
    session = Session(recipe, job.run, Silent(), jobs=job.jobs)
    for branch in map(BranchId.parse, job.branches):
        wait_for(stage_of(session, branch).path, job.patience)
        if not stage_of(session, branch).is_done():  # else a predecessor was lost just after it finished
            train_here(session, branch)


def run_job(work: Callable[[], None], outcome_file: Path) -> int:
    """Do a worker's work and write how it ended; returns the exit code."""
    stop_on_sigterm()
    try:
        work()
        outcome = Outcome()
    except MeritError as error:
        outcome = Outcome.of(error)
    except KeyboardInterrupt as error:
        outcome = Outcome.of(Interrupted(str(error) or "interrupted"))
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome.of(error)
    if outcome.message:
        print(outcome.message, *outcome.ways_out, sep="\n  ", file=sys.stderr)
    outcome.save(own_outcome(outcome_file))
    return outcome.exit_code


if __name__ == "__main__":
    code = run_job(lambda: train(Path(sys.argv[1])), Path(sys.argv[2]))
    ignore_from_now_on()
    sys.exit(code)
