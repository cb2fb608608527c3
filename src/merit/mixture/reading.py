"""Rows of one file, or of one hub dataset, each with its place.

Text is kept as it is in the file: type inference would change answers such as ``2020-01-01``, ``007`` or ``None``. CSV goes
through Python's own reader: pandas silently shifts the columns where rows have more fields than the header. Local files are
not copied into a cache. Images come as they are stored, as paths or encoded bytes, a few rows at a time. It finds no
files (:mod:`merit.mixture.sources`) and does not know what a row means.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import gzip
import importlib
import io
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants

from merit.errors import MixtureError
from merit.mixture.formats import recognise

if TYPE_CHECKING:
    from datasets import Dataset

Place = str
Hub = tuple[str, str | None, str]
"""Id, configuration and split of a hub dataset."""

KINDS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
SUFFIXES = (*KINDS, ".jsonl.gz", ".jsonl.zst")
_ROWS_AT_ONCE = 32  # with images in them
_BOM = b"\xef\xbb\xbf"


def kind_of(file: Path) -> str | None:
    """The suffix that says how a data file is read, or None: compressed JSON Lines count as their own kind."""
    return next((suffix for suffix in reversed(SUFFIXES) if file.name.endswith(suffix)), None)


def read_file(
    file: Path, indices: Sequence[int] | None = None, columns: Sequence[str] | None = None
) -> Iterator[tuple[Place, object]]:
    """Rows of a file; of a Parquet file optionally only some rows (ascending, from 0) or columns.

    Raises:
        MixtureError: It cannot be read or parsed; the line is named where there are lines.
    """
    kind = kind_of(file)
    with readable(file):
        if kind == ".parquet":
            if file.stat().st_size:
                for index, row in _parquet(file, indices, columns):
                    yield f"{file}, row {index + 1}", row
        elif kind == ".json":
            yield from _json_document(file)
        elif kind in (".csv", ".tsv"):
            yield from _csv(file)
        else:
            with open_plain(file) as handle:
                for number, _, line in lines(handle):
                    if (parsed := parse_line(file, number, line)) is not None:
                        yield f"{file}, line {number}", parsed[0]


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn whatever a reader raises into one error that names the file."""
    try:
        yield
    except (MixtureError, GeneratorExit):
        raise
    except UnicodeDecodeError as error:
        raise MixtureError(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start}.", "Save it as UTF-8."
        ) from None
    except Exception as error:  # each reader has its own errors; the file is what the user can fix
        first = str(error).strip().split("\n", 1)[0]
        kind = (kind_of(file) or file.suffix)[1:]
        raise MixtureError(f"{file} cannot be read as {kind}: {type(error).__name__}: {first}") from error


def open_plain(file: Path) -> BinaryIO:
    """A file's bytes, decompressed."""
    if file.suffix == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if file.suffix == ".zst":
        return io.BufferedReader(cast(io.RawIOBase, pa.input_stream(str(file), compression="zstd")))
    return file.open("rb")


# ---- JSON ----------------------------------------------------------------------------------------------------------


