"""The run folder: which stage owns which files, when a stage is done, and who is writing. No maths, no models.

A stage is done when its ``record.json`` exists (:mod:`merit.run.record`). One that does not match the current request is
stale: refused, never silently used or overwritten. A finished stage's files are compared with the record by
content whenever they are read again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from merit.errors import RunFolderError
from merit.files import checksum, fingerprint, write_json
from merit.progress import count
from merit.run.record import Output, Record, StaleStageError, damaged, now, plain, read_record, shown, write_record
from merit.split.result import Split

RECORD = "record.json"
MARKER = ".merit"
"""Empty file that marks a run folder."""

_OWN_FILES = (RECORD, ".lock", "running.json", "progress.json", "log.txt")
_LARGE = 4 * 10**9
"""Bytes of weights up to which ``verify`` reads them all; larger ones are compared when they are loaded or merged."""


@dataclass(frozen=True)
class Stage:
    """One stage's folder, and what is requested of it now.

    Attributes:
        kind: mixture, gradients, split, branch, merged, evaluation, assemble or prepared.
        path: Its folder.
        settings: The settings that determine the result, as JSON values.
        inputs: Fingerprint of every input, by name.
        title: Display name: ``random branch 0``; the kind if empty.
    """

    kind: str
    path: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    title: str = ""

    @property
    def name(self) -> str:
        """Display name."""
        return self.title or self.kind

    @property
    def fingerprint(self) -> str:
        """Identifies the result: kind of stage, settings and inputs."""
        return fingerprint({"stage": self.kind, "settings": plain(self.settings), "inputs": dict(self.inputs)})

    @property
    def record_file(self) -> Path:
        """``record.json``."""
        return self.path / RECORD

    @property
    def begun(self) -> bool:
        """Whether a record exists, whatever its content."""
        return self.record_file.is_file()

    def record(self) -> Record:
        """The record of a done stage.

        Raises:
            RunFolderError: It is missing, damaged or of another version.
        """
        return read_record(self.record_file)

    def changes(self) -> list[str]:
        """What differs between the record and the current request."""
        return self.record().changes(self.settings, self.inputs)

    def is_done(self) -> bool:
        """Whether the stage is done and matches the current request.

        Raises:
            StaleStageError: They were made with other settings or inputs.
        """
        if not self.begun:
            return False
        changes = self.changes()
        if changes:
            raise stale(self.path, self.name, changes)
        return True

    def verify(self, *, weights: bool = True, only: Collection[str] | None = None) -> None:
        """Compare the files with the record by content.

        Args:
            weights: Also read the weights if they have at most 4 GB; otherwise only their sizes are compared.
            only: Names of the files to look at. Default: all.

        Raises:
            RunFolderError: One is missing or has other content.
        """
        outputs = self.record().outputs
        weights &= sum(facts.bytes for name, facts in outputs.items() if name.endswith(".safetensors")) <= _LARGE
        for name, facts in outputs.items():
            if only is not None and name not in only:
                continue
            path = self.path / name
            if not path.is_file():
                raise damaged(path, "it is missing", self.path)
            if path.stat().st_size != facts.bytes:
                found = count(path.stat().st_size, "byte")
                raise damaged(path, f"it has {found}, but {facts.bytes:,} were written", self.path)
            if (weights or not name.endswith(".safetensors")) and Output.of(path) != facts:
                raise damaged(path, "its content is not what was written", self.path)

    def clear(self, keep: Sequence[str] = ()) -> None:
        """Remove the record first, then everything but the children named in ``keep``."""
        self.record_file.unlink(missing_ok=True)
        for child in self.path.iterdir():
            if child.name not in (*keep, *_OWN_FILES):
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()

    @contextlib.contextmanager
    def writing(self, seed: int, keep: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Hold the stage's lock while its files are made; write the record at the end.

        Yields a dict: what the stage puts in it becomes the record's facts.

        Args:
            seed: Recorded.
            keep: Names inside the stage's folder that an attempt may resume from; anything else that an unfinished attempt
                left is removed first.

        Raises:
            RunFolderError: Another process is writing this stage, or the folder contains foreign files.
        """
        foreign = self.path.is_dir() and any(self.path.iterdir()) and not (self.path / ".lock").exists()
        if foreign and not self.begun:
            raise RunFolderError(
                f"{self.path} contains files that the {self.name} stage did not make and would have to remove.",
                "Use another run folder (--output DIR), or move these files. Nothing was changed.",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        with lock(self.path, self.name):
            self.clear(keep)
            started, clock = now(), time.monotonic()
            facts: dict[str, Any] = {}
            yield facts
            content = {
                "stage": self.name,
                "fingerprint": self.fingerprint,
                "settings": plain(self.settings),
                "inputs": dict(self.inputs),
                "seed": seed,
                "started": started,
                "finished": now(),
                "seconds": round(time.monotonic() - clock, 3),
                **facts,
                "outputs": self._outputs(keep),
            }
            write_record(self.record_file, content)

    def _outputs(self, keep: Sequence[str]) -> dict[str, Any]:
        found = {}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path)
            if path.is_file() and name.parts[0] not in (*_OWN_FILES, *keep):
                found[name.as_posix()] = Output.of(path).model_dump()
        return found


