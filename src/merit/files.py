"""Files that appear under their name only when complete, their hashes, and JSON in one spelling. No maths, no models.

Every file that this package writes goes through here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merit.errors import RunFolderError


def canonical(value: Any) -> str:
    """One spelling of a JSON value: sorted keys, no spaces, shortest floats.

    Raises:
        TypeError: Something in it has no JSON form: refused, since its text could change between runs.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of the canonical form."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON under its final name only when complete."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text under its final name only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read JSON that a stage wrote.

    Raises:
        RunFolderError: The file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(
            f"{path} is missing.", "Run the stage that writes it first (`merit status RUN`)."
        ) from None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged: {error}.", "Remove the stage's folder and run it again.") from None


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Changed fields as ``a.b: old -> new``, for a message."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in sorted({*old, *new}):
            inner = f"{prefix}.{key}" if prefix else str(key)
            found += differences(old.get(key, "absent"), new.get(key, "absent"), inner)
        return found
    if old == new:
        return []
    return [f"{prefix}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = canonical(value)
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}…"
    return text if len(text) <= 120 else text[:117] + "…"
