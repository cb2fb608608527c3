"""What is done in a run folder: read only from records, so it is quick and changes nothing.

A stage is *done* (its record matches the recipe), *stale* (made with other settings, or from an earlier stage's results that
no longer exist), *running* (a live process holds its lock), *partial* (begun, can be resumed), *damaged* or *missing*.
Source files and the base are not read here, so changes to them are only noticed by a stage command or `merit run`.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from merit.errors import RunFolderError
from merit.files import differences
from merit.launch.job import read_progress
from merit.mixture import read_counts
from merit.prepare import stage_folder, stage_recipe
from merit.progress import count, size
from merit.recipe.schema import Recipe
from merit.run import key
from merit.run.manifest import MANIFEST, RESULT, detached
from merit.run.record import OtherVersionError, Record
from merit.run.round_stages import RoundStages
from merit.run.scope import Scope, recipe_of, scopes_of
from merit.run.store import RECORD, Stage, is_locked, split_of

State = Literal["done", "stale", "running", "partial", "damaged", "missing"]
ORDER = ("assemble", "prepared", "mixture", "gradients", "split", "round", "branch", "merged", "evaluation")
"""Kinds of stages in the order of the chain."""


@dataclass(frozen=True)
class Live:
    """How far a branch has got, wherever it runs, by the file that it writes about once a second.

    Attributes:
        step: Optimizer steps taken.
        steps: Of all.
        loss: Of the last step (nats per target token).
        tokens_per_second: Target tokens.
        seconds_left: At the rate since its process began.
        machine: Where it runs.
        seen: Unix time (seconds) of its last sign of life, by the clock of that machine.
    """

    step: int
    steps: int
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    machine: str
    seen: float

    @classmethod
    def of(cls, folder: Path) -> Live | None:
        """Of a branch's folder; None if nothing is told there."""
        facts = read_progress(folder / "progress.json")
        if facts is None:
            return None
        loss, speed, left = (facts.get(key) for key in ("loss", "tokens_per_second", "seconds_left"))
        machine, seen = str(facts.get("machine", "")), float(facts.get("time", 0))
        return cls(facts["step"], facts["steps"], loss, speed, left, machine, seen)


_SIGN_OF_LIFE = 120.0
"""Seconds after its last sign of life for which a branch on another machine, whose lock may not be seen here, runs."""


@dataclass(frozen=True)
class Row:
    """The state of one stage.

    Attributes:
        stage: Its name.
        kind: Its kind.
        folder: Where its files are.
        state: See the module.
        changed: What differs from the recipe, as ``field: old -> new``.
        seconds: Wall time of making it.
        finished: When, UTC, ISO 8601.
        bytes: Of its files.
        detail: How far it has got, or its result.
        live: For a branch that is not done: its figures.
    """

    stage: str
    kind: str
    folder: str
    state: State = "missing"
    changed: list[str] = field(default_factory=list)
    seconds: float | None = None
    finished: str | None = None
    bytes: int = 0
    detail: str = ""
    live: Live | None = None


@dataclass(frozen=True)
class Status:
    """The state of a run folder.

    Attributes:
        run: The folder.
        name: The recipe's name.
        running: Whether a live process holds its lock.
        stages: In the order of the chain.
    """

    run: str
    name: str
    running: bool
    stages: list[Row]

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Known:
    """Content of what is outside the run folder, if a command has read it; empty values are not compared.

    Attributes:
        base: Of the base.
        tokenizer: Of what turns rows into inputs.
        sources: Of every dataset's source files.
    """

    base: str = ""
    tokenizer: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)


def run_status(run: Path, recipe: Recipe, known: Known | None = None) -> Status:
    """State of every stage.

    Args:
        run: The run folder.
        recipe: The recipe to compare the records with.
        known: Content of what is outside the run folder; what is missing here is not compared.
    """
    known = known or Known()
    rows = [*_preparation(recipe, run), *_rows(recipe, run, known)]
    return Status(str(run), recipe.name, is_locked(run), rows)


