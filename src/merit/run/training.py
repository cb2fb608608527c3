"""Training the branches of a run: which to train, in this process or in worker processes, and what is recorded.

It connects :mod:`merit.train` (one group) with :mod:`merit.launch` (processes).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merit.errors import Interrupted, RecipeError, RunFolderError
from merit.files import require_space
from merit.hf import checkpoint
from merit.launch.local import BranchJob, run_branches
from merit.mixture import load_split, read_counts
from merit.progress import duration
from merit.run import key
from merit.run.needs import estimate
from merit.run.scope import Scope
from merit.run.session import Session
from merit.run.step import stands
from merit.run.store import Stage, split_of
from merit.signals import graceful
from merit.train.branch import train_branch
from merit.train.requirements import processes_here
from merit.train.workers import WorkerJob, share_out, threads_for

_KEPT = ("checkpoints", "trackers")
"""What an unfinished branch resumes from, and its trackers' files; not part of the stage's outputs."""


@dataclass(frozen=True)
class BranchId:
    """One branch of the run (``root`` is None) or of a baseline (``root`` is its split method)."""

    root: str | None
    k: int

    def __str__(self) -> str:
        return f"{self.root}/{self.k}" if self.root else str(self.k)

    @classmethod
    def parse(cls, text: str) -> BranchId:
        """Read ``3`` or ``random/3``.

        Raises:
            RecipeError: It is neither.
        """
        root, _, k = text.rpartition("/")
        if not k.isdigit():
            raise RecipeError(
                f"--branch {text}: expected a branch number such as 0, or baseline/number such as random/0."
            )
        return cls(root or None, int(k))


def branch_stages(session: Session, scope: Scope) -> dict[int, Stage]:
    """The branches of a scope, as requested now."""
    rows = {item.name: item.fingerprint for item in read_counts(session.run / "mixture")}
    recipe, base = session.recipe_of(scope), session.base.fingerprint
    groups = split_of(scope.root).groups
    return {k: key.branch_stage(recipe, scope, k, group, base=base, rows=rows) for k, group in enumerate(groups)}


def scope_of(session: Session, branch: BranchId) -> Scope:
    """The scope that a branch belongs to.

    Raises:
        RecipeError: There is no such branch.
    """
    baselines = session.recipe.baselines
    if branch.root is not None and branch.root not in baselines:
        raise RecipeError(
            f"--branch {branch}: the recipe has no baseline {branch.root!r}; it has {', '.join(baselines) or 'none'}."
        )
    scope = Scope(session.run, branch.root)
    groups = len(split_of(scope.root).groups)
    if branch.k >= groups:
        raise RecipeError(f"--branch {branch}: the split has {groups} groups, numbered from 0.")
    return scope


def _stage(session: Session, branch: BranchId) -> Stage:
    return branch_stages(session, scope_of(session, branch))[branch.k]


def _group(session: Session, branch: BranchId) -> list[str]:
    return split_of(scope_of(session, branch).root).groups[branch.k]


def train_branches(session: Session, branches: Sequence[BranchId]) -> None:
    """Train what is not done yet, one after another or ``session.jobs`` in parallel.

    Raises:
        ResourceError: Not enough disk space.
        UserError: A branch cannot be trained.
        Interrupted: Stopped from outside; checkpoints are saved.
    """
    stages = {branch: _stage(session, branch) for branch in branches}
    waiting = [branch for branch, stage in stages.items() if not stands(stage, session, keep=_KEPT)]
    if not waiting:
        session.reporter.stage("train", f"{len(branches)} branches (done before)")
        return
    need, _ = estimate(
        session.recipe, session.base, branches=len(waiting), merges=1, at_once=min(session.jobs, len(waiting))
    )
    require_space(
        session.run,
        need,
        f"{len(waiting)} branches",
        "Free space, use another disk (--output DIR), or train fewer branches (split.axes, baselines).",
    )
    workers = min(session.jobs, len(waiting))
    processes = session.recipe.train.processes
    side = f", {workers} in parallel" if workers > 1 else ""
    side += f", {processes} processes each" if processes > 1 else ""
    session.reporter.stage("train", f"{len(waiting)} branches{side}")
    if workers > 1 or processes > processes_here():
        _train_in_workers(session, waiting, workers)
    else:
        for branch in waiting:
            train_here(session, branch)


def train_here(session: Session, branch: BranchId) -> None:
    """Train one branch in this process; if several processes train it together, the main one writes the record.

    Raises:
        Interrupted: Stopped from outside; a checkpoint is saved.
    """
    recipe, stage = session.recipe_of(scope_of(session, branch)), _stage(session, branch)
    rows = load_split(session.run / "mixture", "train")
    group = {name: rows[name] for name in _group(session, branch)}
    settings = recipe.train.model_copy(update={"threads": threads_for(recipe.train, session.jobs)})
    if int(os.environ.get("RANK", "0")):
        train_branch(group, session.base, stage.path, settings, seed=recipe.seed)
        return
    with (
        graceful() as stop,
        stage.writing(recipe.seed, keep=_KEPT) as record,
        session.reporter.progress(f"branch {branch}") as show,
    ):
        result = train_branch(group, session.base, stage.path, settings, seed=recipe.seed, progress=show)
        record |= result.facts()
        record["model_fingerprint"] = checkpoint.fingerprint(stage.path / "model")
    _say(session, branch, stage)
    if stop.asked:  # the signal came during the branch's last step: it is finished, and the run stops after it
        raise Interrupted(f"stopped after branch {branch} was finished")


def _say(session: Session, branch: BranchId, stage: Stage) -> None:
    record = stage.record()
    facts = record.facts
    session.reporter.say(
        f"  branch {branch}: {facts['steps']:,} steps, {facts['target_tokens']:,} target tokens, "
        f"loss {facts['final_loss']:.4f}, {duration(record.seconds)}"
    )
    for warning in facts["warnings"]:
        session.reporter.note(f"branch {branch}: {warning}")


def _train_in_workers(session: Session, waiting: Sequence[BranchId], workers: int) -> None:
    """Jobs with equal work; each worker trains its branches one after another, so that it loads libraries only once."""
    counts = {item.name: item.target_tokens for item in read_counts(session.run / "mixture")}
    work = {branch: sum(counts[name] for name in _group(session, branch)) or 1 for branch in waiting}
    jobs = [_job(session, mine, sum(work[branch] for branch in mine), workers) for mine in share_out(work, workers)]
    with session.reporter.progress("branches") as tick:
        run_branches(jobs, workers, progress=tick)
    for branch in waiting:
        stage = _stage(session, branch)
        if not stage.is_done():
            raise RunFolderError(f"branch {branch} ended without a record.", f"See {session.run / 'logs'}.")
        _say(session, branch, stage)


def _job(session: Session, branches: Sequence[BranchId], work: float, workers: int) -> BranchJob:
    settings = session.recipe.train
    name = str(session.run.resolve() / "logs" / f"train-{branches[0]}".replace("/", "-"))
    job = WorkerJob(session.run.resolve(), tuple(map(str, branches)), threads_for(settings, workers), workers)
    job.save(Path(f"{name}.job.json"))
    return BranchJob(
        name=", ".join(map(str, branches)),
        argv=[sys.executable, "-m", "merit.run.worker", f"{name}.job.json", f"{name}.outcome.json"],
        log_path=Path(f"{name}.txt"),
        outcome_path=Path(f"{name}.outcome.json"),
        work=work,
        progress_paths=[_stage(session, branch).path / "progress.json" for branch in branches],
        threads=job.threads,
        processes=settings.processes,
    )
