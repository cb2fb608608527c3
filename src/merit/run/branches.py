"""Training the branches of a run: which are to be done, in this process or in worker processes, and what is recorded.

It joins :mod:`merit.train.branch` (one group) with :mod:`merit.launch` (processes). It decides no hyperparameters and
does not merge.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merit.errors import Interrupted, RecipeError, ResourceError, RunFolderError
from merit.files import read_json
from merit.progress import duration, size
from merit.run.needs import estimate
from merit.run.store import Stage

if TYPE_CHECKING:
    from merit.run.chain import Pipeline


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


def train_branches(pipeline: Pipeline, branches: Sequence[BranchId]) -> None:
    """Train what is not done yet, one after another or ``pipeline.jobs`` side by side.

    Raises:
        ResourceError: The disk does not suffice.
        UserError: A branch cannot be trained.
        Interrupted: Stopped from outside; checkpoints stand.
    """
    waiting = [branch for branch in branches if not pipeline.done(_stage(pipeline, branch))]
    if not waiting:
        pipeline.reporter.stage("train", f"{len(branches)} branches (done before)")
        return
    _check_disk(pipeline, len(waiting))
    workers = min(pipeline.jobs, len(waiting))
    side = f", {workers} side by side" if workers > 1 else ""
    pipeline.reporter.stage("train", f"{len(waiting)} branches{side}")
    if workers > 1:
        _train_side_by_side(pipeline, waiting, workers)
    else:
        for branch in waiting:
            _train_here(pipeline.owner(branch), branch)


def _stage(pipeline: Pipeline, branch: BranchId) -> Stage:
    return pipeline.owner(branch).branch_stages()[branch.k]


def _train_here(owner: Pipeline, branch: BranchId) -> None:
    from merit.hf import checkpoint
    from merit.launch.local import ProgressFile
    from merit.mixture.stage import load_split
    from merit.train.branch import train_branch

    stage = owner.branch_stages()[branch.k]
    rows = load_split(owner.run_folder / "mixture", "train")
    with (
        stage.writing(seed=owner.recipe.seed, keep=("checkpoints",)) as record,
        owner.reporter.progress(f"branch {branch}") as show,
    ):
        progress = ProgressFile(stage.path / "progress.json")

        def tick(done: int, total: int, info: Mapping[str, Any]) -> None:
            progress(done, total, info)
            show(
                done,
                total,
                " ".join(f"{key} {info[key]:.4g}" for key in ("loss", "tokens_per_second") if info.get(key)),
            )

        record |= train_branch(
            owner.recipe,
            {name: rows[name] for name in owner.groups()[branch.k]},
            stage.path,
            base=owner.base,
            device=owner.device,
            threads=owner.recipe.train.threads or max(1, (os.cpu_count() or 1) // owner.jobs),
            progress=tick,
            provenance={"branch": stage.fingerprint},
        )
        record["model_fingerprint"] = checkpoint.fingerprint(stage.path / "model")
        stop_asked = record.pop("stop_asked")
    _say(owner, branch, stage)
    if stop_asked:  # the branch was in its last step when the signal came: it is finished, and the run stops after it
        raise Interrupted(f"stopped after branch {branch} was finished")


def _say(pipeline: Pipeline, branch: BranchId, stage: Stage) -> None:
    facts = stage.record()
    pipeline.reporter.say(
        f"  branch {branch}: {facts['steps']:,} steps, {facts['target_tokens']:,} target tokens, "
        f"loss {facts['final_loss']:.4f}, {duration(facts['seconds'])}"
    )


def _train_side_by_side(pipeline: Pipeline, waiting: Sequence[BranchId], workers: int) -> None:
    """Worker processes of equal work; each trains its branches one after another, so libraries load once per worker."""
    from merit.launch.local import BranchJob, run_branches

    counts = {
        item["name"]: item["target_tokens"] for item in read_json(pipeline.run_folder / "mixture" / "datasets.json")
    }
    work = {branch: sum(counts[name] for name in pipeline.owner(branch).groups()[branch.k]) or 1 for branch in waiting}
    lists: list[list[BranchId]] = [[] for _ in range(workers)]
    for branch in sorted(waiting, key=lambda branch: -work[branch]):  # longest first, to the least loaded worker
        min(lists, key=lambda held: sum(work[one] for one in held)).append(branch)
    threads = pipeline.recipe.train.threads or max(1, (os.cpu_count() or 1) // workers)
    jobs = [
        BranchJob(
            name=", ".join(map(str, held)),
            argv=[
                *(sys.executable, "-m", "merit", "train", str(pipeline.run_folder.resolve()), "--quiet"),
                *(word for branch in held for word in ("--branch", str(branch))),
                *("--set", f"train.threads={threads}"),
                *(("--redo",) if pipeline.redo else ()),
            ],
            log_path=pipeline.run_folder / "logs" / f"train-{held[0]}.txt".replace("/", "-"),
            work=sum(work[branch] for branch in held),
            progress_paths=[_stage(pipeline, branch).path / "progress.json" for branch in held],
        )
        for held in lists
        if held
    ]
    with pipeline.reporter.progress("branches") as tick:
        run_branches(jobs, workers, progress=tick)
    for branch in waiting:
        stage = _stage(pipeline, branch)
        if not stage.is_done():
            raise RunFolderError(f"branch {branch} ended without a record.", f"See {pipeline.run_folder / 'logs'}.")
        _say(pipeline, branch, stage)


def _check_disk(pipeline: Pipeline, branches: int) -> None:
    """Room for every branch still to come, one merge, and the training checkpoints of those that run at once."""
    need, _ = estimate(
        pipeline.recipe, pipeline.base, branches=branches, merges=1, at_once=min(pipeline.jobs, branches)
    )
    free = shutil.disk_usage(pipeline.run_folder).free
    if free < need:
        raise ResourceError(
            f"{pipeline.run_folder}: {branches} branches need about {size(need)} here, {size(free)} are free.",
            "Free space, use another disk (--output DIR), or train fewer branches (split.axes, baselines).",
            "Nothing was trained.",
        )