def _rows(recipe: Recipe, run: Path, known: Known) -> Iterator[Row]:
    encoded = encoded_rows(run)
    yield row_of(
        Stage("mixture", run / "mixture"),
        lambda: key.mixture_stage(recipe, run, tokenizer=known.tokenizer, sources=known.sources),
    )
    yield row_of(
        Stage("gradients", run / "conflict"), lambda: key.conflict_stage(recipe, run, base=known.base, rows=encoded)
    )
    for scope in scopes_of(recipe, run):
        yield from _scope_rows(recipe_of(recipe, scope), scope, encoded, known.base)
    yield row_of(Stage("evaluation", run / "evaluation"), lambda: key.evaluation_stage(recipe, run, {}))


def _scope_rows(recipe: Recipe, scope: Scope, rows: Mapping[str, str], base: str) -> Iterator[Row]:
    branches: dict[int, Stage] = {}
    for row in trained_rows(recipe, scope, rows, base):
        if row.kind == "branch":
            branches[len(branches)] = Stage("branch", Path(row.folder), title=row.stage)
        yield row
    if scope.method != "joint":  # a joint baseline's one branch is its model
        yield row_of(
            Stage("merged", scope.root / "merged", title=scope.name("merged")),
            lambda: key.merged_as_made(recipe, scope, branches, base=base),
        )


def trained_rows(recipe: Recipe, scope: Scope, rows: Mapping[str, str], base: str) -> Iterator[Row]:
    """Split, rounds and branches of a scope.

    Args:
        recipe: As the scope uses it.
        scope: Whose.
        rows: Content of every dataset's training rows, as far as it is known.
        base: Content of the base; empty if it is not known.
    """
    split = Stage("split", scope.root / "split", title=scope.name("split"))
    row = row_of(split, lambda: key.split_stage(recipe, scope, rows=rows, geometry=None))
    groups: list[list[str]] | None = None
    try:
        groups = split_of(scope.root).groups
    except RunFolderError as error:
        if split.begun:
            row = replace(row, state="damaged", detail=error.message)
    yield row
    rounds = RoundStages(recipe, scope, base, rows)
    for number in range(1, rounds.last):
        yield _round_row(rounds, number)
    if rounds.last > 1 and groups is not None:
        with contextlib.suppress(RunFolderError):  # the last round's split is not made yet
            groups = rounds.groups(rounds.last)
    for k in range(recipe.group_count if groups is None else len(groups)):
        stage = Stage("branch", scope.root / "branches" / str(k), title=scope.name(f"branch {k}"))
        row = row_of(stage, partial(rounds.branch, rounds.last, k, groups[k]) if groups else None)
        yield _exported(row, detached(scope.run, f"{scope.method}/{k}" if scope.method else str(k)))


def _round_row(rounds: RoundStages, number: int) -> Row:
    """A round that is not the last, in one row: its merge; until that is made, how many of its branches are trained."""
    made = rounds.made(number)
    row = row_of(made, None)
    row = replace(row, stage=rounds.scope.name(f"round {number}"), bytes=_bytes(made.path.parent))
    with contextlib.suppress(RunFolderError, KeyError):
        branches = rounds.branches(number)
        done = [stage for stage in branches.values() if stage.begun]
        if row.state == "done":
            record = made.record()
            seconds = sum(stage.record().seconds for stage in done) + record.seconds
            used = sum(name.startswith(key.BRANCH) for name in record.inputs)
            moved = f"{size(record.facts['bytes_in'])} in, {size(record.facts['bytes_out'])} out"
            row = replace(row, seconds=seconds, detail=f"{used} of {len(branches)} branches merged, {moved}")
            changed = _known_changes(rounds, number)
            return replace(row, changed=changed, state="stale" if changed else "done")
        running = any(is_locked(stage.path) for stage in branches.values())
        changed = [f"{s.name}: {text}" for s in done for text in row_of(s, partial(_itself, s)).changed]
        state: State = "running" if running else "stale" if changed else "partial" if done else row.state
        return replace(row, state=state, changed=changed, detail=f"{len(done)} of {len(branches)} branches trained")
    return row


def _itself(stage: Stage) -> Stage:
    return stage


def _known_changes(rounds: RoundStages, number: int) -> list[str]:
    """What no longer matches in a merged round, as far as the content of base and rows is known."""
    found = []
    for stage in (*rounds.branches(number).values(), rounds.merged(number)):
        if stage.begun:
            found += [f"{stage.name}: {text}" for text in row_of(stage, partial(_itself, stage)).changed]
    return found


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def encoded_rows(run: Path) -> dict[str, str]:
    """Fingerprints of the encoded training rows by dataset; empty if the mixture is not done."""
    with contextlib.suppress(RunFolderError, ValueError):
        return {item.name: item.fingerprint for item in read_counts(run / "mixture")}
    return {}


