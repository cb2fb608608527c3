"""Encoded rows of one dataset: token ids, which of them are predicted, references to images; in memory or in one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from merit.errors import MixtureError
from merit.files import writing
from merit.hf.images import ImageRef
from merit.hf.rows import EncodedRow


class EncodedDataset:
    """Encoded rows of one dataset, in memory or in one Parquet file; the token ids are read on first use.

    Columns: ``input_ids`` list<int32>, ``targets`` list<bool>, ``length``, ``target_count``, ``prompt_length`` int64,
    ``truncated`` bool, ``answer`` text (empty in training files), and ``images`` list<struct> with the
    fields of :class:`ImageRef` where a row has any. An image file's name that is relative starts from the stage's folder:
    the one above the file's own.

    Args:
        name: The dataset's name.
        rows: Rows to hold in memory.
        seeing: What decides the pixels of the rows' images (:attr:`merit.hf.families.ImageInputs.settings`).

    Attributes:
        lengths: (rows,) int64 tokens per row.
        target_counts: (rows,) int64 target tokens per row.
        prompt_lengths: (rows,) int64 tokens before the last answer.
        truncated: (rows,) bool, cut at max_length.
        images: Images per row.
        stored: The same as the file names them: relative to the stage's folder.
        fingerprint: sha256 over lengths, ids and targets, and over images and how they are seen: a changed row, image,
            template, tokenizer, image processor or max_length changes it.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[EncodedRow],
        seeing: Mapping[str, Any] | None = None,
    ) -> None:
        ids = np.concatenate([row.input_ids for row in rows]) if rows else np.zeros(0, np.int32)
        targets = np.concatenate([row.targets for row in rows]) if rows else np.zeros(0, bool)
        self.name = name
        self.lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
        self.target_counts = np.array([int(row.targets.sum()) for row in rows], dtype=np.int64)
        self.prompt_lengths = np.array([row.prompt_length for row in rows], dtype=np.int64)
        self.truncated = np.array([row.truncated for row in rows], dtype=bool)
        self.answers = [row.answer for row in rows]
        self.images = self.stored = [row.images for row in rows]
        self.seeing = json.dumps(seeing, sort_keys=True, default=str) if any(self.images) else ""
        self._starts = _starts(self.lengths)
        self._flat = (ids.astype(np.int32), targets.astype(bool))
        self.fingerprint = _fingerprint(self.lengths, *self._flat, self.images, self.seeing)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> EncodedRow:
        index = range(len(self))[index]  # negative indices, and IndexError beyond the end
        ids, targets = self._flat
        part = slice(self._starts[index], self._starts[index + 1])
        return EncodedRow(
            ids[part],
            targets[part],
            int(self.prompt_lengths[index]),
            bool(self.truncated[index]),
            self.answers[index],
            self.images[index],
        )

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Iterable[int]) -> EncodedDataset:
        """The rows with these numbers, in this order, as often as they are named."""
        rows = [replace(self[index], images=self.stored[index]) for index in indices]
        return EncodedDataset(self.name, rows, json.loads(self.seeing) if self.seeing else None)

    def __repr__(self) -> str:
        return f"EncodedDataset({self.name!r}, {len(self)} rows, {int(self.lengths.sum())} tokens)"

    def save(self, path: Path) -> None:
        """Write one Parquet file; it appears under its name only when complete."""
        ids, targets = self._flat
        offsets = pa.array(self._starts.astype(np.int64))
        columns: dict[str, Any] = {
            "input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(ids)),
            "targets": pa.LargeListArray.from_arrays(offsets, pa.array(targets)),
            "length": self.lengths,
            "target_count": self.target_counts,
            "prompt_length": self.prompt_lengths,
            "truncated": self.truncated,
            "answer": pa.array(self.answers, pa.large_string()),
        }
        if any(self.images):
            columns["images"] = pa.array([[asdict(image) for image in images] for images in self.images])
        metadata = {"name": self.name, "fingerprint": self.fingerprint, "seeing": self.seeing}
        table = pa.table(columns).replace_schema_metadata(metadata)
        with writing(path) as file:
            pq.write_table(table, file, compression="zstd", row_group_size=65536)

    @classmethod
    def load(cls, path: Path) -> EncodedDataset:
        """Open a file that :meth:`save` wrote; token ids are read when the first row is asked for.

        Raises:
            MixtureError: The file is missing or damaged.
        """
        return _FileDataset(path)


class _FileDataset(EncodedDataset):
    """The rows of a file; ids and targets are read once, on first use."""

    def __init__(self, path: Path) -> None:
        columns = ["length", "target_count", "prompt_length", "truncated", "answer"]
        try:
            pictured = "images" in pq.read_schema(path).names
            table = pq.read_table(path, columns=[*columns, *["images"] * pictured], partitioning=None)
            metadata = table.schema.metadata
            self.name, self.fingerprint = metadata[b"name"].decode(), metadata[b"fingerprint"].decode()
            self.seeing = metadata[b"seeing"].decode()
            self.lengths, self.target_counts, self.prompt_lengths = (
                table[column].to_numpy().astype(np.int64) for column in columns[:3]
            )
            self.truncated = table["truncated"].to_numpy().astype(bool)
            self.answers = table["answer"].to_pylist()
            stored = table["images"].to_pylist() if pictured else [()] * len(self.lengths)
            self.stored = [tuple(ImageRef(**image) for image in images) for images in stored]
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise _unreadable(path, error) from None
        self.path = path
        here = path.absolute().parent.parent  # pathlib keeps an absolute name as it is
        self.images = [tuple(replace(image, file=str(here / image.file)) for image in row) for row in self.stored]
        self._starts = _starts(self.lengths)

    @cached_property
    def _flat(self) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[override]
        try:
            table = pq.read_table(self.path, columns=["input_ids", "targets"], partitioning=None)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise _unreadable(self.path, error) from None
        ids, targets = (
            table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            for column in ("input_ids", "targets")
        )
        if _fingerprint(self.lengths, ids, targets, self.stored, self.seeing) != self.fingerprint:
            raise MixtureError(
                f"{self.path} is damaged: its rows do not match its fingerprint.", "Run the mixture stage again."
            )
        return ids, targets


class Datasets(dict[str, EncodedDataset]):
    """Encoded datasets by name, in order."""

    def only(self, names: Iterable[str]) -> Datasets:
        """Those with these names, in the order of ``names``.

        Raises:
            MixtureError: There is none of such a name.
        """
        names = list(names)
        if missing := [name for name in names if name not in self]:
            raise MixtureError(f"There is no dataset {missing[0]!r}; there are {', '.join(self) or 'none'}.")
        return Datasets({name: self[name] for name in names})


def _unreadable(path: Path, error: Exception) -> MixtureError:
    return MixtureError(f"{path} cannot be read as an encoded dataset: {error}.", "Run the mixture stage again.")


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _fingerprint(
    lengths: np.ndarray, ids: np.ndarray, targets: np.ndarray, images: Sequence[tuple[ImageRef, ...]], seeing: str
) -> str:
    digest = hashlib.sha256()
    for array, dtype in ((lengths, "<i8"), (ids, "<i4"), (targets, "u1")):
        digest.update(np.ascontiguousarray(array.astype(dtype, copy=False)).data)
    if any(images):
        content = [[(image.digest, image.width, image.height) for image in row] for row in images]
        digest.update(json.dumps([content, seeing]).encode())
    return digest.hexdigest()
