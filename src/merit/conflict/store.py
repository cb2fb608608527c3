"""Files of measured gradients: a pair of half-sample vectors per chunk of a dataset's sample, keyed by content.

It knows names, bytes and hashes, no maths. An entry is ``<key>.npy`` (2, D) float32, the even and the odd sum, and
``<key>.json``, written last: an entry without it does not exist. The key is a hash of everything that decides the vectors
(rows drawn, base, trainable subset, representation ...), so a folder can be shared by runs and by processes, and an entry is
never stale.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merit.errors import ResourceError

__all__ = ["GradientStore", "StoredVector", "check_space", "content_key", "write_vectors"]

FORMAT = 1
"""Part of every key: raised when the same settings would give other vectors."""


def content_key(facts: Mapping[str, Any]) -> str:
    """Hash (32 hex digits) of facts that JSON can represent."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        ResourceError: ``folder`` has less than ``needed`` bytes free, plus 5 % and 64 MiB for everyone else.
    """
    free = shutil.disk_usage(folder).free
    wanted = int(needed * 1.05) + 2**26
    if free < wanted:
        raise ResourceError(
            f"{what} needs {wanted / 2**30:.1f} GiB on disk; {folder} has {free / 2**30:.1f} GiB free.",
            "Ways out: representation: sketch (1 MiB per half-sample by default), a smaller sketch_size, a larger stride, "
            "or another disk (--output, conflict.cache).",
            "Nothing was written.",
        )


@dataclass(frozen=True)
class StoredVector:
    """A vector that lies in one or more entries: ``scale`` times the sum of the named rows, read slice by slice.

    Files are opened per slice, so thousands of vectors hold neither memory nor file descriptors.

    Attributes:
        files: The entries' vector files.
        width: D.
        halves: Rows to add: (0,) even, (1,) odd, (0, 1) both.
        scale: Factor, such as one over the total weight.
    """

    files: tuple[Path, ...]
    width: int
    halves: tuple[int, ...]
    scale: float

    def __len__(self) -> int:
        return self.width

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.width)
        total = np.zeros(stop - start)
        for file in self.files:
            data = file.stat().st_size - 8 * self.width
            for half in self.halves:
                offset = data + 4 * (half * self.width + start)
                total += np.fromfile(file, dtype="<f4", count=stop - start, offset=offset)
        return (total * self.scale).astype(np.float32)


class GradientStore:
    """A folder of entries; several processes may write it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.npy", self.folder / f"{key}.json"

    def read(self, key: str) -> dict[str, Any] | None:
        """An entry's facts, or None where there is none (or one that is damaged: it is measured again)."""
        vectors, facts_file = self._paths(key)
        try:
            facts = json.loads(facts_file.read_text(encoding="utf-8"))
            whole = vectors.stat().st_size == facts["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return facts if whole else None

    def read_intact(self, key: str) -> dict[str, Any] | None:
        """As :meth:`read`, and the vectors' checksum holds; a damaged entry is removed."""
        facts = self.read(key)
        if facts is None:
            return None
        vectors, facts_file = self._paths(key)
        if _checksum(np.load(vectors, mmap_mode="r")) == facts["crc32"]:
            return facts
        facts_file.unlink(missing_ok=True)
        vectors.unlink(missing_ok=True)
        return None

    def vector(self, keys: Sequence[str], width: int, halves: tuple[int, ...], scale: float) -> StoredVector:
        """The scaled sum of some halves of some entries."""
        return StoredVector(tuple(self._paths(key)[0] for key in keys), width, halves, scale)

    @contextlib.contextmanager
    def writing(self, key: str, width: int) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Yield zeroed (2, width) float32 vectors backed by a file, and a dict for the facts; both stand after success."""
        final, facts_file = self._paths(key)
        unfinished = final.with_name(f".{key}.{os.getpid()}.part")
        facts: dict[str, Any] = {}
        try:
            vectors = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=(2, width))
            yield vectors, facts
            vectors.flush()
            facts |= {"bytes": unfinished.stat().st_size, "crc32": _checksum(vectors)}
            del vectors
            unfinished.replace(final)
            part = facts_file.with_name(f".{key}.{os.getpid()}.json.part")
            part.write_text(json.dumps(facts, allow_nan=False), encoding="utf-8")
            part.replace(facts_file)
        except OSError as error:
            raise ResourceError(
                f"{self.folder} cannot be written: {error}.", "What was measured before stands."
            ) from None
        finally:
            unfinished.unlink(missing_ok=True)

    def prune(self, keep: Iterable[str]) -> None:
        """Remove every entry but those named, and what killed processes left."""
        kept = set(keep)
        for path in self.folder.iterdir():
            if path.name.endswith(".part") or (path.suffix in (".npy", ".json") and path.stem not in kept):
                path.unlink(missing_ok=True)


def _checksum(vectors: np.ndarray) -> int:
    checksum = 0
    flat = vectors.reshape(-1)
    for start in range(0, flat.size, 2**20):
        checksum = zlib.crc32(np.ascontiguousarray(flat[start : start + 2**20]).data, checksum)
    return checksum


def write_vectors(path: Path, names: Iterable[str], vectors: Iterable[np.ndarray], width: int) -> None:
    """Write float32 vectors (width,) as one safetensors file, one vector in memory at a time."""
    names = list(names)
    size = 4 * width
    header = json.dumps(
        {"__metadata__": {"format": "pt"}}
        | {
            name: {"dtype": "F32", "shape": [width], "data_offsets": [i * size, (i + 1) * size]}
            for i, name in enumerate(names)
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for vector in vectors:
                file.write(np.ascontiguousarray(vector, dtype="<f4").data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error}.", "Free some disk space and run it again.") from None
    finally:
        unfinished.unlink(missing_ok=True)
