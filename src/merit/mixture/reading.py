"""Reading rows: local files, and hub datasets through the ``datasets`` library, each row with its place.

Nothing is copied into anybody's cache for a local file, and text stays as it stands in the file: JSON Lines are read as
lines and CSV cells as text, because type inference turns answers such as ``2020-01-01``, ``007`` or ``None`` into other
things. CSV goes through Python's own reader: pandas, which the library uses, shifts the columns without a word where rows
have more fields than the header. Images come as they are stored, paths or encoded bytes, and a few rows at a time. It finds
no files (:mod:`merit.mixture.sources`) and does not know what a row means.
"""

from __future__ import annotations

import csv
import functools
import glob
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merit.errors import MixtureError
from merit.mixture.formats import recognise

_ROWS_AT_ONCE = 32  # with images in them


@dataclass(frozen=True)
class Part:
    """The training rows, or the test rows, of one dataset.

    Attributes:
        where: File, folder or hub id, for messages and records.
        files: Local files, in the order read.
        hub: (id, configuration, split) of a hub dataset.
        rows: Rows read already, each with its place; for datasets cut out of one file.
        chosen: Instead of ``rows``, where images may be embedded: (Parquet file, or None for the hub dataset; row indices
            from 0, rising).
        cut_from: Files that ``rows`` and ``chosen`` are from.
        folder: Folder of the data files; image paths start from it unless the recipe names another.
    """

    where: str
    files: tuple[Path, ...] = ()
    hub: tuple[str, str | None, str] | None = None
    rows: tuple[tuple[str, Any], ...] | None = None
    chosen: tuple[tuple[Path | None, tuple[int, ...]], ...] = ()
    folder: Path | None = None
    cut_from: tuple[Path, ...] = ()

    def read(self) -> Iterator[tuple[str, Any]]:
        """Yield (place, row): the place is file and line (or row number, from 1) as an error message needs it.

        Raises:
            MixtureError: A file cannot be read or parsed; JSON errors say the line.
        """
        if self.rows is not None:
            yield from self.rows
        elif self.hub is not None and not self.chosen:
            yield from _read_hub(self.hub)
        for file in self.files:
            yield from _read_file(file)
        for place, indices in self.chosen:
            if place is not None:
                yield from _read_file(place, indices)
            elif self.hub is not None:
                yield from _read_hub(self.hub, indices)

    @property
    def by_number(self) -> bool:
        """Whether single rows can be read again (:meth:`again`): those of Parquet files with images, and of the hub."""
        return (
            self.hub is not None
            or bool(self.chosen)
            or (bool(self.files) and all(file.suffix == ".parquet" and _holds_bytes(file) for file in self.files))
        )

    def again(self, numbers: Sequence[int]) -> Iterator[tuple[str, Any]]:
        """The rows with these numbers, from 0 and rising, in the order of :meth:`read`; needs :attr:`by_number`."""
        places: Sequence[tuple[Path | None, Sequence[int]]] = self.chosen
        if not places and self.hub is not None:
            places = [(None, range(self.count()))]
        wanted, start = np.asarray(numbers, dtype=np.int64), 0
        for place, indices in places or [(file, range(_count(file))) for file in self.files]:
            inside = wanted[slice(*np.searchsorted(wanted, [start, start + len(indices)]))] - start
            picked = [indices[number] for number in inside.tolist()]
            if picked and place is not None:
                yield from _read_file(place, picked)
            elif picked and self.hub is not None:
                yield from _read_hub(self.hub, picked)
            start += len(indices)

    def count(self) -> int:
        """Number of rows, as cheaply as the file's kind allows; blank lines of JSON Lines count along.

        Raises:
            MixtureError: As :meth:`read`.
        """
        if self.rows is not None or self.chosen:
            return len(self.rows or ()) + sum(len(indices) for _, indices in self.chosen)
        if self.hub is not None:
            return _hub_table(*self.hub).num_rows
        return sum(_count(file) for file in self.files)

    def split(self, column: str) -> Iterator[tuple[str, Any, tuple[Path | None, int] | None]]:
        """Yield (place, row, None), or (place, {column: value}, what ``chosen`` has) for a row that is read again later.

        Raises:
            MixtureError: As :meth:`read`.
        """
        for file in self.files:
            if file.suffix == ".parquet" and _holds_bytes(file):
                for index, (place, row) in enumerate(_read_file(file, columns=[column])):
                    yield place, row, (file, index)
            else:
                for place, row in _read_file(file):
                    yield place, row, None
        if self.hub is not None:
            for index, (place, row) in enumerate(_read_hub(self.hub, columns=[column])):
                yield place, row, (None, index)


