"""`merit branch train`: an exported branch, trained where it is, with nothing else of its run at hand."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merit.errors import CheckpointError, Interrupted, RunFolderError
from merit.files import differences
from merit.hf.base import Base, open_base
from merit.launch.job import BranchJob
from merit.launch.local import run_branches
from merit.mixture import Datasets, load_split
from merit.progress import Reporter
from merit.recipe.load import load_recipe
from merit.recipe.schema import Recipe
from merit.run import key
from merit.run.branches import BranchId
from merit.run.manifest import RESULT, Manifest
from merit.run.record import plain, shown
from merit.run.scope import Scope
from merit.run.store import Stage
from merit.run.training import train_stage
from merit.signals import graceful
from merit.train.requirements import processes_here
from merit.train.workers import threads_for


@dataclass(frozen=True)
class _Opened:
    manifest: Manifest
    recipe: Recipe
    base: Base
    rows: Datasets
    stage: Stage


def train_exported(
    folder: Path, base: Path | None, to: Path | None, reporter: Reporter, overrides: Sequence[str] = ()
) -> Stage:
    """Train an exported branch; called again, it goes on.

    Args:
        folder: What ``merit branch export`` wrote.
        base: Folder of the base. Default: the copy in ``folder``, else the recipe's.
        to: Where the result goes. Default: ``folder/branch``.
        reporter: Where progress is shown.
        overrides: ``a.b=value``: settings of how and where to compute.

    Raises:
        CheckpointError: The base is not the one that the branch belongs to.
        RunFolderError: The folder was changed, is not an exported branch, or would be another one with ``overrides``.
        Interrupted: Stopped from outside; a checkpoint is saved.
    """
    opened = _open(folder, base, to or folder / RESULT, overrides)
    stage, train = opened.stage, opened.recipe.train
    if stage.is_done():
        stage.verify()
        reporter.stage("train", f"{stage.name} (done before)")
        return stage
    if train.processes > processes_here():
        words = [*(("--base", str(base.resolve())) if base else ()), *(w for o in overrides for w in ("--set", o))]
        _train_together(folder, words, stage, train.processes, threads_for(train))
        return stage
    if processes_here() == 1 or not int(os.environ.get("RANK", "0")):
        reporter.stage("train", f"{stage.name}: {opened.manifest.samples:,} rows of {len(opened.rows)} datasets")
    settings = train.model_copy(update={"threads": threads_for(train)})
    recipe = opened.recipe.model_copy(update={"train": settings})
    with graceful() as stop:
        wrote = train_stage(stage, opened.rows, opened.base, recipe, reporter, manifest=opened.manifest)
    if wrote:
        facts = stage.record().facts
        reporter.say(f"  {facts['steps']:,} steps, {facts['tokens']:,} tokens: {stage.path}")
    if stop.asked:
        raise Interrupted("stopped after the branch was finished")
    return stage


def _open(folder: Path, base: Path | None, result: Path, overrides: Sequence[str]) -> _Opened:
    manifest = Manifest.load(folder)
    if manifest.tool != "merit":
        raise RunFolderError(
            f"{folder} was exported for {manifest.tool}, which trains it (README.md).",
            "To train it with merit, export it without --format.",
        )
    here = base or (folder / "base" if (folder / "base").is_dir() else None)
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    if here is not None:
        model = recipe.model.model_copy(update={"base": str(here.resolve()), "revision": None})
        recipe = recipe.model_copy(update={"model": model})
    opened = open_base(recipe.model)
    if opened.fingerprint != manifest.base:
        raise CheckpointError(
            f"{opened.folder} is not the base of this branch: {differences(manifest.base, opened.fingerprint, 'base')[0]}.",
            "Weights, config and tokenizer must be those of the run. Give the right folder: --base DIR.",
            "Nothing was trained.",
        )
    data = folder / manifest.data  # an absolute path stays as it is
    rows = load_split(data, "train").only(manifest.group)
    branch = BranchId.parse(manifest.branch)
    hashes = {name: item.fingerprint for name, item in rows.items()}
    scope = Scope(folder, branch.root)
    stage = key.branch_stage(recipe, scope, branch.k, manifest.group, base=opened.fingerprint, rows=hashes)
    stage = replace(stage, path=result)
    if stage.fingerprint != manifest.answer:
        other = differences(dict(manifest.rows), hashes, "rows")
        other += differences(dict(manifest.settings), plain(stage.settings))
        raise RunFolderError(
            f"{folder} is not the branch that was exported (exported -> now):",
            *shown(other or ["its settings"]),
            "Its result could not be merged with the other branches. Take --set back, or export it again.",
        )
    return _Opened(manifest, recipe, opened, rows, stage)


def _train_together(folder: Path, words: Sequence[str], stage: Stage, processes: int, threads: int) -> None:
    """Several processes of this command, which find each other."""
    argv = [sys.executable, "-m", "merit", "branch", "train", str(folder.resolve()), "--to", str(stage.path.resolve())]
    argv += words
    log = folder / "log.txt"
    run_branches([BranchJob(stage.name, argv, log, folder / "outcome.json", threads=threads, processes=processes)], 1)