def lines(handle: BinaryIO, tap: Callable[[bytes], object] | None = None) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, first byte, line) of every line, whatever its line end; a byte order mark is left out.

    Args:
        handle: The file.
        tap: Given every byte that is read, in order.
    """
    number, offset = 0, 0
    for chunk in handle:
        if tap is not None:
            tap(chunk)
        for line in chunk.splitlines(keepends=True) if b"\r" in chunk else (chunk,):
            number += 1
            mark = len(_BOM) if not offset and line.startswith(_BOM) else 0
            yield number, offset + mark, line[mark:]
            offset += len(line)


def parse_line(file: Path, number: int, line: bytes) -> tuple[object] | None:
    """The value of a line of JSON, or None where it is blank.

    Raises:
        MixtureError: It is malformed.
    """
    text = line.decode()
    try:
        return (json.loads(text),)
    except json.JSONDecodeError as error:
        if not text.strip():
            return None
        shown = _excerpt(text.rstrip("\r\n"), error.pos)
        raise MixtureError(
            f"{file}: malformed JSON at line {number}: {error.msg} (column {error.colno}): {shown}",
            "Expected one JSON object per line.",
        ) from None


def _json_document(file: Path) -> Iterator[tuple[Place, object]]:
    text = file.read_bytes().decode("utf-8-sig")
    if not text.strip():
        return
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines under another name
            with file.open("rb") as handle:
                for number, _, line in lines(handle):
                    if (row := parse_line(file, number, line)) is not None:
                        yield f"{file}, line {number}", row[0]
            return
        line_text = text.split("\n")[error.lineno - 1]
        raise MixtureError(
            f"{file}: malformed JSON at line {error.lineno}: {error.msg} (column {error.colno}): "
            f"{_excerpt(line_text, error.colno - 1)}",
            "Expected a list of objects, or one object per line.",
        ) from None
    if isinstance(document, dict) and recognise(document):
        document = [document]
    if not isinstance(document, list):
        raise MixtureError(f"{file}: expected a list of objects; found {type(document).__name__}.")
    del text
    for number, row in enumerate(document, start=1):
        yield f"{file}, row {number}", row


def _excerpt(line: str, position: int) -> str:
    start = max(0, position - 30)
    text = line[start : position + 30]
    return repr(("..." if start else "") + text + ("..." if position + 30 < len(line) else ""))


# ---- CSV and TSV ---------------------------------------------------------------------------------------------------


def _csv(file: Path) -> Iterator[tuple[Place, object]]:
    """Rows of a CSV or TSV file: every row must have as many fields as the header; a quoted field may contain line ends."""
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.reader(handle, strict=True, delimiter="\t" if kind_of(file) == ".tsv" else ",")
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
                        'Put text with a comma, a quote or a line end in quotes: "Say hi, bob".',
                    )
                else:
                    first = int(not header[0])  # an index column that an export added
                    yield f"{file}, line {line}", dict(zip(header[first:], fields[first:], strict=True))
        except csv.Error as error:
            raise MixtureError(
                f"{file}, line {start}: malformed {file.suffix[1:].upper()}: {error}.",
                'A quoted text ends at its closing quote; a quote inside it is doubled: "a ""word"" here".',
            ) from None


def _csv_header(file: Path, header: list[str]) -> list[str]:
    if "" in header[1:]:
        raise MixtureError(
            f"{file}: column {header.index('', 1) + 1} of {len(header)} has no name in the header.",
            "Name it, or remove it (a trailing comma on every line makes such a column).",
        )
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise MixtureError(f"{file}: the column {twice[0]!r} appears twice in the header.")
    return header


# ---- Parquet -------------------------------------------------------------------------------------------------------


def _parquet(
    file: Path, indices: Sequence[int] | None = None, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, row) of a Parquet file, a few rows at a time; row groups without a wanted row are not read.

    The ``datasets`` library would load a whole row group at once, images included.
    """
    with pq.ParquetFile(file, pre_buffer=False) as source:
        columns = [name for name in columns or () if name in source.schema_arrow.names] or None
        groups = range(source.num_row_groups)
        ends = group_ends(source.metadata)
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


def group_ends(metadata: pq.FileMetaData) -> np.ndarray:
    """(row groups,) int64: the row after the last of every row group."""
    return np.cumsum([metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)], dtype=np.int64)


def holds_bytes(file: Path) -> bool:
    """Whether a Parquet file has a column that may contain embedded images."""
    try:
        return kind_of(file) == ".parquet" and "binary" in str(pq.read_schema(file))
    except Exception:  # not Parquet: reading it raises the error
        return False


