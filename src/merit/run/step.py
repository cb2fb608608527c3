"""How every stage is run: reused, refused as stale, rerun, locked, recorded, reported. Stages only compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from merit.progress import Progress, Reporter, duration
from merit.run.session import Session
from merit.run.store import Stage

R = TypeVar("R")


@dataclass(frozen=True)
class Work:
    """What a step's ``make`` receives.

    Attributes:
        folder: The stage's folder: everything it writes goes there.
        progress: To be called as the work advances.
        facts: What is put in here is written to the record.
    """

    folder: Path
    progress: Progress
    facts: dict[str, Any]


def _nothing(_result: object) -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class Step(Generic[R]):
    """A stage that can be made or loaded.

    Attributes:
        title: Its name on the terminal.
        stage: Its folder, and what determines its result.
        make: Writes the stage's files and returns the result.
        load: Loads the result from a finished stage's folder.
        seed: The recipe's seed.
        begin: Printed before it is made; nothing if empty.
        describe: Printed when it is done.
        notes: What the user should know about the result.
        keep: Names in the folder that an attempt may resume from.
        follows_inputs: Rerun automatically when only its inputs changed.
    """

    title: str
    stage: Stage
    make: Callable[[Work], R]
    load: Callable[[Path], R]
    seed: int
    describe: Callable[[R], str]
    begin: str = ""
    unit: str = ""
    notes: Callable[[R], Iterable[str]] = field(default=_nothing)
    keep: tuple[str, ...] = ()
    follows_inputs: bool = False


def run_step(step: Step[R], session: Session) -> R:
    """Load a stage if it is done and matches, or make it.

    Raises:
        StaleStageError: It does not match, and ``redo`` is off.
        RunFolderError: It is damaged, or another process is writing it.
    """
    reporter = session.reporter
    if stands(step.stage, session, follows_inputs=step.follows_inputs, keep=step.keep):
        result = step.load(step.stage.path)
        reporter.stage(step.title, f"{step.describe(result)} (done before)")
        _say_notes(step, result, reporter)
        return result
    if step.begin:
        reporter.stage(step.title, step.begin)
    with (
        step.stage.writing(step.seed, step.keep) as facts,
        reporter.progress(step.unit or step.title) as progress,
    ):
        result = step.make(Work(step.stage.path, progress, facts))
    reporter.stage(step.title, f"{step.describe(result)} ({duration(step.stage.record().seconds)})")
    _say_notes(step, result, reporter)
    return result


def stands(stage: Stage, session: Session, *, follows_inputs: bool = False, keep: tuple[str, ...] = ()) -> bool:
    """Whether a stage is done, matches and is undamaged; a stale one is refused, or removed with ``redo``.

    Raises:
        StaleStageError: It was made with other settings or inputs.
        RunFolderError: It is damaged.
    """
    if not stage.begun:
        return False
    changes = stage.changes()
    if not changes:
        stage.verify()
        return True
    if follows_inputs and all(change.startswith("input.") for change in changes):
        stage.clear(keep)
        return False
    if not session.redo:
        stage.is_done()
    session.reporter.note(f"{stage.name}: made with other settings or inputs; rerun (--redo)")
    stage.clear(keep)
    return False


def _say_notes(step: Step[R], result: R, reporter: Reporter) -> None:
    for note in step.notes(result):
        reporter.note(note)
