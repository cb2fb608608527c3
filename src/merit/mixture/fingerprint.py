"""What the source files hold, as one hash per dataset: so that a changed row is noticed before anything is computed from it.

It hashes the bytes of data files. Of the image files that their rows name it takes name and size: a look at every file's
entry costs seconds where reading a hundred gigabytes would cost an hour, and, unlike a modification time, it says the same
on every machine. An image that changes without changing its size is noticed when it is next decoded
(``read_image`` compares its digest). Hub datasets count by id, configuration and split: their content is
checked by the encoded rows' own fingerprints.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from merit.errors import MixtureError
from merit.hf.images import BadImage
from merit.mixture.formats import to_chat
from merit.mixture.image_store import ImageFolder
from merit.mixture.reading import Part
from merit.mixture.row_images import BadRow
from merit.mixture.sources import Source, discover, discover_kept
from merit.recipe.schema import Recipe

_STAT_THREADS = 32  # they wait for a file server, not for a core


def source_fingerprints(recipe: Recipe, memo: MutableMapping[str, str] | None = None) -> dict[str, str]:
    """SHA-256 (hex) of every dataset's source files, kept sets included; the place of data files plays no part.

    Args:
        recipe: The recipe.
        memo: Known file hashes by path, size and modification time; read and extended.

    Raises:
        MixtureError: A source is missing.
    """
    memo = {} if memo is None else memo
    found = {}
    for source in [*discover(recipe.mixture), *discover_kept(recipe.evaluate)]:
        parts = {"train": source.train, "test": source.test}
        content = {split: _content(part, source, recipe, memo) for split, part in parts.items() if part is not None}
        found[source.name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return found


def _content(part: Part, source: Source, recipe: Recipe, memo: MutableMapping[str, str]) -> object:
    if part.hub is not None:
        return part.hub
    files = part.files or part.cut_from
    hashes = [_file_hash(file, memo) for file in files]
    without = json.dumps(["names no image files", part.where, *hashes])
    if without in memo:
        return hashes
    possible = [_may_name_images(file, known, memo) for file, known in zip(files, hashes, strict=True)]
    images = _image_files(part, source, recipe) if any(possible) else None
    if images is None:
        memo[without] = ""
        return hashes
    return {"files": hashes, "images": images}


def _image_files(part: Part, source: Source, recipe: Recipe) -> str | None:
    """SHA-256 over names and sizes of the image files that a part's rows name; None where they name none."""
    folder = ImageFolder(part, source.images, recipe.mixture.images)

    def size(name: str) -> int:
        try:
            return folder.locate(name).stat().st_size
        except (BadImage, OSError):
            return -1  # missing: it counts as a change when it comes

    hashed, names = None, _names(part, source)
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        while some := list(islice(names, 4096)):
            hashed = hashed or hashlib.sha256()
            for name, count in zip(some, pool.map(size, some), strict=True):
                hashed.update(f"{name}\0{count}\n".encode())
    return None if hashed is None else hashed.hexdigest()


def _names(part: Part, source: Source) -> Iterator[str]:
    """Paths of images as the rows have them, each once."""
    seen: set[str] = set()
    try:
        row_format = source.recognise(part)
        for _, row in part.read():
            try:
                raw = to_chat(row, row_format).raw
            except BadRow:
                continue
            for image in raw:
                if isinstance(image, str) and image not in seen:
                    seen.add(image)
                    yield image
    except MixtureError:  # it cannot be read: its bytes are in the hash, and whoever needs its rows will say so
        return


def _may_name_images(file: Path, content: str, memo: MutableMapping[str, str]) -> bool:
    """False where no row of a data file can have an image; told without reading its rows, once per file."""
    key = json.dumps(["may name image files", content])
    if key not in memo:
        memo[key] = str(_has_the_words(file))
    return memo[key] == str(True)


def _has_the_words(file: Path) -> bool:
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            schema = str(pq.read_schema(file))
        except Exception:  # not Parquet: whoever reads it says so
            return False
        return "image" in schema or "path" in schema or "url" in schema
    if not file.stat().st_size:
        return False
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"image") >= 0


def _file_hash(file: Path, memo: MutableMapping[str, str]) -> str:
    facts = file.stat()
    key = json.dumps([str(file.resolve()), facts.st_size, facts.st_mtime_ns])
    if key not in memo:
        with file.open("rb") as opened:
            memo[key] = hashlib.file_digest(opened, "sha256").hexdigest()
    return memo[key]
