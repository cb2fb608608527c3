"""Atomic file writes, hashes, and canonical JSON. No maths, no models.

Every file that this package writes goes through here, and appears under its final name only when complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import xxhash
from pydantic import TypeAdapter, ValidationError

from merit.errors import ResourceError, RunFolderError
from merit.progress import size

_CHUNK = 2**22
PARTIAL = ".partial"
"""Suffix of incomplete files; leftovers of a killed process may be removed."""


def canonical(value: object) -> str:
    """Canonical text of a JSON value: sorted keys, no spaces, shortest floats.

    Raises:
        TypeError: Something in it has no JSON form; its text could change between runs.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: object) -> str:
    """SHA-256 (hex) of the canonical form."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(path: Path) -> str:
    """XXH3-128 (hex) of a file's bytes: detects damage and mix-ups at memory speed, not forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def checksum(value: Mapping[str, Any]) -> str:
    """Fingerprint of all keys but ``checksum``, as added by :func:`sealed`; empty if the value cannot have one."""
    with contextlib.suppress(ValueError, TypeError):  # NaN or a lone surrogate: never written, so the file is damaged
        return fingerprint({key: item for key, item in value.items() if key != "checksum"})
    return ""


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The same mapping with a ``checksum`` of its contents."""
    plain = {key: item for key, item in value.items() if key != "checksum"}
    return {**plain, "checksum": fingerprint(plain)}


@contextlib.contextmanager
def writing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that gets its final name only if the block succeeds; otherwise nothing is left.

    ``durable``: fsync first. Files in a folder that is still being built do not need it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(_partial(path.name))
    try:
        with partial.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def create(path: Path) -> BinaryIO:
    """Open a new file for writing and reading, in a folder that is published as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w+b")


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write bytes under their final name only when complete."""
    with writing(path, durable=durable) as file:
        file.write(data)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write UTF-8 text under its final name only when complete."""
    write_bytes(path, text.encode(), durable=durable)


def write_json(path: Path, value: object, *, durable: bool = True) -> None:
    """Write JSON under its final name only when complete; a value that JSON cannot represent is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", durable=durable)


def _partial(name: str) -> str:
    return f".{name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}"


@contextlib.contextmanager
def scratch(near: Path) -> Iterator[Path]:
    """A hidden folder next to ``near``, removed at the end.

    What killed processes left there under the same name is removed first: this machine's when its process is gone and
    holds no lock, another machine's (on a shared disk) when nothing in it has changed for a day.

    Raises:
        ResourceError: The disk filled up.
    """
    parent = near.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / _partial(near.name)
    if folder.exists():  # from an earlier process with the same id
        shutil.rmtree(folder)
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _sweep(folder, f".{near.name}.")
        yield folder
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise ResourceError(
            f"The disk of {parent} filled up.", "Free some space, or use another disk. Nothing was left behind."
        ) from None
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A hidden folder that gets its final name only if the block succeeds; otherwise nothing is left.

    Raises:
        ResourceError: The disk filled up.
    """
    with scratch(folder) as unfinished:
        yield unfinished
        publish(unfinished, folder.absolute())


_ABANDONED = 24 * 3600  # seconds without a change after which another machine's unfinished folder is removed


def _sweep(own: Path, prefix: str) -> None:
    now = own.stat().st_mtime  # by the disk's clock
    for path in own.parent.iterdir():
        if path == own or not path.name.startswith(prefix) or not path.name.endswith(PARTIAL) or not path.is_dir():
            continue
        host, _, pid = path.name[len(prefix) : -len(PARTIAL)].rpartition(".")
        if not pid.isdigit():
            continue
        with contextlib.suppress(OSError):
            newest = max(item.stat().st_mtime for item in (path, *path.rglob("*")))
            if _abandoned(path, int(pid)) if host == socket.gethostname() else now - newest > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)


def _abandoned(folder: Path, pid: int) -> bool:
    """Whether the process that made a folder on this machine is gone (it may live in another container)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    else:
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return True


@contextlib.contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """Open a file for appending, such as a log; a kill may truncate it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        yield file


def sync(path: Path) -> None:
    """Flush a file's or folder's content to disk before continuing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(unfinished: Path, final: Path) -> None:
    """Atomically give a finished folder or file its final name; ``final`` must not be an existing folder."""
    unfinished.replace(final)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room, in its own words where a library wrapped the system's."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(os.strerror(number) in str(error) for number in _FULL)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk where ``folder`` is or will be."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def require_space(folder: Path, needed: int, what: str, *ways_out: str) -> None:
    """Refuse to start what does not fit on the disk.

    Args:
        folder: Where it will be written; need not exist.
        needed: Bytes.
        what: What needs them, as the message's subject: ``9 branches``.
        ways_out: What the user can do besides freeing space.

    Raises:
        ResourceError: ``folder`` has less than ``needed`` bytes free.
    """
    free = free_bytes(folder)
    if free < needed:
        raise ResourceError(
            f"{folder}: {what} need about {size(needed)} of disk space, but only {size(free)} are free.",
            *(ways_out or ("Free some space, or write to another disk (a run: --output DIR).",)),
            "Nothing was written.",
        )


def read_json(path: Path) -> Any:  # noqa: ANN401  whatever JSON holds; read_as says what is expected
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
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is damaged: {error}.", "Remove the stage's folder and run it again.") from None


_T = TypeVar("_T")


_ADAPTERS: dict[object, TypeAdapter[Any]] = {}
"""Validators by type: building one takes longer than reading most files."""


def read_as(path: Path, kind: type[_T]) -> _T:
    """Read JSON that a stage wrote as a dataclass, or as lists and dicts of them.

    Raises:
        RunFolderError: The file is missing or damaged, or holds something else.
    """
    value = read_json(path)
    try:
        adapter: TypeAdapter[_T] = _ADAPTERS.get(kind) or _ADAPTERS.setdefault(kind, TypeAdapter(kind))
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise RunFolderError(
            f"{path} is damaged: {where}: {first['msg']}.", "Remove the stage's folder and run it again."
        ) from None


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write small JSON with its own file name and a checksum; :func:`read_sealed` notices damage and a swap."""
    write_json(path, sealed({**value, "file": path.name}))


def read_sealed(path: Path, kind: type[_T]) -> _T:
    """Read what :func:`write_sealed` wrote, as a dataclass.

    Raises:
        RunFolderError: The file is missing, damaged, or another file under this name.
    """
    value = read_json(path)
    if not isinstance(value, dict) or value.get("checksum") != checksum(value) or value.get("file") != path.name:
        raise RunFolderError(f"{path} is damaged: it does not match its checksum, or is another file.")
    return read_as(path, kind)


def differences(old: object, new: object, prefix: str = "") -> list[str]:
    """Changed fields as ``a.b: old -> new``, for messages."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in sorted({*old, *new}):
            inner = f"{prefix}.{key}" if prefix else str(key)
            found += differences(old.get(key, "absent"), new.get(key, "absent"), inner)
        return found
    if old == new:
        return []
    shown, other = canonical(old), canonical(new)
    if isinstance(old, str) and isinstance(new, str) and len(old) == len(new) == 64:  # hashes
        alike = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        shown, other = (f"{text[: max(12, alike + 4)]}…" for text in (old, new))
    return [f"{prefix}: {_cut(shown)} -> {_cut(other)}"]


def _cut(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "…"