WAYS_OUT = "change these back; or use another run folder (--output DIR); or rerun it and what depends on it (--redo)"


def stale(path: Path, name: str, changes: Sequence[str], ways_out: str = WAYS_OUT) -> StaleStageError:
    """The error for a stage that was made with other settings or inputs."""
    return StaleStageError(
        f"{path}: {name} was made with settings or inputs other than the current ones:",
        *shown(changes),
        f"Ways out: {ways_out}.",
        "Nothing was changed.",
    )


def split_of(root: Path) -> Split:
    """The finished split in a run's or a baseline's folder, as it was written.

    Raises:
        RunFolderError: There is none, or it is damaged.
    """
    stage = Stage("split", root / "split")
    stage.verify()
    return Split.load(stage.path)


def is_run_folder(folder: Path) -> bool:
    """Whether ``merit`` made this folder, or a copy of one with at least one finished stage."""
    stages = ("mixture", "conflict", "split", "merged", "evaluation")
    return (folder / MARKER).exists() or any((folder / name / RECORD).is_file() for name in stages)


def claim(folder: Path) -> None:
    """Make ``folder`` a run folder, or accept it as one.

    Raises:
        RunFolderError: It contains other things: a user's files must never be overwritten or removed.
    """
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file, so it cannot be a run folder.", "Use another --output DIR.")
    if folder.is_dir() and any(folder.iterdir()) and not is_run_folder(folder):
        there = ", ".join(sorted(child.name for child in folder.iterdir())[:4])
        raise RunFolderError(
            f"{folder} is neither empty nor a run folder: it contains {there}.",
            "Use another --output DIR (default: runs/NAME, after the recipe's name). Nothing was changed.",
        )
    if not (folder / MARKER).exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()


CHANGE = "change.json"
"""What an unfinished `merit add` or `merit remove` is about."""


def refuse_unfinished(run: Path) -> None:
    """Refuse a run in which a dataset is being added or removed.

    Raises:
        RunFolderError: It is.
    """
    if (run / CHANGE).exists():
        change = read_change(run)
        raise RunFolderError(
            f"{run}: `merit {change['kind']}` of {change['dataset']} is not finished.",
            f"`merit {change['kind']} {run} {change['dataset']}` goes on with it.",
        )


def read_change(run: Path) -> dict[str, Any]:
    """What an unfinished change of a run's datasets noted, as JSON values.

    Raises:
        RunFolderError: The note is damaged.
    """
    file = run / CHANGE
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if value["checksum"] == checksum(value):
            return dict(value)
        why = "its content does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
    raise RunFolderError(
        f"{file} is damaged: {why}.",
        "A dataset was being added or removed, and the run is between two states: restore this file or the whole run from a "
        "copy, or run the mixture again in another folder (--output DIR). Nothing was changed.",
    )


@contextlib.contextmanager
def lock(folder: Path, what: str) -> Iterator[None]:
    """Lock ``folder`` for this process; a killed process leaves no lock behind.

    Raises:
        RunFolderError: Another process holds the lock; the message gives its command, host and start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "running.json"
    file = FileLock(folder / ".lock", timeout=1)  # a second, since `merit status` holds it for a moment
    try:
        file.acquire()
    except Timeout:
        raise RunFolderError(
            f"{folder} is in use: another process is writing {what}{_holder(note)}.",
            "Wait for it (`merit status RUN --watch`), stop it, or use another run folder (--output DIR).",
            "Nothing was changed.",
        ) from None
    try:
        command = " ".join(["merit", *sys.argv[1:]])[:300]
        write_json(note, {"pid": os.getpid(), "host": socket.gethostname(), "since": now(), "command": command})
        yield
    finally:
        note.unlink(missing_ok=True)
        file.release()


def _holder(note: Path) -> str:
    try:
        facts = json.loads(note.read_text(encoding="utf-8"))
        return f" (process {facts['pid']} on {facts['host']}, since {facts['since']}: {facts['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def is_locked(folder: Path) -> bool:
    """Whether a live process holds the lock of ``folder``."""
    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that we may not write to: no process here holds it
        return False


def wait_for(folder: Path, seconds: float) -> None:
    """Wait until no live process holds the lock of ``folder``, but not longer than ``seconds``."""
    until = time.monotonic() + seconds
    while is_locked(folder) and time.monotonic() < until:
        time.sleep(0.2)
