"""Merging the branches of a run: which take part; the rest is :mod:`merit.merge`'s.

It knows the run folder, so a branch that is missing, truncated, stale or of another base is refused here, before a byte of
tensor data is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from merit.errors import MergeError
from merit.files import write_text
from merit.merge import MergeResult, merge_branches
from merit.merge.weights import condense, weigh
from merit.report.merge import trade_off_svg
from merit.run import key as stages
from merit.run.scale_search import judge_scales
from merit.run.store import Stage

if TYPE_CHECKING:
    from merit.run.chain import Pipeline


def merge_run(pipeline: Pipeline, *, exclude: Sequence[int] = (), allow_missing: bool = False) -> Stage:
    """Merge the run's branches into ``merged/model``.

    Args:
        pipeline: The run (or one of its baselines).
        exclude: Branch numbers to leave out; the other weights are renormalised.
        allow_missing: Leave out branches that are not trained yet, too.

    Raises:
        MergeError: A branch is not trained, or the branches do not belong together.
        RunFolderError: A branch is stale or damaged, or ``merged`` was made with other settings.
    """
    taking, left_out = choose_branches(pipeline, exclude, allow_missing)
    stage = stages.merged_stage(
        pipeline.recipe, pipeline.root, taking, base=pipeline.base.fingerprint, excluded=left_out
    )
    whose = "" if pipeline.root == pipeline.run_folder else f"{pipeline.recipe.split.method}: "
    if pipeline.done(stage):
        pipeline.reporter.stage("merge", f"{whose}{len(taking)} branches (done before)")
        return stage
    pipeline.reporter.stage("merge", f"{whose}{len(taking)} branches, {pipeline.recipe.merge.operator}")
    with stage.writing(seed=pipeline.recipe.seed) as record:
        result = make_merge(pipeline, taking, left_out, stage.path / "model")
        record |= result.record()
    for warning in condense(result.warnings, len(taking)):
        pipeline.reporter.note(warning)
    return stage


def choose_branches(
    pipeline: Pipeline, exclude: Sequence[int], allow_missing: bool
) -> tuple[dict[int, Stage], list[int]]:
    """Branches that take part, and the numbers of those left out.

    Raises:
        MergeError: A branch is not trained, an excluded number does not exist, or none is left.
    """
    branches = pipeline.branch_stages()
    unknown = sorted(set(exclude) - set(branches))
    if unknown:
        raise MergeError(f"--exclude {unknown[0]}: the run has branches 0 to {len(branches) - 1}.")
    wanted = {k: stage for k, stage in branches.items() if k not in exclude}
    missing = [k for k, stage in wanted.items() if not stage.is_done()]
    if missing and not allow_missing:
        names = ", ".join(map(str, missing))
        raise MergeError(
            f"merge: branches {names} of {len(branches)} are not trained yet in {pipeline.root / 'branches'}.",
            f"Train them (`merit train {pipeline.run_folder} --branch {missing[0]}`), or merge what is there with "
            "--allow-missing or --exclude; the weights are then renormalised, and card and record say so.",
            "Nothing was written.",
        )
    taking = {k: stage for k, stage in wanted.items() if k not in missing}
    if not taking:
        raise MergeError("merge: no branch is left to merge.")
    for stage in taking.values():
        stage.verify()
    return taking, sorted(set(branches) - set(taking))


@dataclass(frozen=True)
class _Trained:
    """A trained branch as its record tells it."""

    model: Path
    model_fingerprint: str
    tokens: int
    target_tokens: int
    samples: int

    @classmethod
    def of(cls, stage: Stage) -> _Trained:
        record = stage.record()
        counts = (int(record[key]) for key in ("tokens", "target_tokens", "samples"))
        return cls(stage.path / "model", stages.model_content(stage), *counts)


def make_merge(pipeline: Pipeline, taking: Mapping[int, Stage], left_out: Sequence[int], output: Path) -> MergeResult:
    """Write the merged checkpoint into ``output``; with ``scale: auto`` the curve lies next to the weights (scale.svg)."""
    settings = pipeline.recipe.merge
    if settings.dtype is None and pipeline.recipe.train.save_dtype == "float32":
        settings = settings.model_copy(update={"dtype": "base"})  # the branches need not have the base's dtype
    with pipeline.reporter.progress("merge") as tick:
        result = merge_branches(
            pipeline.base,
            weigh(settings.weights, {k: _Trained.of(stage) for k, stage in taking.items()}),
            output,
            settings,
            excluded=[f"branch {k}" for k in left_out],
            judge=partial(judge_scales, pipeline),
            progress=tick,
        )
    if result.scale_search is not None:
        write_text(output / "scale.svg", trade_off_svg(result.scale_search))
    return result