def _preparation(recipe: Recipe, run: Path) -> Iterator[Row]:
    if recipe.prepare is None:
        return
    if recipe.prepare.assemble is not None:
        folder = stage_folder(run, "assemble")
        row = row_of(Stage("assemble", folder), lambda: key.assemble_stage(recipe, folder, {}))
        yield replace(row, stage="prepare assemble")
    inner = [(stage, stage_recipe(recipe, stage, "")) for stage in recipe.prepare.stages]
    for stage, own in inner:
        names = {"mixture": f"prepare {stage.name} mixture", "branch": f"prepare {stage.name}"}
        for row in _rows(own, stage_folder(run, stage.name), Known()):
            if row.kind in names:
                yield replace(row, stage=names[row.kind], kind="prepared")
    final = row_of(Stage("prepared", run / "prepared"), lambda: key.prepared_stage(recipe, run, inner))
    yield replace(final, stage="prepare")


def row_of(stage: Stage, wanted: Callable[[], Stage] | None) -> Row:
    """The state of one stage.

    Args:
        stage: Where it is.
        wanted: Gives it as requested now; None if that cannot be known.
    """
    row = Row(stage.name, stage.kind, str(stage.path))
    if not stage.path.is_dir():
        return row
    live = Live.of(stage.path) if stage.kind == "branch" and not stage.begun else None
    row = replace(row, bytes=_bytes(stage.path), live=live)
    if is_locked(stage.path) or _runs_elsewhere(stage.path, live):
        return replace(row, state="running", detail=f"step {live.step:,} of {live.steps:,}" if live else "")
    if not stage.begun:
        held = any(child.name != ".lock" for child in stage.path.iterdir())
        return replace(row, state="partial" if held else "missing")
    try:
        record = stage.record()
    except OtherVersionError:
        raise
    except RunFolderError as error:
        return replace(row, state="damaged", detail=error.message)
    row = replace(row, state="done", seconds=record.seconds, finished=record.finished, detail=_detail(record))
    if wanted is None:
        return row
    with contextlib.suppress(RunFolderError, KeyError):
        asked = wanted()
        changed = record.changes(asked.settings, record.inputs) + _changed_inputs(record.inputs, asked.inputs)
        row = replace(row, changed=changed, state="stale" if changed else "done")
    return row


def _exported(row: Row, folder: Path) -> Row:
    """A branch that ``--launch detached`` exported, as far as ``folder`` tells; other branches as they are."""
    if row.state not in ("missing", "partial") or not folder.is_dir():
        return row
    if not (folder / MANIFEST).is_file():
        return replace(row, detail=f"{folder / MANIFEST} is missing")
    result = folder / RESULT
    if (result / RECORD).is_file():
        return replace(row, state="partial", detail="exported; trained, not taken back yet")
    live = Live.of(result)
    running = is_locked(result) or _runs_elsewhere(result, live)
    detail = f"exported; step {live.step:,} of {live.steps:,}" if live else "exported"
    return replace(row, state="running" if running else "partial", detail=detail, live=live)


def _changed_inputs(old: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Differences among the inputs that are known now; if one dataset's is known, all are."""
    new = {name: value for name, value in wanted.items() if value}
    families = {name.partition(" of ")[0] for name in new if " of " in name}
    held = {name: value for name, value in old.items() if name in new or name.partition(" of ")[0] in families}
    return differences(held, new, "input")


def _runs_elsewhere(folder: Path, live: Live | None) -> bool:
    """Whether another machine says that it works here; the lock that it holds may not be seen from this one."""
    if live is None or time.time() - live.seen > _SIGN_OF_LIFE:
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        holder = json.loads((folder / "running.json").read_text(encoding="utf-8"))["host"]
        return bool(holder != socket.gethostname())
    return False


def _detail(record: Record) -> str:
    facts = record.facts
    if "steps" in facts:
        return f"{count(facts['steps'], 'step')}, {count(facts['target_tokens'], 'target token')}"
    verdict = facts.get("verdict")
    return verdict if isinstance(verdict, str) else ""