def _datasets() -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    # Its readers log every error that they raise, too: the user gets one message, ours.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL + 1)
    return datasets


def _read_file(
    file: Path, indices: Sequence[int] | None = None, columns: list[str] | None = None
) -> Iterator[tuple[str, Any]]:
    """Rows of a file; of a Parquet file maybe some rows or columns only."""
    try:
        if file.suffix == ".jsonl":
            yield from _json_lines(file, _lines(file))
        elif file.suffix == ".json":
            yield from _json_document(file)
        elif file.suffix == ".csv":
            yield from _csv(file)
        elif file.stat().st_size:
            for index, row in _parquet(file, indices, columns):
                yield f"{file}, row {index + 1}", row
    except (MixtureError, GeneratorExit):
        raise
    except UnicodeDecodeError as error:
        raise MixtureError(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start}.", "Save it as UTF-8."
        ) from None
    except Exception as error:  # each reader has its own errors; the file is what the user can mend
        first = str(error).strip().split("\n", 1)[0]
        raise MixtureError(f"{file} cannot be read as {file.suffix[1:]}: {type(error).__name__}: {first}") from error


def _stream(kind: str, file: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """Rows of one local file through the ``datasets`` library, streamed: nothing is copied into a cache."""
    with tempfile.TemporaryDirectory(prefix="merit-") as cache:  # even a stream makes its cache folder
        stream = _datasets().load_dataset(
            kind, data_files=glob.escape(str(file)), split="train", streaming=True, cache_dir=cache, **options
        )
        for batch in stream.with_format("arrow").iter(batch_size=1000):
            yield from batch.to_pylist()


def _parquet(
    file: Path, indices: Sequence[int] | None = None, columns: list[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, row) of a Parquet file, a few rows at a time; row groups without a wanted row are not read.

    The ``datasets`` library would hold a whole row group at once, images and all.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, pre_buffer=False) as source:
        columns = [name for name in columns or () if name in source.schema_arrow.names] or None
        groups = range(source.num_row_groups)
        ends = np.cumsum([source.metadata.row_group(group).num_rows for group in groups], dtype=np.int64)
        starts = ends - np.diff(ends, prepend=0)
        wanted = None if indices is None else np.asarray(indices, dtype=np.int64)
        for group in groups:
            start, end = int(starts[group]), int(ends[group])
            inside = None if wanted is None else wanted[slice(*np.searchsorted(wanted, [start, end]))]
            if inside is not None and not len(inside):
                continue
            for batch in source.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns):
                if inside is None:
                    yield from enumerate(batch.to_pylist(), start=start)
                else:
                    here = inside[slice(*np.searchsorted(inside, [start, start + batch.num_rows]))]
                    yield from zip(here.tolist(), batch.take(here - start).to_pylist(), strict=True)
                start += batch.num_rows


def _count(file: Path) -> int:
    import pyarrow.parquet as pq

    if file.suffix == ".jsonl":
        with file.open("rb") as handle:
            return sum(1 for _ in handle)
    if file.suffix == ".parquet":
        try:
            return pq.read_metadata(file).num_rows
        except Exception:  # not Parquet: whoever reads it says so
            return 0
    return sum(1 for _ in _read_file(file))


def _holds_bytes(file: Path) -> bool:
    """Whether a Parquet file has a column that may hold embedded images."""
    import pyarrow.parquet as pq

    try:
        return "binary" in str(pq.read_schema(file))
    except Exception:  # not Parquet: whoever reads it says so
        return False


def _lines(file: Path) -> Iterator[str]:
    if file.stat().st_size:
        for row in _stream("text", file, encoding="utf-8-sig"):
            yield row["text"]


