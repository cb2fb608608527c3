"""Merging the branches of a run: chooses the branches; the rest is done by :mod:`merit.merge`.

It knows the run folder, so a branch that is missing, truncated, stale or of another base is refused here, before any
tensor data is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from merit.errors import MergeError
from merit.files import write_text
from merit.hf.checkpoint import read_headers
from merit.hf.models import trainable_names
from merit.merge import MergeResult, merge_branches
from merit.merge.curve import trade_off_svg, weights_svg
from merit.merge.displacement import measure_displacements
from merit.merge.result import Displacements
from merit.merge.stage import Judging
from merit.merge.weights import condense, weigh
from merit.mixture import read_counts
from merit.progress import Progress, count, silent
from merit.run import key
from merit.run.branches import branch_stages
from merit.run.machines import trained_on, unlike
from merit.run.scale_search import judge_scales
from merit.run.scope import Scope
from merit.run.session import Session
from merit.run.step import Step, Work, run_step
from merit.run.store import Stage
from merit.run.weight_search import log_file, search_run_weights
from merit.train.result import BranchResult

MODEL = "model"
"""Name of the merged checkpoint's folder, in the stage's."""


def merge_run(
    session: Session, scope: Scope, *, exclude: Sequence[int] = (), allow_missing: bool = False
) -> MergeResult:
    """Merge the run's branches into ``merged/model``.

    Args:
        session: The command's session.
        scope: The run, or one of its baselines.
        exclude: Branch numbers to leave out; the other weights are renormalised.
        allow_missing: Also leave out branches that are not trained yet.

    Raises:
        MergeError: A branch is not trained, or the branches are not compatible.
        RunFolderError: A branch is stale or damaged, or ``merged`` was made with other settings.
    """
    taking, left_out = choose_branches(session, scope, exclude, allow_missing)
    recipe = session.recipe_of(scope)
    records = {k: stage.record() for k, stage in taking.items()}
    differing = unlike(records)
    whose = "" if scope.method is None else f"{scope.method}: "
    summary = f"{whose}{count(len(taking), 'branch')}, {recipe.merge.operator}"

    def make(work: Work) -> MergeResult:
        result = make_merge(session, scope, taking, left_out, work.folder / MODEL, work.progress)
        work.facts.update(result.record(), trained_on={str(k): trained_on(record) for k, record in records.items()})
        return result

    step = Step(
        "merge",
        key.merged_stage(recipe, scope, taking, base=session.base.fingerprint, excluded=left_out),
        make,
        load=lambda folder: MergeResult.load(folder / MODEL),
        seed=recipe.seed,
        describe=lambda _result: summary,
        notes=lambda result: [*differing, *condense(result.warnings, len(taking))],
        keep=(log_file(Path(MODEL)).name,),
    )
    return run_step(step, session)


def choose_branches(
    session: Session, scope: Scope, exclude: Sequence[int], allow_missing: bool
) -> tuple[dict[int, Stage], list[int]]:
    """Branches to merge, and the numbers of those left out.

    Raises:
        MergeError: A branch is not trained, an excluded number does not exist, or no branches are left.
    """
    branches = branch_stages(session, scope)
    unknown = sorted(set(exclude) - set(branches))
    if unknown:
        raise MergeError(f"--exclude {unknown[0]}: the run has branches 0 to {len(branches) - 1}.")
    wanted = {k: stage for k, stage in branches.items() if k not in exclude}
    missing = [k for k, stage in wanted.items() if not stage.is_done()]
    if missing and not allow_missing:
        names = ", ".join(map(str, missing))
        raise MergeError(
            f"merge: branches {names} of {len(branches)} are not trained yet in {scope.root / 'branches'}.",
            f"Train them (`merit train {session.run} --branch {missing[0]}`), or merge the others with "
            "--allow-missing or --exclude; the weights are then renormalised, and card and record say so.",
            "Nothing was written.",
        )
    taking = {k: stage for k, stage in wanted.items() if k not in missing}
    if not taking:
        raise MergeError("merge: no branches are left to merge.")
    for stage in taking.values():
        stage.verify()
    return taking, sorted(set(branches) - set(taking))


def make_merge(
    session: Session,
    scope: Scope,
    taking: Mapping[int, Stage],
    left_out: Sequence[int],
    output: Path,
    progress: Progress,
) -> MergeResult:
    """Write the merged checkpoint into ``output``, with how far every model moved in its record.

    What was searched is drawn next to it (scale.svg, weights.svg).
    """
    settings = session.recipe_of(scope).merge
    if settings.dtype is None and session.recipe_of(scope).train.save_dtype == "float32":
        settings = settings.model_copy(update={"dtype": "base"})  # the branches need not have the base's dtype
    trained = {k: BranchResult.load(stage.path).of_round for k, stage in taking.items()}
    branches = weigh(settings.weights, trained, len(taking) + len(left_out))
    result = merge_branches(
        session.base,
        [
            replace(branch, fingerprint=key.model_content(stage))
            for branch, stage in zip(branches, taking.values(), strict=True)
        ],
        output,
        settings,
        excluded=[f"branch {k}" for k in left_out],
        judge=Judging(
            partial(judge_scales, session, scope.reports_half(session.recipe)),
            partial(search_run_weights, session, session.recipe_of(scope), _tokens(session, taking)),
        ),
        progress=progress,
    )
    found = how_far(session, [branch.path for branch in branches], output, progress)
    result = replace(result, displacements=found)
    result.save(output)
    if result.scale_search is not None:
        write_text(output / "scale.svg", trade_off_svg(result.scale_search))
    if result.weight_search is not None:
        write_text(output / "weights.svg", weights_svg(result.weight_search))
        log_file(output).unlink(missing_ok=True)
    return result


def how_far(session: Session, branches: Sequence[Path], model: Path, progress: Progress = silent) -> Displacements:
    """How far branches and a model lie from the run's base, over the weights that its training may change."""
    names = list(read_headers(session.base.folder, "model").tensors)
    moved = trainable_names(names, session.recipe.model.trainable, session.base.family)
    return measure_displacements(session.base.folder, branches, model, moved, progress)


def _tokens(session: Session, taking: Mapping[int, Stage]) -> list[dict[str, int]]:
    """Tokens by dataset of every branch that is merged."""
    counts = {item.name: item.tokens for item in read_counts(session.run / "mixture")}
    return [{name: counts[name] for name in stage.settings["group"]} for stage in taking.values()]
