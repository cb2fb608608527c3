"""The chain of stages, top to bottom: (prepare) → mixture → gradients → split → branches → merged → evaluation.

One short function per stage turns it into a :class:`Step`; :func:`run_step` does what all stages share. This module connects
packages that do not know each other. The commands of single stages call the functions ending in ``_alone``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from merit.conflict.compare import Comparison, compare_representations
from merit.conflict.result import Geometry
from merit.conflict.sample import Probe
from merit.conflict.stage import measure_gradients
from merit.errors import RunFolderError
from merit.files import differences
from merit.mixture import Mixture
from merit.mixture.stage import encode_mixture
from merit.progress import count
from merit.run import key
from merit.run.branches import BranchId
from merit.run.check import check_groups, check_preparation, make_plan
from merit.run.evaluating import evaluate_run
from merit.run.merging import merge_run
from merit.run.preparation import prepare
from merit.run.record import Record, shown
from merit.run.rounds import open_round, train_rounds
from merit.run.scope import Scope
from merit.run.session import Session
from merit.run.splitting import make_split
from merit.run.spreading import spread
from merit.run.status import ORDER, Known, Row, run_status
from merit.run.step import Step, Work, run_step, stands
from merit.run.store import WAYS_OUT, Stage, claim, lock, refuse_unfinished, split_of, stale
from merit.run.suites import run_suites
from merit.run.training import train_branches
from merit.split.placing import read_first
from merit.split.result import Split
from merit.split.view import needs_conflict

STAGES = ("prepare", "mixture", "gradients", "split", "train", "merge", "evaluate")
"""Names of the stages as commands, in order."""

_LAST = {"prepare": "prepared", "train": "branch", "merge": "merged", "evaluate": "evaluation"}
"""Kind of the last stage that a command makes, if its name differs."""

_NEXT = "`merit run` does every stage in order; `merit status RUN` shows what is done."


# ---- locking a run while a command works in it ------------------------------------------------------------------------


@contextlib.contextmanager
def begun(session: Session, command: str, until: str | None = None) -> Iterator[None]:
    """Lock the run folder while a command works in it; existing stages are compared with the recipe first.

    Args:
        session: The command's session.
        command: ``run`` or one of ``STAGES``.
        until: For ``run``: the last stage.

    Raises:
        RunFolderError: The folder is not a run folder, is in use, or an earlier stage is stale.
    """
    claim(session.run)
    refuse_unfinished(session.run)
    with lock(session.run, "this run"):
        refuse_stale(session, command, until)
        session.write_recipe()
        yield


def refuse_stale(session: Session, command: str, until: str | None = None, *, own: bool = True) -> None:
    """Refuse, before anything is changed, stages that were made with another recipe.

    With ``redo`` a stage command may rerun its own stage, and ``run`` may rerun all; earlier stages are never rerun.

    Args:
        session: The command's session.
        command: ``run`` or one of ``STAGES``.
        until: For ``run``: the last stage.
        own: Also check the command's own stage.

    Raises:
        StaleStageError: A stage does not match; the message lists the changed fields.
        RunFolderError: A record or a split is damaged.
    """
    if command == "run" and session.redo:
        return
    last = _rank(until or "evaluate") if command == "run" else _rank(command) - (session.redo or not own)
    known = Known()
    if session.base_stands:
        known = Known(base=session.base.fingerprint)
        if command not in ("merge", "prepare"):  # they read neither rows nor tokenizer
            known = Known(session.base.fingerprint, session.base.input_fingerprint, session.sources)
    for row in run_status(session.run, session.recipe, known).stages:
        if ORDER.index(row.kind) > last:
            continue
        if row.state == "damaged":
            raise RunFolderError(row.detail, f"Remove the folder {row.folder} and run the same command again.")
        if changed := _counted(row):
            raise stale(Path(row.folder), row.stage, changed, _ways_out(command, row, session.run))


def _rank(command: str) -> int:
    return ORDER.index(_LAST.get(command, command))


def _ways_out(command: str, row: Row, run: Path) -> str:
    """Of a stale stage; for `merit merge`, --output is the merged checkpoint's folder and not the run's."""
    if command != "merge":
        return WAYS_OUT
    if row.kind == "merged":
        return "write this merge elsewhere (--output DIR); or replace the run's own (--redo); or change these back"
    return f"change these back; or rerun it and what depends on it (`merit run RECIPE --output {run} --redo`)"


def _counted(row: Row) -> list[str]:
    """An evaluation is updated automatically when only the models changed."""
    if row.kind == "evaluation":
        return [change for change in row.changed if not change.startswith("input.")]
    return row.changed


# ---- mixture ----------------------------------------------------------------------------------------------------------


def mixture(session: Session) -> Mixture:
    """Read, encode and count every dataset."""
    recipe, base = session.recipe, session.base
    stage = key.mixture_stage(recipe, session.run, tokenizer=base.input_fingerprint, sources=session.sources)

    def make(work: Work) -> Mixture:
        work.facts["chat_template"] = base.template.origin
        return encode_mixture(
            session.found,
            base,
            work.folder,
            max_length=recipe.train.max_length,
            seed=recipe.seed,
            progress=work.progress,
        )

    step = Step(
        "mixture", stage, make, Mixture.load, recipe.seed, describe=_describe_mixture, notes=_mixture_notes,
        begin="reading and tokenising", unit="datasets",
    )  # fmt: skip
    return run_step(step, session)


def _describe_mixture(mixture: Mixture) -> str:
    rows, targets = sum(mixture.rows.values()), sum(mixture.target_tokens.values())
    dropped = sum(sum(item.rows_dropped.values()) for item in mixture.counts)
    text = f"{count(len(mixture.counts), 'dataset')}, {count(rows, 'row')}, {count(targets, 'target token')}"
    return text + (f", {count(dropped, 'row')} dropped" if dropped else "")


def _mixture_notes(mixture: Mixture) -> Iterator[str]:
    said = mixture.warnings
    yield from said[:_SHOWN]
    if len(said) > _SHOWN:
        yield f"and {len(said) - _SHOWN} more in {mixture.folder / 'datasets.json'}"


_SHOWN = 8  # notes on datasets that are printed; all are in the files


# ---- gradients --------------------------------------------------------------------------------------------------------


def conflict_stage(session: Session, mixture: Mixture, scope: Scope | None = None) -> Stage:
    """The gradients' stage of the run, or of a study's seed, as requested now."""
    scope = scope or session.scope
    recipe = session.recipe_of(scope) if scope.shared != session.run else session.recipe
    return key.conflict_stage(recipe, scope.shared, base=session.base.fingerprint, rows=mixture.fingerprints)


def gradients(session: Session, mixture: Mixture, scope: Scope | None = None) -> Geometry:
    """One gradient per dataset at the base, and their geometry."""
    stage = conflict_stage(session, mixture, scope)
    recipe, seed = session.recipe, int(stage.settings["seed"])
    datasets = count(len(mixture.counts), "dataset")

    def make(work: Work) -> Geometry:
        spread(session, "gradients", [list(mixture.train)], work.folder, work.progress)
        geometry = measure_gradients(
            mixture.train,
            session.base,
            recipe.conflict,
            seed,
            work.folder,
            device=session.device,
            jobs=session.jobs,
            split=recipe.split,
            progress=work.progress,
        )
        work.facts.update(geometry.facts(), device=str(session.device), jobs=session.jobs)
        return geometry

    step = Step(
        "gradients", stage, make, Geometry.load, seed,
        describe=lambda _geometry: f"{datasets}, {recipe.conflict.representation}",
        begin=f"{datasets} at the base", keep=("partial",),
    )  # fmt: skip
    return run_step(step, session)


# ---- split ------------------------------------------------------------------------------------------------------------


def split(session: Session, scope: Scope, mixture: Mixture) -> Split:
    """Groups of datasets of the run, or of a baseline."""
    recipe = session.recipe_of(scope)
    method = recipe.split.method
    cut = recipe.split.groups is None
    measured = conflict_stage(session, mixture, scope) if needs_conflict(method) and cut else None
    if measured is not None and not stands(measured, session):
        raise RunFolderError(
            f"split.method {method} needs the gradients, which are not measured yet ({measured.path}).",
            _NEXT,
        )
    content = measured.record().outputs["geometry.npz"].xxh3 if measured is not None else None
    stage = key.split_stage(recipe, scope, rows=mixture.fingerprints, geometry=content)

    first = read_first(stage.path)

    def make(work: Work) -> Split:
        result = make_split(recipe, mixture, None if measured is None else Geometry.load(measured.path), work.folder)
        if first is not None:
            first.save(work.folder)
        work.facts["left_out"] = result.left_out
        return result

    def describe(split: Split) -> str:
        sizes = " + ".join(str(len(group)) for group in split.groups)
        return f"{scope.method or method}: {count(len(split.groups), 'group')} of {sizes} datasets"

    step = Step(
        "split", stage, make, Split.load, recipe.seed, describe=describe, notes=lambda split: split.warnings
    )  # fmt: skip
    return run_step(step, session)


def splits(session: Session, mixture: Mixture) -> None:
    """The run's split and every baseline's."""
    for scope in session.scopes:
        split(session, scope, mixture)


# ---- all of it --------------------------------------------------------------------------------------------------------


def run_chain(session: Session, until: str = "evaluate") -> None:
    """The whole chain up to and including ``until``, resuming from what is done.

    Raises:
        UserError: A stage cannot be done, or was done with other settings.
        Interrupted: Stopped from outside; the same command resumes.
    """
    wanted = STAGES[: STAGES.index(until) + 1]
    if session.sources_here:
        for note in make_plan(session).notes:
            session.reporter.note(note)
    else:
        session.reporter.note("the mixture's source files are gone; the rows already encoded from them are used")
    with begun(session, "run", until):
        if session.given.prepare is not None or until == "prepare":
            prepare(session, run_chain)
            session = session.reopened()
        if "mixture" not in wanted:
            return
        encoded = mixture(session)
        check_groups(session.recipe, len(encoded.counts))
        methods = [session.recipe.split.method, *session.recipe.baselines]
        if "gradients" in wanted and any(needs_conflict(method) for method in methods):
            gradients(session, encoded)
        if "split" in wanted:
            splits(session, encoded)
        if "train" in wanted:
            train_rounds(session, encoded)
        if "merge" in wanted:
            merges(session)
        if "evaluate" in wanted:
            evaluate_run(session)
            run_suites(session)


def merges(session: Session) -> None:
    """The run's merge and every baseline's (joint has one branch and needs none)."""
    allow_missing = session.recipe.train.rounds > 1 and session.recipe.train.between.allow_missing
    for scope in session.scopes:
        if scope.method != "joint":
            merge_run(session, scope, allow_missing=allow_missing)


# ---- one stage --------------------------------------------------------------------------------------------------------


def prepare_alone(session: Session) -> Path:
    """`merit prepare`: only the preparation; the recipe's own mixture need not exist yet.

    Raises:
        RecipeError: The recipe has no ``prepare`` block.
    """
    if session.given.prepare is not None and not session.base_stands:
        check_preparation(session.given, session.run)
    with begun(session, "prepare"):
        return prepare(session, run_chain)


def gradients_alone(session: Session, *, compare: bool) -> tuple[Record, Geometry, list[Comparison] | None]:
    """`merit gradients`: the record, the geometry, and a comparison of sketch and stride cosines with exact ones."""
    make_plan(session)
    comparison = None
    with begun(session, "gradients"):
        encoded = mixture(session)
        geometry = gradients(session, encoded)
        stage = conflict_stage(session, encoded)
        if compare:
            probe = Probe(session.base, session.recipe.conflict, session.recipe.seed, session.device)
            with session.reporter.progress("exact gradients") as tick:
                comparison = compare_representations(encoded.train, probe, stage.path, jobs=session.jobs, progress=tick)
    return stage.record(), geometry, comparison


def split_alone(session: Session) -> Split:
    """`merit split`: the run's split, and every baseline's."""
    with begun(session, "split"):
        splits(session, mixture(session))
    return split_of(session.run)


def train_alone(session: Session, branches: Sequence[BranchId] | None) -> None:
    """`merit train`, on any machine that has recipe, split, data and base.

    With named branches the run folder is not locked, so several processes can train different ones.
    """
    if branches is None:
        with begun(session, "train"):
            train_rounds(session, _rows_for_training(session))
        return
    claim(session.run)
    refuse_stale(session, "train", own=False)
    if not (session.run / "recipe.yaml").is_file():
        session.write_recipe()
    _rows_for_training(session)
    train_branches(session, [open_round(session, branch) for branch in branches])


def require_split(session: Session) -> None:
    """Refuse, before anything is read, a stage that needs the groups.

    Raises:
        RunFolderError: A split is missing.
    """
    for scope in session.scopes:
        record = Stage("split", scope.root / "split").record_file
        if not record.is_file():
            raise RunFolderError(
                f"{record} is missing: the mixture is not split yet, so there is no branch to train, merge or evaluate.",
                _NEXT,
            )


def _rows_for_training(session: Session) -> Mixture:
    """Encoded rows on this machine, if they are the ones that the split was made from.

    Raises:
        RunFolderError: There is no split, or the rows here differ.
    """
    require_split(session)
    encoded = mixture(session)
    rows = {f"{key.ROWS}{name}": value for name, value in encoded.fingerprints.items()}
    inputs = Stage("split", session.run / "split").record().inputs
    made_from = {name: value for name, value in inputs.items() if name.startswith(key.ROWS)}
    if made_from != rows:
        raise RunFolderError(
            f"{session.run}: the training rows here are not those that the split was made from:",
            *shown(differences(made_from, rows)),
            "Use the same data, base tokenizer, train.max_length and mixture settings as where the split was made, or split "
            "again.",
        )
    return encoded


def evaluate_alone(session: Session) -> None:
    """`merit evaluate`."""
    require_split(session)
    with begun(session, "evaluate"):
        mixture(session)
        evaluate_run(session)
        run_suites(session)