def embedded_bytes(source: Path | Hub, columns: Collection[str], *, text: bool) -> int:
    """Bytes of the images embedded in these columns, repeated ones included; no row is read.

    Args:
        source: A file, or a hub dataset.
        columns: Names of the columns that images are in.
        text: Rows of text have them, too, as base64.
    """
    if not isinstance(source, Path):
        return _binary_bytes(_hub_table(*source), columns)
    size = source.stat().st_size
    if kind_of(source) != ".parquet":
        compressed = source.suffix in (".gz", ".zst")
        return (size if compressed else size * 3 // 4) if text else 0
    if not size:
        return 0
    with readable(source):
        metadata = pq.read_metadata(source)
    binary = [
        number
        for number in range(metadata.num_columns)
        if (column := metadata.schema.column(number)).path.split(".")[0] in columns
        and (column.physical_type, column.logical_type.type) == ("BYTE_ARRAY", "NONE")
    ]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return sum(int(group.column(number).total_uncompressed_size) for group in groups for number in binary)


def count_rows(file: Path) -> int:
    """Rows of a file, as cheaply as its kind allows; blank lines of JSON Lines are counted too."""
    kind = kind_of(file)
    if kind in (".jsonl", ".jsonl.gz", ".jsonl.zst"):
        with readable(file), open_plain(file) as handle:
            return sum(1 for _ in handle)
    if kind == ".parquet":
        try:
            return int(pq.read_metadata(file).num_rows)
        except Exception:  # not Parquet: reading it raises the error
            return 0
    return sum(1 for _ in read_file(file))


# ---- the hub -------------------------------------------------------------------------------------------------------


def _datasets() -> ModuleType:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    datasets = importlib.import_module("datasets")
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets


def read_hub(
    hub: Hub, indices: Sequence[int] | None = None, columns: Sequence[str] | None = None
) -> Iterator[tuple[Place, object]]:
    """Rows of a hub dataset as they are stored: nothing decodes an image. Optionally only some rows or columns."""
    table = _hub_table(*hub)
    known = [column for column in columns or () if column in table.column_names]
    table = table.select_columns(known) if known else table
    table = table if indices is None else table.select(indices)
    batches = table.with_format("arrow").iter(_ROWS_AT_ONCE)
    rows = (row for batch in batches for row in batch.to_pylist())
    for index, row in zip(range(table.num_rows) if indices is None else indices, rows, strict=True):
        yield f"{hub[0]} [{hub[2]}], row {index + 1}", row


def count_hub(hub: Hub) -> int:
    """Rows of a hub dataset."""
    return int(_hub_table(*hub).num_rows)


@functools.lru_cache(maxsize=4)
def _hub_table(name: str, subset: str | None, split: str) -> Dataset:
    """A hub dataset, mapped from its files in the cache; opened once, however many datasets it is split into."""
    datasets = _datasets()
    if datasets.config.HF_HUB_OFFLINE:
        raise MixtureError(
            f"{name} is not a file or folder here, and the hub is switched off (HF_HUB_OFFLINE).",
            "Give a path that exists, or go online.",
        )
    try:
        return cast("Dataset", datasets.load_dataset(name, subset, split=split))
    except Exception as error:
        first = str(error).strip().split("\n", 1)[0]
        raise MixtureError(
            f"The hub dataset {name} (configuration {subset}, split {split}) cannot be read: "
            f"{type(error).__name__}: {first}",
            "If you meant a local file: it does not exist.",
        ) from error


def cached_bytes(hub: Hub, columns: Collection[str], most: int | None = None) -> int | None:
    """:func:`embedded_bytes` of a hub dataset as the ``datasets`` library keeps it on this machine; nothing is fetched.

    Args:
        hub: The dataset; of a sliced split (``train[:1%]``) the whole counts.
        columns: Names of the columns that images are in.
        most: Maximum rows that are used.

    Returns:
        None if the library has not kept it.
    """
    datasets = _datasets()
    *owner, own = hub[0].split("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "___".join([*owner, datasets.naming.camelcase_to_snakecase(own)])
    split = glob.escape(hub[2].split("[")[0])
    made = {path.parent for path in folder.glob(f"{glob.escape(hub[1]) if hub[1] else '*'}/*/*/dataset_info.json")}
    for place in sorted(made, key=lambda path: path.stat().st_mtime, reverse=True):
        files = [*place.glob(f"*-{split}.arrow"), *place.glob(f"*-{split}-*-of-*.arrow")]
        if files:
            try:
                tables = [datasets.Dataset.from_file(str(file)) for file in files]
            except (OSError, ValueError):  # damaged: the library makes it again
                continue
            total, rows = sum(_binary_bytes(table, columns) for table in tables), sum(map(len, tables))
            return total if most is None else math.ceil(total * min(most, rows) / max(rows, 1))
    return None


def _binary_bytes(table: Dataset, columns: Collection[str]) -> int:
    fields = [table.data.schema.field(name) for name in table.column_names if name in columns]
    return sum(int(table.data.column(field.name).nbytes) for field in fields if "binary" in str(field.type))


def hub_caches() -> tuple[Path, ...]:
    """Where the ``datasets`` library keeps the image files of hub datasets."""
    return (Path(_datasets().config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE))
