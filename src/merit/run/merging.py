"""Merging the branches of a run: which take part and with what weights; the arithmetic is :mod:`merit.merge`'s.

It knows the run folder, so a branch that is missing, truncated, stale or of another base is refused here, before a byte of
tensor data is read. Checkpoints outside a run go to :mod:`merit.merge` directly.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit.errors import MergeError
from merit.run import key as stages
from merit.run.store import Stage

if TYPE_CHECKING:
    from merit.merge import MergePlan
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
    if pipeline.done(stage):
        pipeline.reporter.stage("merge", f"{len(taking)} branches (done before)")
        return stage
    pipeline.reporter.stage("merge", f"{len(taking)} branches, {pipeline.recipe.merge.operator}")
    with stage.writing(seed=pipeline.recipe.seed) as record:
        record |= make_merge(pipeline, taking, left_out, stage.path / "model")
    for warning in condense(record["warnings"], len(taking)):
        pipeline.reporter.note(warning)
    return stage


def condense(warnings: Sequence[str], branches: int) -> list[str]:
    """What all branches share is said once."""
    said: dict[str, list[str]] = {}
    for warning in warnings:
        said.setdefault(re.sub(r"branch \d+", "every branch", warning), []).append(warning)
    return [line for general, lines in said.items() for line in ([general] if len(lines) == branches > 1 else lines)]


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


def branch_weight(record: Mapping[str, Any], weights: str) -> int:
    """A branch's integer weight before normalisation, from its record: trained target tokens, trained samples, or 1."""
    return {"tokens": record.get("target_tokens"), "samples": record.get("samples"), "uniform": 1}[weights] or 0


def plan_run(
    pipeline: Pipeline, taking: Mapping[int, Stage], left_out: Sequence[int], output: Path, scale: float
) -> MergePlan:
    """The checked plan of a run's merge (of adapters into a full checkpoint, for LoRA branches)."""
    from merit.merge import Branch, plan_merge
    from merit.merge.lora import plan_adapter_merge

    settings = pipeline.recipe.merge
    branches = [
        Branch(
            path=stage.path / "model",
            tokens=branch_weight(stage.record(), settings.weights),
            name=f"branch {k}",
            fingerprint=stages.model_content(stage),
        )
        for k, stage in taking.items()
    ]
    excluded = [f"branch {k}" for k in left_out]
    arguments = (pipeline.base.folder, branches, settings.operator, settings.options, scale, output)
    if pipeline.recipe.model.trainable == "lora":
        return plan_adapter_merge(*arguments, dtype=settings.dtype, excluded=excluded)
    mixed = "base" if pipeline.recipe.train.save_dtype == "float32" else None
    return plan_merge(
        *arguments, dtype=settings.dtype or mixed, excluded=excluded, base_fingerprint=pipeline.base.fingerprint
    )


def make_merge(
    pipeline: Pipeline,
    taking: Mapping[int, Stage],
    left_out: Sequence[int],
    output: Path,
    record_name: str | None = None,
) -> dict[str, Any]:
    """Write the merged checkpoint into ``output``; returns what the record says.

    With ``merge.scale: auto`` the plain merge is made first, λ is searched along the line from the base to it, and the
    chosen λ is merged from the branches anew; the curve lies beside the weights as ``scale.svg``.

    Args:
        pipeline: The run.
        taking: The branches that take part.
        left_out: Numbers of the run's other branches.
        output: Folder to create; it appears when it is complete.
        record_name: File in ``output`` that gets the record, for a merge outside the run folder.
    """
    from merit.merge import run_merge

    scale = pipeline.recipe.merge.scale
    search: dict[str, Any] | None = None
    curve = ""

    def complete(record: Mapping[str, Any]) -> dict[str, Any]:
        found = {key: value for key, value in record.items() if key != "seconds"}
        found |= {"merge_seconds": record["seconds"], "model_fingerprint": record["output"]["fingerprint"]}
        return found | ({"scale_search": search} if search else {})

    def beside(record: Mapping[str, Any]) -> dict[str, str]:
        files = {record_name: json.dumps(complete(record), indent=2, ensure_ascii=False) + "\n"} if record_name else {}
        return files | ({"scale.svg": curve} if search else {})

    if scale == "auto":
        from merit.run.scale_search import choose_scale

        plan_run(pipeline, taking, left_out, output, 1.0)  # what is wrong with the output is found before the search
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".scale-", dir=output.resolve().parent) as scratch:
            plain = Path(scratch) / "model"
            run_merge(plan_run(pipeline, taking, left_out, plain, 1.0))
            search, curve = choose_scale(pipeline, plain, Path(scratch))
        scale = float(search["chosen"])
    with pipeline.reporter.progress("merge") as tick:
        plan = plan_run(pipeline, taking, left_out, output, scale)
        return complete(run_merge(plan, progress=tick, extra=beside).record)
