"""Training the branches of a run: which to train, in this process or in worker processes, and what is recorded.

It connects :mod:`merit.train` (one group) with :mod:`merit.launch` (where commands run).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from merit import __version__
from merit.errors import Interrupted, RunFolderError
from merit.files import fingerprint, require_space
from merit.hf import checkpoint
from merit.hf.base import Base
from merit.launch.job import BranchJob, Launcher
from merit.mixture import EncodedDataset, load_split, read_counts
from merit.progress import Reporter, count, duration
from merit.recipe.schema import Recipe
from merit.run.branches import KEPT, BranchId, group_of, part_of, scope_of, stage_of
from merit.run.detaching import hand_over
from merit.run.launching import launcher_of
from merit.run.manifest import Manifest
from merit.run.needs import estimate
from merit.run.session import Session
from merit.run.step import stands
from merit.run.store import Stage
from merit.signals import graceful
from merit.train.branch import ONLY, train_branch
from merit.train.rounds import Round
from merit.train.workers import WorkerJob, share_out, threads_for


def train_branches(session: Session, branches: Sequence[BranchId]) -> None:
    """Train what is not done yet, one after another or ``session.jobs`` in parallel.

    Raises:
        ResourceError: Not enough disk space.
        UserError: A branch cannot be trained.
        Interrupted: Stopped from outside; checkpoints are saved.
    """
    stages = {branch: stage_of(session, branch) for branch in branches}
    waiting = [branch for branch, stage in stages.items() if not stands(stage, session, keep=KEPT)]
    if not waiting:
        session.reporter.stage("train", f"{count(len(branches), 'branch')} (done before)")
        return
    if session.recipe.launch.where == "detached":
        session.reporter.stage("train", f"{count(len(waiting), 'branch')}, elsewhere")
        hand_over(session, waiting)
        return
    need, _ = estimate(
        session.recipe, session.base, branches=len(waiting), merges=1, at_once=min(session.jobs, len(waiting))
    )
    require_space(
        session.run,
        need,
        count(len(waiting), "branch"),
        "Free space, use another disk (--output DIR), or train fewer branches (split.axes, baselines).",
    )
    workers = min(session.jobs, len(waiting))
    processes = session.recipe.train.processes
    side = f", {workers} in parallel" if workers > 1 else ""
    side += f", {processes} processes each" if processes > 1 else ""
    session.reporter.stage("train", f"{count(len(waiting), 'branch')}{side}")
    launcher = launcher_of(session, workers)
    if launcher is not None:
        _train_in_workers(session, waiting, launcher)
    else:
        for branch in waiting:
            train_here(session, branch)


def train_here(session: Session, branch: BranchId) -> None:
    """Train one branch in this process; if several processes train it together, the main one writes the record.

    Raises:
        Interrupted: Stopped from outside; a checkpoint is saved.
    """
    recipe, stage = session.recipe_of(scope_of(session, branch)), stage_of(session, branch)
    rows = load_split(session.run / "mixture", "train")
    group = {name: rows[name] for name in group_of(session, branch)}
    settings = recipe.train.model_copy(
        update={"threads": threads_for(recipe.train, session.jobs), "rounds": recipe.rounds}
    )
    recipe = recipe.model_copy(update={"train": settings})
    part = part_of(session, branch)
    with graceful() as stop:
        if not train_stage(stage, group, session.base, recipe, session.reporter, part=part):
            return
        _say(session, branch, stage)
    if stop.asked:  # the signal came during the branch's last step: it is finished, and the run stops after it
        raise Interrupted(f"stopped after branch {branch} was finished")


def train_stage(
    stage: Stage,
    group: Mapping[str, EncodedDataset],
    base: Base,
    recipe: Recipe,
    reporter: Reporter,
    *,
    manifest: Manifest | None = None,
    part: Round = ONLY,
) -> bool:
    """Train one group into a branch's folder, wherever that is, and record it; away from its run, with its manifest.

    Returns:
        Whether this process is the one that wrote it: of several that train together, the first.

    Raises:
        Interrupted: Stopped from outside; a checkpoint is saved.
    """
    if int(os.environ.get("RANK", "0")):
        train_branch(group, base, stage.path, recipe.train, seed=recipe.seed, part=part)
        return False
    with graceful(), stage.writing(recipe.seed, keep=KEPT) as record, reporter.progress(stage.name) as show:
        result = train_branch(group, base, stage.path, recipe.train, seed=recipe.seed, progress=show, part=part)
        if manifest is not None:
            manifest.save(stage.path)
        record |= result.facts()
        record["merit"] = __version__
        record["model_fingerprint"] = checkpoint.fingerprint(stage.path / "model")
    return True


def _say(session: Session, branch: BranchId, stage: Stage) -> None:
    record = stage.record()
    facts = record.facts
    session.reporter.say(
        f"  {stage.name}: {count(facts['steps'], 'step')}, {count(facts['target_tokens'], 'target token')}, "
        + (f"loss {facts['final_loss']:.4f}, " if facts["final_loss"] is not None else "")
        + duration(record.seconds)
    )
    for warning in facts["warnings"]:
        session.reporter.note(f"{stage.name}: {warning}")


def _train_in_workers(session: Session, waiting: Sequence[BranchId], launcher: Launcher) -> None:
    """Jobs with equal work; each worker trains its branches one after another, so that it loads libraries only once."""
    counts = {item.name: item.target_tokens for item in read_counts(session.run / "mixture")}
    epochs = {branch: session.recipe_of(scope_of(session, branch)).train.epochs for branch in waiting}
    work = {one: epochs[one] * sum(counts[name] for name in group_of(session, one)) or 1 for one in waiting}
    workers = launcher.side_by_side or len(waiting)
    jobs = [_job(session, mine, sum(work[one] for one in mine), launcher) for mine in share_out(work, workers)]
    with session.reporter.progress("branches") as tick:
        launcher.run(jobs, tick)
    for branch in waiting:
        stage = stage_of(session, branch)
        if not stage.is_done():
            raise RunFolderError(f"branch {branch} ended without a record.", f"See {session.run / 'logs'}.")
        _say(session, branch, stage)


def _job(session: Session, branches: Sequence[BranchId], work: float, launcher: Launcher) -> BranchJob:
    settings, run = session.recipe.train, session.run.resolve()
    name = str(run / "logs" / f"train-{branches[0]}".replace("/", "-"))
    shared = launcher.side_by_side
    threads = threads_for(settings, shared) if shared else settings.threads or 1
    patience = 0.0 if shared else 60 * session.recipe.launch.patience_minutes
    stages = [stage_of(session, branch) for branch in branches]
    job = WorkerJob(run, tuple(map(str, branches)), threads, shared or 1, patience)
    job.save(Path(f"{name}.job.json"))
    return BranchJob(
        name=", ".join(map(str, branches)),
        argv=[sys.executable, "-m", "merit.run.worker", f"{name}.job.json", f"{name}.outcome.json"],
        log_path=Path(f"{name}.txt"),
        outcome_path=Path(f"{name}.outcome.json"),
        work=work,
        progress_paths=[stage.path.resolve() / "progress.json" for stage in stages],
        threads=threads,
        processes=settings.processes,
        fingerprint=fingerprint([stage.fingerprint for stage in stages]),
    )
