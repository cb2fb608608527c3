"""`merit add` and `merit remove`: one dataset more or less, and one branch trained again.

Everything that can be refused is refused before anything is changed; from then on ``change.json`` says what is under way,
and the same command goes on with it. The new recipe lists the groups (``split.groups``), so later commands find every stage
as they expect it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from merit.errors import RecipeError, RunFolderError
from merit.mixture import find_datasets, read_counts
from merit.recipe.load import changed, dump_recipe, locate, parse_recipe
from merit.recipe.schema import DatasetSettings, MixtureSettings, Recipe
from merit.run import key
from merit.run.branches import BranchId, branch_stages
from merit.run.chain import gradients, mixture, split
from merit.run.change import Change, Statement, checksums, load_change, sentences
from merit.run.evaluating import evaluate_run
from merit.run.merging import merge_run
from merit.run.placement import encode_alone, first_split, place_by_scores
from merit.run.record import shown
from merit.run.session import Session
from merit.run.status import Known, run_status
from merit.run.store import CHANGE, Stage, lock, split_of, stale
from merit.run.training import train_branches
from merit.split.view import needs_conflict


def add_dataset(
    session: Session,
    item: DatasetSettings,
    *,
    branch: int | None = None,
    own_branch: bool = False,
    evaluate: bool = False,
    overrides: Sequence[str] = (),
) -> Statement:
    """Encode a dataset, measure its gradient, put it into a branch and train that one again.

    Args:
        session: A session of the finished run.
        item: The dataset.
        branch: Put it there instead of where its scores say.
        own_branch: Make a branch for it alone.
        evaluate: Evaluate again.
        overrides: What the session's recipe was opened with, for a change that goes on.

    Raises:
        UserError: The run is not finished, or the dataset cannot be added; nothing was changed then.
        Interrupted: Stopped from outside; the same command goes on.
    """
    with lock(session.run, "this run"):
        change = _unfinished(session, "add", item.name, overrides)
        if change is None:
            groups = _check(session)
            _refuse_name(session, item.name)
            change = _plan_addition(session, item, groups, branch, own_branch)
            change = _with_state(session, change, evaluate)
            change.save(session.run)
        return _carry_out(session, change)


def remove_dataset(session: Session, name: str, *, evaluate: bool = False, overrides: Sequence[str] = ()) -> Statement:
    """Train the branch of a dataset again without it.

    Args:
        session: A session of the finished run.
        name: The dataset.
        evaluate: Evaluate again.
        overrides: As in :func:`add_dataset`.

    Raises:
        UserError: The run is not finished, or has no such dataset; nothing was changed then.
        Interrupted: Stopped from outside; the same command goes on.
    """
    with lock(session.run, "this run"):
        change = _unfinished(session, "remove", name, overrides)
        if change is None:
            change = _plan_removal(session, name, _check(session))
            change = _with_state(session, change, evaluate)
            change.save(session.run)
        return _carry_out(session, change)


def dataset_entry(text: str, name: str | None = None, test: str | None = None) -> DatasetSettings:
    """A dataset from the command line: a file, a folder with ``train`` and ``test`` files, or a recipe's entry in YAML.

    Raises:
        RecipeError: It is none of these.
    """
    given: dict[str, Any]
    if text.lstrip().startswith("{"):
        try:
            given = dict(yaml.safe_load(text))
        except (yaml.YAMLError, TypeError, ValueError):
            raise RecipeError(f"{text!r} is not a recipe's dataset entry such as {{name: a, path: a.jsonl}}.") from None
    else:
        path = Path(text)
        own = path.parent.name if path.stem == "train" else path.name.split(".")[0]
        given = {"name": path.name if path.is_dir() else own, "path": text}
    given |= {key: value for key, value in (("name", name), ("test", test)) if value is not None}
    block = {"name": "add", "model": {"base": "base"}, "mixture": {"datasets": [given]}}
    item = (parse_recipe(block, where="DATASET").mixture.datasets or [])[0]
    if item.split_by is not None:
        raise RecipeError(f"{item.name}: split_by makes several datasets of one; add them one by one.")
    return item.model_copy(update={"path": locate(item.path, Path.cwd())})


# ---- checks ------------------------------------------------------------------------------------------------------------


def _unfinished(session: Session, kind: str, name: str, overrides: Sequence[str]) -> Change | None:
    """The change that this command began earlier, with the settings of now for how and where to compute.

    Raises:
        RunFolderError: Another one is unfinished, or the base or a source is another one than when it began.
        RecipeError: A setting of now would change what is being made.
    """
    change = load_change(session.run)
    if change is not None and (change.kind, change.dataset) != (kind, name):
        raise RunFolderError(
            f"{session.run}: `merit {change.kind}` of {change.dataset} is not finished.",
            f"`merit {change.kind} {session.run} {change.dataset}` goes on with it.",
        )
    if change is None:
        return None
    if change.base and change.base != session.base.fingerprint:
        raise RunFolderError(
            f"{session.run}: `merit {kind}` of {name} was begun with another base ({session.base.folder} has changed).",
            "Put the old one back (model.base); no branch can be trained again from another base.",
        )
    begun, stored = yaml.safe_load(change.recipe), str(session.run / CHANGE)
    old = parse_recipe(begun, where=stored, folder=session.run)
    new = parse_recipe(begun, overrides, where=stored, folder=session.run)
    if other := key.deciding_changes(old, new, session.run):
        raise RecipeError(
            f"{session.run}: `merit {kind}` of {name} goes on with the settings that it began with; --set changes:",
            *shown(other),
            "Only settings of how and where to compute (train.device, launch, ...) and of the evaluation may change.",
        )
    _refuse_other_rows(session, new)
    return replace(change, recipe=dump_recipe(new))


def _check(session: Session) -> list[list[str]]:
    """The run's groups, if one of its branches can be trained again alone.

    Raises:
        RunFolderError: The run is not trained and merged, or a stage is stale.
        RecipeError: Its settings do not allow it.
    """
    recipe = session.recipe
    rows = run_status(session.run, recipe, Known(base=session.base.fingerprint)).stages
    for row in rows:
        if row.state in ("stale", "damaged") and row.kind != "evaluation":
            raise stale(Path(row.folder), row.stage, row.changed or [row.detail])
    if recipe.rounds > 1:
        raise RecipeError(
            f"train.rounds is {recipe.rounds}: after the first round every branch depends on all datasets, so none can be "
            "trained again alone.",
            "Run the new mixture again in another folder (--output DIR), or use rounds: 1.",
        )
    if recipe.mixture.temperature != 1:
        raise RecipeError(
            f"mixture.temperature is {recipe.mixture.temperature:g}: the rows of every dataset depend on all others.",
            "Run the new mixture again in another folder (--output DIR).",
        )
    stages = [*branch_stages(session, session.scope).values(), Stage("merged", session.run / "merged")]
    missing = next((stage for stage in stages if not stage.begun), None)
    if missing is not None:
        raise RunFolderError(f"{missing.path} is not made yet.", f"`merit run {session.run}` finishes the run first.")
    return split_of(session.run).groups


def _refuse_name(session: Session, name: str) -> None:
    counts = [item.name for item in read_counts(session.run / "mixture")]
    if name in counts or name in (source.name for source in session.found.kept):
        raise RecipeError(f"{name}: the run has a dataset of that name.", "Give another one (--name NAME).")


# ---- adding ------------------------------------------------------------------------------------------------------------


def _plan_addition(
    session: Session, item: DatasetSettings, groups: list[list[str]], branch: int | None, own_branch: bool
) -> Change:
    """Where the dataset goes, found out without changing anything.

    Raises:
        UserError: It cannot be encoded, measured or placed.
    """
    encoded = encode_alone(session, item)
    rows = encoded.train[item.name]
    first, scores = None, None
    if own_branch:
        place = len(groups)
    elif branch is not None:
        place = branch
    else:
        first, scores, place = place_by_scores(session, item.name, rows, groups)
    if not 0 <= place < len(groups) + own_branch:
        raise RecipeError(f"--branch {place}: the split has {len(groups)} groups, numbered from 0.")
    first = first or first_split(session, groups, None)
    new = [*groups, []] if own_branch else groups
    new = [[*group, item.name] if k == place else group for k, group in enumerate(new)]
    session.reporter.stage("add", f"{item.name} goes to branch {place}{' of its own' if own_branch else ''}")
    added = [*session.given.mixture.added, item]
    recipe = _changed(session, new, [("mixture.added", [entry.model_dump(mode="json") for entry in added])])
    return Change(
        "add",
        item.name,
        place,
        rows.fingerprint,
        dump_recipe(recipe),
        new=own_branch,
        scores=scores,
        cuts=first.cuts if first is not None and scores is not None else None,
        first=first,
    )


# ---- removing ----------------------------------------------------------------------------------------------------------


def _plan_removal(session: Session, name: str, groups: list[list[str]]) -> Change:
    """What is left without a dataset.

    Raises:
        RecipeError: There is no such dataset, or its branch would be empty and is not the last.
    """
    found = [k for k, group in enumerate(groups) if name in group]
    if not found:
        raise RecipeError(
            f"{name}: none of the run's branches is trained on a dataset of that name.",
            f"Its datasets: {', '.join(sorted(t for group in groups for t in group))}.",
        )
    (place,) = found
    alone = len(groups[place]) == 1
    if alone and (place != len(groups) - 1 or len(groups) == 1):
        raise RecipeError(
            f"{name} is the only dataset of branch {place}, which would be left empty.",
            f"`merit merge {session.run} --exclude {place} --redo` leaves the whole branch out: no other one saw it.",
        )
    counts = {item.name: item for item in read_counts(session.run / "mixture")}
    new = [[t for t in group if t != name] for group in groups if group != [name]]
    return Change(
        "remove",
        name,
        place,
        counts[name].fingerprint,
        dump_recipe(_changed(session, new, _without(session.given.mixture, name))),
        new=alone,
        first=first_split(session, groups, None),
    )


def _without(mixture: MixtureSettings, name: str) -> list[tuple[str, Any]]:
    """Changes of a mixture that take a dataset out."""
    if any(item.name == name for item in mixture.added):
        rest = [item.model_dump(mode="json") for item in mixture.added if item.name != name]
        return [("mixture.added", rest)]
    if any(item.name == name and item.split_by is None for item in mixture.datasets or ()):
        rest = [item.model_dump(mode="json") for item in mixture.datasets or () if item.name != name]
        return [("mixture.datasets", rest)]
    return [("mixture.exclude", [*mixture.exclude, name])]


# ---- doing it ----------------------------------------------------------------------------------------------------------


def _changed(session: Session, groups: list[list[str]], changes: list[tuple[str, Any]]) -> Recipe:
    """The run's recipe with other datasets and groups. Its baselines are of the old mixture, so they are taken out."""
    if session.given.baselines:
        names = ", ".join(session.given.baselines)
        session.reporter.note(
            f"baselines {names} were trained on the old mixture and are taken out of the run's recipe; their files stay."
        )
    recipe = changed(session.given, [*changes, ("split.groups", groups), ("baselines", [])])
    _refuse_other_rows(session, recipe)
    return recipe


