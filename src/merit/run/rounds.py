"""Training in rounds: each branch trains 1/R of its budget, all are merged, and the next round starts from the merge.

Here: the order of rounds, the merges between them, and what is removed when. A round is closed once its merge has a record:
nothing in it is trained again. With one round this module only passes on.

Source: beyond the paper; the scheme is that of DiLoCo, Douillard et al., arXiv 2311.08105, on the groups of the split.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from merit.errors import Interrupted, MergeError, RecipeError, UserError
from merit.hf import checkpoint
from merit.launch.job import BranchCrashed
from merit.merge import MergeResult, merge_branches
from merit.merge.outer import outer_step
from merit.merge.weights import weigh
from merit.mixture import Mixture
from merit.progress import size
from merit.recipe.schema import MergeSettings
from merit.run import key
from merit.run.branches import BranchId, round_stages
from merit.run.resplit import split_again
from merit.run.round_stages import STATE, RoundStages, weight_bytes
from merit.run.scope import Scope
from merit.run.session import Session
from merit.run.step import stands
from merit.run.store import Stage, stale
from merit.run.training import train_branches
from merit.train.result import BranchResult
from merit.train.rounds import Round


def train_rounds(session: Session, mixture: Mixture, scopes: Sequence[Scope] | None = None) -> None:
    """Train every branch of some scopes, with the merges between the rounds.

    Args:
        session: The command's session.
        mixture: Its encoded rows.
        scopes: Whose branches. Default: the run's and its baselines'.

    Raises:
        UserError: A branch cannot be trained, or a merge made.
        Interrupted: Stopped from outside; the same command resumes, between rounds or inside one.
    """
    scopes = session.scopes if scopes is None else scopes
    for scope in scopes:
        _check_steps(session, scope, mixture)
    most = max(session.recipe_of(scope).rounds for scope in scopes)
    for number in range(1, most):
        taking_part = [scope for scope in scopes if session.recipe_of(scope).rounds > number]
        waiting = [scope for scope in taking_part if not _close(session, scope, number)]
        session.reporter.stage("train", f"round {number} of {most}{'' if waiting else ' (done before)'}")
        if branches := [branch for scope in waiting for branch in _branches(session, scope, number, mixture)]:
            _train(session, branches)
        for scope in waiting:
            merge_round(session, scope, number)
    last = [
        replace(branch, round=None)
        for scope in scopes
        for branch in _branches(session, scope, session.recipe_of(scope).rounds, mixture)
    ]
    _train(session, last)


def _check_steps(session: Session, scope: Scope, mixture: Mixture) -> None:
    """Refuse more rounds than a branch has steps, before the first is trained.

    Raises:
        TrainingError: A branch has fewer.
    """
    recipe = session.recipe_of(scope)
    if recipe.rounds > 1 and not recipe.train.between.resplit:
        for group in round_stages(session, scope).groups(1):
            rows = sum(mixture.rows[name] for name in group)
            Round(1, recipe.rounds).span(rows, recipe.train.batch_size, recipe.train.epochs)


def _close(session: Session, scope: Scope, number: int) -> bool:
    """Whether a round is closed; with ``redo``, one that no longer matches is opened again.

    Raises:
        StaleStageError: It does not match the recipe.
    """
    rounds = round_stages(session, scope)
    made = rounds.made(number)
    if not made.begun:
        return False
    if not (changes := rounds.changes(number)):
        _remove_unneeded(rounds, number)
        return True
    if not session.redo:
        raise stale(made.path, made.name, changes)
    session.reporter.note(f"{made.name}: made with other settings or inputs; the round is trained again (--redo)")
    for stage in (*(rounds.unchecked(number, k) for k in rounds.branches(number)), made):
        if stage.begun:
            stage.clear()
    return False


def _branches(session: Session, scope: Scope, number: int, mixture: Mixture) -> Iterator[BranchId]:
    """The branches of a round, after a new split where one is asked for."""
    recipe = session.recipe_of(scope)
    if recipe.rounds > 1 and recipe.train.between.resplit and number > 1:
        split_again(session, round_stages(session, scope), number, mixture)
    for k in range(len(round_stages(session, scope).groups(number))):
        yield BranchId(scope.method, k, number)


def _train(session: Session, branches: Sequence[BranchId]) -> None:
    """Train branches; with ``allow_missing`` a branch that cannot be trained does not stop the others."""
    if not session.recipe.train.between.allow_missing or session.recipe.train.rounds == 1:
        train_branches(session, branches)
        return
    try:
        train_branches(session, branches)
        return
    except Interrupted:
        raise
    except (UserError, BranchCrashed) as error:
        session.reporter.note(f"a branch failed: {error}")
    for branch in branches:  # those that are done are passed over, others go on from their checkpoints
        try:
            train_branches(session, [branch])
        except Interrupted:
            raise
        except (UserError, BranchCrashed) as error:
            session.reporter.note(f"branch {branch} is left out (train.between.allow_missing): {error}")


# ---- the merge between two rounds -------------------------------------------------------------------------------------


def merge_round(
    session: Session, scope: Scope, number: int, *, exclude: Sequence[int] = (), allow_missing: bool = False
) -> Stage:
    """Merge a round that is not the last into what the next one starts from, with the outer step.

    The weights count what each branch trained on in this round. The record says what is missing and how many bytes moved.

    Args:
        session: The command's session.
        scope: The run, or one of its baselines.
        number: Of the round.
        exclude: Branches to leave out.
        allow_missing: Also leave out those that are not trained; always so with ``train.between.allow_missing``.

    Raises:
        MergeError: A branch is not trained, or none is.
        RunFolderError: A branch is stale or damaged, or the round was merged with others.
    """
    rounds = round_stages(session, scope)
    branches = rounds.branches(number)
    taking = {k: stage for k, stage in branches.items() if k not in exclude and stage.is_done()}
    missing = sorted(branches.keys() - taking.keys() - set(exclude))
    if missing and not (allow_missing or rounds.recipe.train.between.allow_missing):
        raise MergeError(
            f"merge: branches {', '.join(map(str, missing))} of round {number} are not trained yet in "
            f"{rounds.folder(number) / 'branches'}.",
            f"Train them (`merit train {session.run} --branch {missing[0]} --round {number}`), or merge the others with "
            "--allow-missing or --exclude (train.between.allow_missing).",
            "Nothing was written.",
        )
    if not taking:
        raise MergeError(f"merge: no branches of round {number} are left to merge.", "Nothing was written.")
    stage = rounds.merged(number, taking)
    if stands(stage, session):
        return stage
    for branch in taking.values():
        branch.verify()
    start = rounds.start(number) or session.base.folder
    session.reporter.stage("merge", f"{stage.name}: {len(taking)} of {len(branches)} branches")
    with stage.writing(rounds.recipe.seed) as record:
        result = _merge(session, rounds, number, taking, start, stage.path)
        moved = checkpoint.read_headers(stage.path / "model").nbytes
        record |= result.record() | {
            "model_fingerprint": checkpoint.fingerprint(stage.path / "model"),
            "missing": missing,
            "excluded": sorted(exclude),
            "bytes_in": sum(weight_bytes(branch) for branch in taking.values()),
            "bytes_out": moved * len(branches),
        }
    for k in missing:
        session.reporter.note(f"{stage.name}: without branch {k}; the other weights are renormalised")
    facts = stage.record().facts
    session.reporter.say(f"  {stage.name}: {size(facts['bytes_in'])} in, {size(facts['bytes_out'])} out")
    _remove_unneeded(rounds, number)
    return stage


def _merge(
    session: Session, rounds: RoundStages, number: int, taking: Mapping[int, Stage], start: Path, folder: Path
) -> MergeResult:
    """Write ``folder/model`` (and ``folder/momentum``), in float32."""
    recipe = rounds.recipe
    outer = recipe.train.between.outer
    rule = recipe.merge.weights
    trained = {k: BranchResult.load(stage.path).of_round for k, stage in taking.items()}
    parts = weigh(rule, trained, len(rounds.groups(number)))
    parts = [
        replace(part, fingerprint=key.model_content(stage)) for part, stage in zip(parts, taking.values(), strict=True)
    ]
    settings = MergeSettings(operator=recipe.merge.operator, options=recipe.merge.options, dtype="float32")
    output = folder / ("model" if outer.is_merge else "plain")
    with session.reporter.progress("merge") as tick:
        result = merge_branches(start, parts, output, settings, progress=tick)
    if not outer.is_merge:
        before = rounds.made(number - 1).path / "momentum" if number > 1 else None
        outer_step(start, output, before, folder, outer)
        shutil.rmtree(output)
    return result


def merge_round_alone(session: Session, number: int, *, exclude: Sequence[int], allow_missing: bool) -> MergeResult:
    """`merit merge RUN --round I`: the merge of a round that is not the last, of the run itself.

    Raises:
        RecipeError: There is no such round.
    """
    last = session.recipe.rounds
    if not 1 <= number < last:
        raise RecipeError(
            f"--round {number}: the merges between rounds are 1 to {last - 1} (train.rounds: {last}); `merit merge` without "
            "--round makes the last."
            if last > 1
            else f"--round {number}: train.rounds is 1, so `merit merge` without --round makes the only merge."
        )
    stage = merge_round(session, session.scope, number, exclude=exclude, allow_missing=allow_missing)
    return MergeResult.load(stage.path / "model")


def open_round(session: Session, branch: BranchId) -> BranchId:
    """A branch whose round is not named: that of the first round without a merge."""
    scope = Scope(session.run, branch.root)
    if branch.round is not None or session.recipe_of(scope).rounds == 1:
        return branch
    rounds = round_stages(session, scope)
    number = rounds.open_round()
    return branch if number == rounds.last else replace(branch, round=number)


def _remove_unneeded(rounds: RoundStages, number: int) -> None:
    """Remove what nothing needs once a round is closed: its branches' weights, and what they went on from.

    Records, logs and results stay. What the next round needs stays until that one is closed: the merge, and each branch's
    ``state``.
    """
    if rounds.recipe.train.between.keep_files:
        return
    for k in rounds.branches(number):
        folder = rounds.unchecked(number, k).path
        shutil.rmtree(folder / "model", ignore_errors=True)
        if (folder / STATE).is_dir():
            for earlier in range(1, number):
                shutil.rmtree(rounds.unchecked(earlier, k).path / STATE, ignore_errors=True)
    for earlier in range(1, number):
        for name in ("model", "momentum"):
            shutil.rmtree(rounds.made(earlier).path / name, ignore_errors=True)
