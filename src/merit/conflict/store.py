"""Files of measured gradients: four quarter-sample vectors per chunk of a dataset's sample, keyed by content.

It knows names, bytes and hashes, no maths. An entry is ``<key>.npy`` (4, D) float32, one sum per quarter, and
``<key>.json``, written last: an entry without it does not exist. The key is a hash of everything that decides the vectors
(rows drawn, base, trainable subset, representation ...), so a folder can be shared by runs and by processes, and an entry is
never stale. A damaged entry counts as absent: it is measured again.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from merit.conflict.reliability import PARTS
from merit.errors import ResourceError
from merit.files import PARTIAL, canonical, fingerprint, publish, write_text, writing

FORMAT = 2
"""Part of every key: raised when the same settings would give other vectors."""


@dataclass
class Sums:
    """Sums over one chunk of a sample; lists have one figure per quarter.

    Attributes:
        examples: Rows.
        weight: Σw.
        weight_squared: Σw².
        example_loss: Σ of the examples' mean target-token losses (nats).
        token_loss: Σ of the target tokens' losses (nats).
        tokens: Target tokens.
        seconds: Time that it took.
        width: D.
    """

    examples: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    weight_squared: list[float] = field(default_factory=list)
    example_loss: list[float] = field(default_factory=list)
    token_loss: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    width: int = 0


@dataclass
class _Entry:
    sums: Sums
    crc32: int


def content_key(facts: Mapping[str, object]) -> str:
    """Hash (32 hex digits) of facts that JSON can represent."""
    return fingerprint({"format": FORMAT, **facts})[:32]


@dataclass(frozen=True)
class StoredVector:
    """A vector that lies in one or more entries: ``scale`` times the sum of the named rows, read slice by slice.

    Files are opened per slice, so thousands of vectors take neither memory nor file descriptors.

    Attributes:
        files: The entries' vector files.
        width: D.
        parts: Rows to add.
        scale: Factor, such as one over the total weight.
    """

    files: tuple[Path, ...]
    width: int
    parts: tuple[int, ...]
    scale: float

    def __len__(self) -> int:
        return self.width

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.width)
        total = np.zeros(stop - start)
        for file in self.files:
            data = file.stat().st_size - 4 * PARTS * self.width
            for row in self.parts:
                offset = data + 4 * (row * self.width + start)
                total += np.fromfile(file, dtype="<f4", count=stop - start, offset=offset)
        return (total * self.scale).astype(np.float32)


class GradientStore:
    """A folder of entries; several processes may write it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.npy", self.folder / f"{key}.json"

    def read(self, key: str) -> Sums | None:
        """An entry's sums; None where there is no entry, or one whose checksum does not match, which is removed."""
        vectors, facts = self._paths(key)
        try:
            entry = TypeAdapter(_Entry).validate_json(facts.read_bytes())
            if _checksum(vectors, entry.sums) == entry.crc32:
                return entry.sums
        except (OSError, ValidationError):
            pass
        facts.unlink(missing_ok=True)
        vectors.unlink(missing_ok=True)
        return None

    def vector(self, keys: Sequence[str], width: int, parts: tuple[int, ...], scale: float) -> StoredVector:
        """The scaled sum of some parts of some entries."""
        return StoredVector(tuple(self._paths(key)[0] for key in keys), width, parts, scale)

    @contextlib.contextmanager
    def writing(self, key: str, width: int) -> Iterator[tuple[np.ndarray, Sums]]:
        """Yield zeroed (4, width) float32 vectors backed by a file, and empty sums; both stand after success."""
        final, facts = self._paths(key)
        unfinished = final.with_name(f".{key}.{os.getpid()}{PARTIAL}")
        sums = Sums(width=width)
        try:
            vectors = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=(PARTS, width))
            yield vectors, sums
            vectors.flush()
            del vectors
            checksum = _checksum(unfinished, sums)
            publish(unfinished, final)
            write_text(facts, canonical(asdict(_Entry(sums, checksum))))
        except OSError as error:
            raise ResourceError(
                f"{self.folder} cannot be written: {error}.", "What was measured before is kept."
            ) from None
        finally:
            unfinished.unlink(missing_ok=True)

    def prune(self, keep: Iterable[str]) -> None:
        """Remove every entry but those named, and what killed processes left."""
        kept = set(keep)
        for path in self.folder.iterdir():
            if path.name.endswith(PARTIAL) or (path.suffix in (".npy", ".json") and path.stem not in kept):
                path.unlink(missing_ok=True)


def _checksum(vectors: Path, sums: Sums) -> int:
    """CRC-32 of the vectors' file and of the sums."""
    checksum = zlib.crc32(canonical(asdict(sums)).encode())
    with vectors.open("rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def write_vectors(path: Path, names: Sequence[str], vectors: Iterable[np.ndarray], width: int) -> None:
    """Write float32 vectors (width,) as one safetensors file, one vector in memory at a time."""
    size = 4 * width
    entries = {
        name: {"dtype": "F32", "shape": [width], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    try:
        with writing(path) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for vector in vectors:
                file.write(np.ascontiguousarray(vector, dtype="<f4").data)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error}.", "Free some disk space and run it again.") from None