def _refuse_other_rows(session: Session, recipe: Recipe) -> None:
    """Refuse sources that changed since they were encoded: more than one branch would have to be trained again.

    Raises:
        MixtureError: A source is missing.
        RunFolderError: A source has other content than when it was encoded.
    """
    with session.hashes() as known:
        now = find_datasets(recipe.mixture, recipe.evaluate).fingerprints(known)
    stage = Stage("mixture", session.run / "mixture")
    if not stage.begun:  # stopped while the rows were being encoded again
        return
    inputs = stage.record().inputs
    before = {name.removeprefix(key.SOURCE): value for name, value in inputs.items() if name.startswith(key.SOURCE)}
    other = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    if other:
        raise RunFolderError(
            f"{session.run}: the source of {other[0]} has changed since it was encoded, so its branch would change, too.",
            "Put the old file back, or run the new mixture again in another folder (--output DIR). Nothing was changed.",
        )


def _carry_out(session: Session, change: Change) -> Statement:
    """Write the new recipe and make what follows from it: only one branch is trained."""
    run = session.run
    recipe = parse_recipe(yaml.safe_load(change.recipe), where=str(run / CHANGE), folder=run)
    session = Session(recipe, run, session.reporter, session.jobs, redo=True)
    if change.first is not None and (run / "split").is_dir():
        change.first.save(run / "split")
    session.write_recipe()
    encoded = mixture(session)
    if needs_conflict(recipe.split.method):
        gradients(session, encoded, session.scope)
    groups = split(session, session.scope, encoded).groups
    train_branches(session, [BranchId(None, k) for k in range(len(groups))])
    if change.kind == "remove" and change.new:
        shutil.rmtree(run / "branches" / str(change.branch), ignore_errors=True)
    merge_run(session, session.scope, exclude=[k for k in change.excluded if k < len(groups)])
    if change.evaluate:
        evaluate_run(session)
    statement = _state(run, change, groups)
    statement.save(run)
    (run / CHANGE).unlink()
    return statement