def _json_lines(file: Path, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MixtureError(
                f"{file}: malformed JSON at line {number}: {error.msg} (column {error.colno}): {_excerpt(line, error.pos)}",
                "Expected one JSON object per line.",
            ) from None
        yield f"{file}, line {number}", row


def _json_document(file: Path) -> Iterator[tuple[str, Any]]:
    text = "\n".join(_lines(file))
    if not text.strip():
        return
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines under another name
            yield from _json_lines(file, iter(text.split("\n")))
            return
        line = text.split("\n")[error.lineno - 1]
        raise MixtureError(
            f"{file}: malformed JSON at line {error.lineno}: {error.msg} (column {error.colno}): "
            f"{_excerpt(line, error.colno - 1)}",
            "Expected a list of objects, or one object per line.",
        ) from None
    if isinstance(document, dict) and recognise(document):
        document = [document]
    if not isinstance(document, list):
        raise MixtureError(f"{file}: expected a list of objects; found {type(document).__name__}.")
    for number, row in enumerate(document, start=1):
        yield f"{file}, row {number}", row


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a CSV file: every row must have as many fields as the header; a field may hold quoted commas and lines."""
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.reader(handle, strict=True)
        header, start = None, 1
        try:
            for fields in reader:
                start, line = reader.line_num + 1, start
                if not fields:
                    continue
                if header is None:
                    header = _csv_header(file, fields)
                elif len(fields) != len(header):
                    raise MixtureError(
                        f"{file}, line {line}: expected {len(header)} fields, as in the header; found {len(fields)}.",
                        'Put a text that holds a comma, a quote or a line end into quotes: "Say hi, bob".',
                    )
                else:
                    first = int(not header[0])  # an index that somebody's export wrote along
                    yield f"{file}, line {line}", dict(zip(header[first:], fields[first:], strict=True))
        except csv.Error as error:
            raise MixtureError(
                f"{file}, line {start}: malformed CSV: {error}.",
                'A text in quotes ends at its closing quote; a quote inside it is written twice: "a ""word"" here".',
            ) from None


def _csv_header(file: Path, header: list[str]) -> list[str]:
    if "" in header[1:]:
        raise MixtureError(
            f"{file}: column {header.index('', 1) + 1} of {len(header)} has no name in the header.",
            "Name it, or remove it (a comma at the end of every line makes such a column).",
        )
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise MixtureError(f"{file}: the column {twice[0]!r} stands twice in the header.")
    return header


def _read_hub(
    hub: tuple[str, str | None, str], indices: Sequence[int] | None = None, columns: list[str] | None = None
) -> Iterator[tuple[str, Any]]:
    """Rows of a hub dataset as they are stored: nothing decodes an image. Maybe some rows or columns only."""
    table = _hub_table(*hub)
    known = [column for column in columns or () if column in table.column_names]
    table = table.select_columns(known) if known else table
    table = table if indices is None else table.select(indices)
    batches = table.with_format("arrow").iter(_ROWS_AT_ONCE)
    rows = (row for batch in batches for row in batch.to_pylist())
    for index, row in zip(range(table.num_rows) if indices is None else indices, rows, strict=True):
        yield f"{hub[0]} [{hub[2]}], row {index + 1}", row


@functools.lru_cache(maxsize=4)
def _hub_table(name: str, subset: str | None, split: str) -> Any:
    """A hub dataset, mapped from its files in the cache; opened once, however many datasets are cut from it."""
    datasets = _datasets()
    if datasets.config.HF_HUB_OFFLINE:
        raise MixtureError(
            f"{name} is no file or folder here, and the hub is switched off (HF_HUB_OFFLINE).",
            "Give a path that exists, or go online.",
        )
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        first = str(error).strip().split("\n", 1)[0]
        raise MixtureError(
            f"The hub dataset {name} (configuration {subset}, split {split}) cannot be read: "
            f"{type(error).__name__}: {first}",
            "If a local file was meant: it does not exist.",
        ) from error


def hub_caches() -> tuple[Path, ...]:
    """Where the ``datasets`` library keeps the image files of hub datasets."""
    from huggingface_hub import constants

    return (Path(_datasets().config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE))


def _excerpt(line: str, position: int) -> str:
    start = max(0, position - 30)
    text = line[start : position + 30]
    return repr(("..." if start else "") + text + ("..." if position + 30 < len(line) else ""))
