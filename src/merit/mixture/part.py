"""The rows of one side of a dataset, and one file cut into many datasets by a column, read once and held on disk.

A cut keeps an address per row: the line's first byte in a JSON Lines file, the row's number in a Parquet file. Rows of other
files (CSV, a JSON document, compressed lines), and those of a Parquet file whose datasets are mixed all over it, go in one
pass to an unnamed scratch file (in ``TMPDIR``) and are addressed there. No row stays in memory.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import pickle
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow.parquet as pq

from merit.errors import MixtureError, ResourceError, nearest
from merit.files import free_bytes
from merit.mixture.chat import BadRow, Row
from merit.mixture.formats import RowFormat, recognise, refuse_surrogates, to_chat
from merit.mixture.images import IMAGE_COLUMNS
from merit.mixture.reading import (
    Hub,
    Place,
    cached_bytes,
    count_hub,
    count_rows,
    embedded_bytes,
    group_ends,
    holds_bytes,
    kind_of,
    lines,
    parse_line,
    read_file,
    read_hub,
    readable,
)

_FEW = 8
"""Rows of each dataset that are read from a mixed Parquet file as it lies."""
IMAGE_NAME = b'"image'


class Store(Protocol):
    """Rows that can be read by their addresses."""

    def rows(self, keys: np.ndarray) -> Iterator[tuple[Place, object]]:
        """The rows at these addresses (rising)."""


Cut = tuple[tuple[Store, np.ndarray], ...]
"""Rows cut out of stores: each with the addresses, in the order read."""


@dataclass(frozen=True)
class Part:
    """The training rows, or the test rows, of one dataset.

    Attributes:
        where: File, folder or hub id, for messages and records.
        files: Local files, in the order read; those that the rows are cut from.
        hub: A hub dataset.
        folder: Folder of the data files; image paths start from it unless the recipe names another.
        cut: Rows cut out of files or of the hub, if they are.
        columns: Pairs of (name that a row format knows, the rows' own name for it).
        shared: The pairs are of a whole folder: rows of a known format with none of these columns stay as they are.
    """

    where: str
    files: tuple[Path, ...] = ()
    hub: Hub | None = None
    folder: Path | None = None
    cut: Cut | None = field(default=None, compare=False)
    columns: tuple[tuple[str, str], ...] = ()
    shared: bool = False

    def read(self, limit: int | None = None) -> Iterator[tuple[Place, object]]:
        """Yield (place, row), maybe the first ``limit`` only: file and line (or row number, from 1), for messages.

        Raises:
            MixtureError: A file cannot be read or parsed; JSON errors say the line.
        """
        rows = islice(self._rows(limit), limit)
        return ((place, self._renamed(row)) for place, row in rows) if self.columns else rows

    def _rows(self, limit: int | None) -> Iterator[tuple[Place, object]]:
        if self.cut is not None:
            for store, keys in self.cut:
                yield from store.rows(keys[:limit])
        elif self.hub is not None:
            yield from read_hub(self.hub)
        else:
            for file in self.files:
                yield from read_file(file)

    def _renamed(self, row: object) -> object:
        if not isinstance(row, Mapping):
            return row
        theirs = {own for _, own in self.columns}
        named = {name: row[own] for name, own in self.columns if own in row}
        return {key: value for key, value in row.items() if key not in theirs and key not in named} | named

    @cached_property
    def first(self) -> tuple[Place, object] | None:
        """The first row, read once; None where there is none.

        Raises:
            MixtureError: As :meth:`read`; or a column that the recipe renames is not there.
        """
        place, row = next(self._rows(1), ("", None))
        if not place:
            return None
        if (
            self.shared
            and isinstance(row, Mapping)
            and recognise(row)
            and not {own for _, own in self.columns} & {*row}
        ):
            return place, row
        for name, own in self.columns:
            if isinstance(row, Mapping) and own not in row:
                raise MixtureError(
                    f"{place}: no column {own!r} (columns: {name}: {own}); columns: {list(row)}.{nearest(own, list(row))}"
                )
        return place, self._renamed(row) if self.columns else row

    def chats(self, row_format: RowFormat, limit: int | None = None) -> Iterator[Row]:
        """Every row in order (or the first ``limit``) as a chat; images are not opened.

        Raises:
            MixtureError: As :meth:`read`.
        """
        for place, row in self.read(limit):
            try:
                yield place, to_chat(row, row_format)
            except BadRow as bad:
                yield place, bad

    @property
    def by_number(self) -> bool:
        """Whether single rows can be read again (:meth:`again`): cut ones, those of Parquet with images, and the hub's."""
        return self.hub is not None or self.cut is not None or (bool(self.files) and all(map(holds_bytes, self.files)))

    def again(self, numbers: Sequence[int]) -> Iterator[tuple[Place, object]]:
        """The rows with these numbers, from 0 and rising, in the order of :meth:`read`; needs :attr:`by_number`."""
        stores: Cut = self.cut or ()
        if not stores and self.hub is not None:
            stores = ((_Numbered(self.hub), np.arange(self.count())),)
        elif not stores:
            stores = tuple((_Numbered(file), np.arange(count_rows(file))) for file in self.files)
        wanted, start = np.asarray(numbers, dtype=np.int64), 0
        for store, keys in stores:
            inside = wanted[slice(*np.searchsorted(wanted, [start, start + len(keys)]))] - start
            if len(inside):
                for place, row in store.rows(keys[inside]):
                    yield place, self._renamed(row) if self.columns else row
            start += len(keys)

    def embedded_bytes(self, *, text: bool, most: int | None = None) -> int:
        """About the bytes of the images embedded in the rows; no row is read where the file's kind tells their number.

        Args:
            text: Rows of text have images, too, as base64.
            most: Maximum rows that are used.
        """
        sources = [self.hub] if self.hub is not None else self.files
        total = sum(embedded_bytes(source, self._image_columns, text=text) for source in sources)
        if not total or (most is None and self.cut is None):
            return total
        rows = count_hub(self.hub) if self.hub is not None else sum(map(count_rows, self.files))
        return math.ceil(total * min(most or rows, self.count()) / max(rows, 1))

    def cached_bytes(self, most: int | None = None) -> int | None:
        """:meth:`embedded_bytes` of a hub dataset of which nothing is fetched; None if it is not on this machine."""
        return None if self.hub is None else cached_bytes(self.hub, self._image_columns, most)

    @property
    def _image_columns(self) -> set[str]:
        return {*IMAGE_COLUMNS, *(own for name, own in self.columns if name in IMAGE_COLUMNS)}

    def count(self) -> int:
        """Number of rows, as cheaply as the file's kind allows; blank lines of JSON Lines are counted too.

        Raises:
            MixtureError: As :meth:`read`.
        """
        if self.cut is not None:
            return sum(len(keys) for _, keys in self.cut)
        return count_hub(self.hub) if self.hub is not None else sum(map(count_rows, self.files))


@dataclass(frozen=True)
class FileFacts:
    """What a pass over a file tells besides its rows.

    Attributes:
        sha256: Of its bytes.
        images: Whether a name that begins with ``image`` stands in it, as it does in every row of JSON that names one.
    """

    sha256: str
    images: bool


def cut_by_column(part: Part, column: str, known: dict[Path, FileFacts]) -> dict[str, Part]:
    """One part per value of a column, in the order of their first rows; every file is read once.

    Args:
        part: The whole.
        column: Its column of dataset names.
        known: Facts about the JSON Lines files that are read are added here.

    Raises:
        MixtureError: A file cannot be read, or a row names no dataset.
    """
    own = dict(part.columns).get(column, column)
    groups: dict[str, list[tuple[Store, np.ndarray]]] = {}
    for file in [part.hub] if part.hub is not None else part.files:
        keys: dict[str, array[int]] = {}
        store: Store
        if not isinstance(file, Path):
            store = _Numbered(file)
            _index_numbers(read_hub(file, columns=[own]), own, keys)
        elif kind_of(file) == ".parquet":
            store = _Numbered(file)
            _index_numbers(read_file(file, columns=[own]), own, keys)
            if _mixed(file, keys) and (not holds_bytes(file) or _fits(file)):
                store.heads = np.unique(np.concatenate([np.frombuffer(k, np.int64)[:_FEW] for k in keys.values()]))
        elif kind_of(file) == ".jsonl":
            store = _Lines(file)
            known[file] = store.index(own, keys)
        else:
            store = _Scratch()
            for place, row in read_file(file):
                keys.setdefault(_value(place, row, own), array("q")).append(store.put(place, row))
        for value, numbers in keys.items():
            found = np.frombuffer(numbers, dtype=np.int64)
            groups.setdefault(value, []).append((store, found.reshape(-1, 3) if isinstance(store, _Lines) else found))
    if not groups:
        raise MixtureError(f"{part.where} has no rows.")
    return {
        value: Part(f"{part.where} [{column}={value}]", part.files, part.hub, part.folder, tuple(cut), part.columns)
        for value, cut in groups.items()
    }


def _value(place: Place, row: object, column: str) -> str:
    """The dataset that a row names."""
    if not isinstance(row, dict) or column not in row:
        columns = list(row) if isinstance(row, dict) else []
        raise MixtureError(
            f"{place}: no column {column!r} (mixture.split_by); columns: {columns}.{nearest(column, columns)}"
        )
    value = row[column]
    if value is None or value == "":
        raise MixtureError(
            f"{place}: {column} (mixture.split_by) is null, so the row belongs to no dataset.",
            "Name it, or remove the row.",
        )
    try:
        refuse_surrogates(str(value), f"{column} (mixture.split_by)")
    except BadRow as bad:
        raise MixtureError(f"{place}: {bad.detail}.", "Correct the row, or remove it.") from None
    return str(value)


def _index_numbers(rows: Iterator[tuple[Place, object]], column: str, keys: dict[str, array[int]]) -> None:
    for index, (place, row) in enumerate(rows):
        keys.setdefault(_value(place, row, column), array("q")).append(index)


def _mixed(file: Path, keys: Mapping[str, array[int]]) -> bool:
    """Whether reading dataset by dataset would read most row groups of a Parquet file several times."""
    ends = group_ends(pq.read_metadata(file))
    touched = sum(len(np.unique(np.searchsorted(ends, np.frombuffer(k, np.int64), "right"))) for k in keys.values())
    return touched > 2 * len(ends)


def _fits(file: Path) -> bool:
    """Whether a file's rows with their images can be kept next to other temporary files meanwhile."""
    return free_bytes(Path(tempfile.gettempdir())) > 1.5 * file.stat().st_size + 2**30


class _Lines:
    """Lines of a JSON Lines file; an address is (first byte, bytes, line number)."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def index(self, column: str, keys: dict[str, array[int]]) -> FileFacts:
        """Parse every line once and note where the rows of each value lie."""
        digest, images = hashlib.sha256(), False
        with readable(self.file), self.file.open("rb") as handle:
            for number, offset, line in lines(handle, digest.update):
                images = images or IMAGE_NAME in line
                if (row := parse_line(self.file, number, line)) is not None:
                    value = _value(f"{self.file}, line {number}", row[0], column)
                    keys.setdefault(value, array("q")).extend((offset, len(line), number))
        return FileFacts(digest.hexdigest(), images)

    def rows(self, keys: np.ndarray) -> Iterator[tuple[Place, object]]:
        with readable(self.file), self.file.open("rb") as handle:
            for offset, size, number in keys.tolist():
                row = parse_line(self.file, number, os.pread(handle.fileno(), size, offset))
                if row is None:
                    raise MixtureError(f"{self.file}: line {number} changed while it was read.", "Run it again.")
                yield f"{self.file}, line {number}", row[0]


class _Numbered:
    """Rows of a Parquet file or of the hub; an address is the row's number.

    Attributes:
        heads: Where the datasets cut from the file lie all over it: the first rows of each, read together when one is
            asked for. For more than those it is worth going over the file once.
    """

    def __init__(self, source: Path | Hub) -> None:
        self.source = source
        self.heads: np.ndarray | None = None
        self._first: dict[int, tuple[Place, object]] = {}
        self._scratch: tuple[_Scratch, np.ndarray] | None = None

    def rows(self, keys: np.ndarray) -> Iterator[tuple[Place, object]]:
        if not isinstance(self.source, Path):
            yield from read_hub(self.source, keys.tolist())
        elif self.heads is None:
            yield from read_file(self.source, keys.tolist())
        elif len(keys) <= _FEW and np.isin(keys, self.heads).all():
            if not self._first:
                self._first = dict(zip(self.heads.tolist(), read_file(self.source, self.heads.tolist()), strict=True))
            yield from (self._first[key] for key in keys.tolist())
        else:
            if self._scratch is None:
                scratch, self._first = _Scratch(), {}
                self._scratch = scratch, np.array([scratch.put(*row) for row in read_file(self.source)], dtype=np.int64)
            scratch, addresses = self._scratch
            yield from scratch.rows(addresses[keys])


class _Scratch:
    """Rows in an unnamed file that goes with the process; an address is the first byte."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="merit-")  # noqa: SIM115  it lives as long as the parts that read it
        self._end = 0

    def put(self, place: Place, row: object) -> int:
        """Write a row; returns its address."""
        data, address = pickle.dumps((place, row), protocol=5), self._end
        try:
            self._file.write(len(data).to_bytes(8, "little") + data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ResourceError(
                f"{tempfile.gettempdir()} is full: the rows of a file that is cut by mixture.split_by are kept there "
                "temporarily.",
                "Set the environment variable TMPDIR to a folder on a larger disk, or convert the file to JSON Lines.",
            ) from None
        self._end += 8 + len(data)
        return address

    def rows(self, keys: np.ndarray) -> Iterator[tuple[Place, object]]:
        self._file.flush()
        number = self._file.fileno()
        for address in keys.tolist():
            size = int.from_bytes(os.pread(number, 8, address), "little")
            place, row = pickle.loads(os.pread(number, size, address + 8))
            yield place, row
