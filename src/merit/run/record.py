"""``record.json``: what made a stage's files, and what they are. Written last, it makes a stage done. Storage only."""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from merit.errors import RunFolderError
from merit.files import canonical, checksum, content_hash, differences, read_json, sealed, write_json

FORMAT = 2
"""Version of the record format. Records of other versions (0.1 wrote version 1) are refused."""

_LIBRARIES = ("merit-tuning", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "numpy")


class StaleStageError(RunFolderError):
    """A stage's record does not match the current recipe."""


class OtherVersionError(RunFolderError):
    """A run folder of another version of MERIT."""


class Output(BaseModel):
    """One file that a stage wrote.

    Attributes:
        bytes: Its size.
        xxh3: XXH3-128 of its content, in hex: detects damage and mix-ups, not forgery.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    bytes: int
    xxh3: str

    @classmethod
    def of(cls, path: Path) -> Output:
        """Size and hash of a file as it is now."""
        return cls(bytes=path.stat().st_size, xxh3=content_hash(path))


class Record(BaseModel):
    """A stage's record. Facts of the stage itself (steps, weights ...) are stored next to these fields, see :meth:`facts`.

    Attributes:
        format: Version of the record format.
        stage: Name of the stage.
        fingerprint: Of stage, settings and inputs: identifies the result.
        settings: The settings that determine the result.
        inputs: Fingerprint of every input, by name.
        seed: The recipe's seed.
        versions: Of Python and the libraries that affect results.
        host: Where it was made; for information only.
        started: UTC, ISO 8601.
        finished: UTC, ISO 8601.
        seconds: Wall time.
        outputs: Every file of the stage, by its name in the stage's folder.
        checksum: Of everything else, so that damage to the record itself is noticed.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    format: int
    stage: str
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    seed: int
    versions: dict[str, str]
    host: dict[str, Any]
    started: str
    finished: str
    seconds: float
    outputs: dict[str, Output]
    checksum: str

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage itself recorded."""
        return dict(self.model_extra or {})

    def changes(self, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
        """What differs from the current request, as ``field: old -> new``; inputs as ``input.name: old -> new``."""
        return differences(self.settings, plain(settings)) + differences(self.inputs, dict(inputs), "input")


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as it comes back from JSON."""
    return dict(json.loads(canonical(dict(value))))


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        RunFolderError: It is missing, damaged, or of another version.
    """
    value = read_json(path)
    found = value.get("format") if isinstance(value, dict) else None
    if isinstance(found, int) and found != FORMAT:
        raise OtherVersionError(
            f"{path}: the run was made by another version of MERIT (record format {found}, this version reads {FORMAT}).",
            "Use another run folder (--output DIR), or the version that made it. Nothing was changed.",
        )
    try:
        record = Record.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise damaged(path, f"{place}: {first['msg'].lower()}") from None
    if record.checksum != checksum(value):
        raise damaged(path, "its content does not match its checksum")
    return record


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record, complete with format, versions, host and checksum."""
    value: dict[str, Any] = {"format": FORMAT, **content, "versions": versions(), "host": host()}
    write_json(path, sealed(value))


def damaged(path: Path, why: str, folder: Path | None = None) -> RunFolderError:
    """The error for a file of a run folder that is not what was written; ``folder`` is its stage's (default: its own)."""
    return RunFolderError(
        f"{path} is damaged: {why}.",
        f"Remove the folder {folder or path.parent} and run the same command again: the stage is rerun.",
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect results, without importing them."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def host() -> dict[str, Any]:
    """The machine; for information only."""
    return {"system": platform.platform(), "cores": os.cpu_count(), "name": socket.gethostname()}


def now() -> str:
    """The current time, UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def shown(changes: Sequence[str], most: int = 8) -> list[str]:
    """The first changes, and the number of further ones."""
    return [*changes[:most], *([f"... and {len(changes) - most} more"] if len(changes) > most else [])]