def _with_state(session: Session, change: Change, evaluate: bool) -> Change:
    """The change with what the run is like before it."""
    excluded = key.left_out(session.scope)
    before, base = checksums(session.run), session.base.fingerprint
    return replace(change, evaluate=evaluate, before=before, excluded=excluded, base=base)


def _state(run: Path, change: Change, groups: list[list[str]]) -> Statement:
    after = checksums(run)
    folders = sorted(change.before.keys() | after.keys())
    pairs = {folder: (change.before.get(folder), after.get(folder)) for folder in folders}
    gone = change.kind == "remove" and change.new
    branch = None if gone else Stage("branch", run / "branches" / str(change.branch)).record()
    return Statement(
        kind=change.kind,
        dataset=change.dataset,
        branch=change.branch,
        new=change.new,
        scores=change.scores,
        cuts=change.cuts,
        rows=change.rows,
        retrained={folder: pair for folder, pair in pairs.items() if pair[0] != pair[1]},
        unchanged={folder: old for folder, (old, new) in pairs.items() if old is not None and old == new},
        group=[] if gone else groups[change.branch],
        target_tokens=int(branch.facts.get("target_tokens", 0)) if branch else 0,
        seconds=branch.seconds if branch else 0.0,
        sentences=sentences(change, change.before, after, len(groups)),
    )
