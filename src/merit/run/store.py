"""The run folder: which stage owns which files, when a stage is done, and who is writing.

A stage is done when its ``record.json`` stands (it is written last). The record holds the settings that change the answer,
the fingerprints of the inputs, and every output's size and hash. A record that does not match what is asked now is stale:
it is refused by name, never used and never overwritten silently. No maths and no models in here.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from merit.errors import RunFolderError
from merit.files import canonical, differences, file_hash, fingerprint, read_json, write_json

FORMAT = 1
"""Version of the record format; a record of another version is refused."""

_LIBRARIES = ("merit-tuning", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers", "numpy")


class StaleStageError(RunFolderError):
    """A stage's record does not match what the recipe asks for now."""


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide results, without importing them."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@dataclass
class Stage:
    """One stage's folder, and what the recipe asks of it now.

    Attributes:
        name: As people say it: mixture, conflict, split, branch 0, merged, evaluation.
        path: Its folder.
        settings: The settings that change the answer, as JSON values.
        inputs: Fingerprint of each input by name.
    """

    name: str
    path: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """What identifies the answer: stage, settings and inputs."""
        kind = self.name.split()[0]
        return fingerprint({"stage": kind, "settings": dict(self.settings), "inputs": dict(self.inputs)})

    @property
    def record_file(self) -> Path:
        """``record.json``: stands when, and only when, the stage is done."""
        return self.path / "record.json"

    def is_done(self) -> bool:
        """Whether the stage's outputs stand and are what is asked for.

        Raises:
            StaleStageError: They were made with other settings or inputs.
        """
        if not self.record_file.is_file():
            return False
        changed = self.changes()
        if changed:
            shown = changed[:8] + ([f"... and {len(changed) - 8} more"] if len(changed) > 8 else [])
            raise StaleStageError(
                f"{self.path}: the {self.name} stage was made with other settings or inputs than those asked for now:",
                *shown,
                "Ways out: set these back; or use another run folder (--output DIR); or have it made again (--redo).",
                "Nothing was changed.",
            )
        return True

    def changes(self) -> list[str]:
        """What differs between the record and what is asked now, as ``field: old -> new``."""
        record = read_json(self.record_file)
        if record.get("format") != FORMAT:
            return [f"record format: {record.get('format')} -> {FORMAT}"]
        old = {**record.get("settings", {}), "input": record.get("inputs", {})}
        new = {**json.loads(canonical(dict(self.settings))), "input": dict(self.inputs)}
        return differences(old, new)

    def matches(self) -> bool:
        """Whether the record is what is asked for now."""
        return not self.changes()

    def settings_match(self) -> bool:
        """Whether the record differs in its inputs at most."""
        return not [change for change in self.changes() if not change.startswith("input.")]

    def record(self) -> dict[str, Any]:
        """The record of a done stage."""
        found = read_json(self.record_file)
        assert isinstance(found, dict)
        return found

    def verify(self, names: Sequence[str] | None = None) -> None:
        """Check the outputs' sizes against the record (the named ones, or all): a truncated file is found before use.

        Raises:
            RunFolderError: An output is missing or of another size.
        """
        outputs = self.record().get("outputs", {})
        for name, facts in outputs.items():
            if names is not None and name not in names:
                continue
            path = self.path / name
            found = path.stat().st_size if path.is_file() else None
            if found != facts["bytes"]:
                raise RunFolderError(
                    f"{path}: expected {facts['bytes']} bytes as recorded, found {'no file' if found is None else found}.",
                    f"The {self.name} stage's output was damaged after it was made. Remove {self.path} and run it again.",
                )

    def clear(self, keep: Sequence[str] = ()) -> None:
        """Remove the record first, then everything but the children named in ``keep``."""
        self.record_file.unlink(missing_ok=True)
        for child in self.path.iterdir():
            if child.name not in (*keep, *_OWN_FILES):
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()

    @contextlib.contextmanager
    def writing(self, *, seed: int, keep: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Hold the stage's lock while its outputs are made; write the record at the end.

        Yields a dict: what the stage puts in it stands at the top level of the record (device, steps, tokens ...).

        Args:
            seed: Recorded.
            keep: File or folder names inside the stage's folder that a stage in progress may go on from; anything else
                left by an unfinished attempt is removed first.

        Raises:
            RunFolderError: Another process is writing this stage.
        """
        foreign = self.path.is_dir() and any(self.path.iterdir()) and not (self.path / ".lock").exists()
        if foreign and not self.record_file.is_file():
            raise RunFolderError(
                f"{self.path} holds files that the {self.name} stage did not make, and would have to remove.",
                "Use another run folder (--output DIR), or move these files. Nothing was changed.",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        with lock(self.path, self.name):
            self.clear(keep)
            started, clock = datetime.now(UTC), time.monotonic()
            extra: dict[str, Any] = {}
            yield extra
            record = {
                "format": FORMAT,
                "stage": self.name,
                "fingerprint": self.fingerprint,
                "settings": dict(self.settings),
                "inputs": dict(self.inputs),
                "seed": seed,
                "versions": versions(),
                "host": {"system": platform.platform(), "cores": os.cpu_count(), "name": socket.gethostname()},
                "started": started.isoformat(timespec="seconds"),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - clock, 3),
                **extra,
                "outputs": self._outputs(keep),
            }
            write_json(self.record_file, record)

    def _outputs(self, keep: Sequence[str]) -> dict[str, Any]:
        found = {}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path)
            if path.is_file() and name.parts[0] not in (*_OWN_FILES, *keep):
                found[name.as_posix()] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        return found


MARKER = ".merit"
"""Empty file that tells a run folder from any other folder."""


def is_run_folder(folder: Path) -> bool:
    """Whether ``merit`` made this folder, or a copy of one with at least one finished stage."""
    return (folder / MARKER).exists() or any(
        (folder / name / "record.json").is_file() for name in ("mixture", "conflict", "split", "merged", "evaluation")
    )


def claim(folder: Path) -> None:
    """Make ``folder`` a run folder, or accept it as one.

    Raises:
        RunFolderError: It holds other things: nothing of a user's may ever be overwritten or removed.
    """
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file, so it cannot be a run folder.", "Use another --output DIR.")
    if folder.is_dir() and any(folder.iterdir()) and not is_run_folder(folder):
        held = ", ".join(sorted(child.name for child in folder.iterdir())[:4])
        raise RunFolderError(
            f"{folder} is not empty and no run folder: it holds {held}.",
            "Use another --output DIR (default: runs/NAME, after the recipe's name). Nothing was changed.",
        )
    if not (folder / MARKER).exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()


_OWN_FILES = ("record.json", ".lock", "running.json", "progress.json", "log.txt")


@contextlib.contextmanager
def lock(folder: Path, what: str) -> Iterator[None]:
    """Hold ``folder`` for this process; a killed process leaves no lock behind.

    Raises:
        RunFolderError: Another process holds it; its command, host and start are named.
    """
    import sys

    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "running.json"
    held = FileLock(folder / ".lock", timeout=1)  # a second, since `merit status` looks for a moment
    try:
        held.acquire()
    except Timeout:
        who = ""
        with contextlib.suppress(OSError, ValueError, KeyError):
            facts = json.loads(note.read_text())
            who = f" (process {facts['pid']} on {facts['host']}, since {facts['since']}: {facts['command']})"
        raise RunFolderError(
            f"{folder} is in use: another process is writing {what}{who}.",
            "Wait for it (`merit status RUN --watch`), stop it, or use another run folder (--output DIR).",
            "Nothing was changed.",
        ) from None
    try:
        write_json(
            note,
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": " ".join(["merit", *sys.argv[1:]])[:300],
            },
        )
        yield
    finally:
        note.unlink(missing_ok=True)
        held.release()


def is_locked(folder: Path) -> bool:
    """Whether a live process holds ``folder``."""
    from filelock import FileLock, Timeout

    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that we may not write to: nobody here holds it
        return False
