"""The images of a dataset's rows: found by path or in the row, decoded once by several threads; embedded ones are stored.

An image file is referred to where it lies. Embedded bytes go to disk as their rows are read, each once, into one file per
dataset and split; after the rows are chosen it keeps those of used rows. No more images than threads, times two, are looked
at at any time. What a row means is :mod:`merit.mixture.formats`' business.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Self

from PIL.Image import Image

from merit.files import create, publish
from merit.hf.images import BadImage, ImageRef, digest, encode_image, examine, locate_image, read_image_file
from merit.mixture.chat import BadRow, Chat, RawImage, Row
from merit.recipe.schema import ImageSettings

IMAGE_COLUMNS = ("images", "image")
_DATA = re.compile(r"data:[\w/+.;-]*;base64,", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def row_images(row: Mapping[str, Any]) -> tuple[list[RawImage], bool]:
    """The images of a row's ``images`` or ``image`` column, and whether it has such a column at all.

    A column that is null, empty text or an empty list has none.

    Raises:
        BadRow: Both columns have images, or a value is not an image.
    """
    found = {column: _listed(row[column]) for column in IMAGE_COLUMNS if column in row}
    filled = [column for column, values in found.items() if values]
    if len(filled) > 1:
        raise BadRow("image_count", "both columns, images and image, have images; it is not clear which are meant")
    if not filled:
        return [], bool(found)
    [column] = filled
    values = found[column]
    return [
        raw_image(value, f"{column}[{index}]" if len(values) > 1 else column) for index, value in enumerate(values)
    ], True


def _listed(value: object) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # in a CSV cell a list is written as JSON
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None or value == "" else [value]


def raw_image(value: object, where: str) -> RawImage:
    """One image as its path or bytes.

    Args:
        value: Path, ``file://`` or base64 ``data:`` URL, bytes, ``{"bytes", "path"}`` or a PIL image.
        where: Where it stands in the row, for messages.

    Raises:
        BadRow: image_missing, image_format, or image_url (nothing is fetched from elsewhere).
    """
    if isinstance(value, Mapping):
        given = [value[key] for key in ("bytes", "path") if value.get(key) is not None]
        if not given and ("bytes" in value or "path" in value):
            raise BadRow("image_missing", f"{where} has neither bytes nor a path")
        if given:
            return raw_image(given[0], where)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        return _from_text(value, where)
    if isinstance(value, Image):
        return encode_image(value)
    if value is None:
        raise BadRow("image_missing", f"{where} is null")
    raise BadRow("image_format", f"{where} must be a path or the bytes of an image file; found {value!r:.60}")


def _from_text(text: str, where: str) -> RawImage:
    if not text:
        raise BadRow("image_missing", f"{where} is an empty path")
    if found := _DATA.match(text):
        try:
            return base64.b64decode(text[found.end() :], validate=True)
        except binascii.Error as error:
            raise BadRow("image_damaged", f"{where} is not valid base64: {error}") from None
    if text.startswith("file://"):
        return text.removeprefix("file://")
    if _SCHEME.match(text):
        raise BadRow(
            "image_url",
            f"{where} is a URL ({text[:80]}): images are read only from files; download it and name the file",
        )
    return text


class ImageFile:
    """The embedded images of one dataset and split, one after the other, each once.

    Args:
        folder: The stage's folder, while it is made.
        name: The file's path in it, as references have it.

    Attributes:
        size: Its bytes, once :meth:`keep` has closed it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.name = folder / name, name
        self._handle: BinaryIO | None = None
        self._refs: dict[str, ImageRef] = {}
        self._end = self.size = 0

    def put(self, data: bytes) -> ImageRef:
        """Write an image that has not been decoded yet, unless its bytes are stored already; width and height are 0."""
        key = digest(data)
        if key not in self._refs:
            if self._handle is None:
                self._handle = create(self.path)
            self._handle.write(data)
            self._refs[key] = ImageRef(self.name, self._end, len(data), 0, 0, key)
            self._end += len(data)
        return self._refs[key]

    def written(self) -> Self:
        """Itself, with all bytes where :meth:`read` finds them."""
        if self._handle is not None:
            self._handle.flush()
        return self

    def read(self, ref: ImageRef) -> bytes:
        """The bytes of an image that was put in; by any thread."""
        assert self._handle is not None
        return os.pread(self._handle.fileno(), ref.nbytes, ref.offset)

    def keep(self, rows: Iterable[Sequence[ImageRef]]) -> dict[str, int]:
        """Close the file with the images of ``rows`` only, in the order of their first use.

        Returns:
            The first byte of every image by its digest, if any has moved.
        """
        self.close()
        used = list(dict.fromkeys(ref.digest for images in rows for ref in images if ref.file == self.name))
        self.size = sum(self._refs[key].nbytes for key in used)
        if used == list(self._refs):
            return {}
        moved: dict[str, int] = {}
        unfinished = self.path.with_name(self.path.name + ".part")
        with self.path.open("rb") as old, create(unfinished) as new:
            for key in used:
                old.seek(self._refs[key].offset)
                moved[key] = new.tell()
                new.write(old.read(self._refs[key].nbytes))
        publish(unfinished, self.path)
        if not used:
            self.path.unlink()
        return moved

    def close(self) -> None:
        """Close the file as it is."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ImageFolder:
    """Where the images of one part's rows are looked for, and what is known of those seen.

    Args:
        folders: Folders, one of which an image must lie in.
        settings: The recipe's limits.
        relative: Relative paths start from the first folder.
        store: Where embedded images were put, if they were.
    """

    def __init__(
        self, folders: Sequence[Path], settings: ImageSettings, *, relative: bool = True, store: ImageFile | None = None
    ) -> None:
        self.folders = tuple(path.resolve() for path in folders)
        self.relative = relative
        self.max_pixels = settings.max_file_pixels
        self.store = store
        self._files: dict[str, ImageRef | BadImage] = {}
        self._sizes: dict[str, tuple[int, int] | BadImage] = {}

    def locate(self, raw: str) -> Path:
        """The file that a path means.

        Raises:
            BadImage: There is none, or it lies elsewhere.
        """
        return locate_image(raw, self.folders if self.relative or Path(raw).is_absolute() else ())

    def look(self, raw: RawImage | ImageRef) -> ImageRef:
        """Read and decode one image, unless it was seen before.

        Raises:
            BadImage: It cannot be used.
        """
        if isinstance(raw, bytes):
            return self._examined(ImageRef("", 0, len(raw), 0, 0, digest(raw)), raw)
        if isinstance(raw, ImageRef):
            return self._examined(raw, None)
        known = self._files.get(raw)
        if known is None:
            try:
                path = self.locate(raw)
                data = read_image_file(path, self.max_pixels)
                known = self._examined(ImageRef(str(path), 0, len(data), 0, 0, digest(data)), data)
            except BadImage as bad:
                named = raw if len(raw) <= 200 else raw[:197] + "..."
                known = bad if named in bad.detail else BadImage(bad.reason, f"{named}: {bad.detail}")
            self._files[raw] = known
        if isinstance(known, BadImage):
            raise known
        return known

    def _examined(self, ref: ImageRef, data: bytes | None) -> ImageRef:
        found = self._sizes.get(ref.digest)
        if found is None:
            if data is None:
                assert self.store is not None
                data = self.store.read(ref)
            try:
                found = examine(data, self.max_pixels)
            except BadImage as bad:
                found = bad
            self._sizes[ref.digest] = found
        if isinstance(found, BadImage):
            raise found
        return replace(ref, width=found[0], height=found[1])


UNREAD = ImageRef("", 0, 0, 0, 0, "")
"""In place of embedded bytes that are read again when they are needed."""


def put_images(chat: Chat, store: ImageFile, *, later: bool = False) -> Chat:
    """The chat with its embedded bytes in ``store``; with ``later`` as :data:`UNREAD`, to be read again."""

    def put(image: RawImage | ImageRef) -> RawImage | ImageRef:
        if not isinstance(image, bytes):
            return image
        return UNREAD if later else store.put(image)

    return replace(chat, raw=tuple(map(put, chat.raw)))


Seen = list[ImageRef | BadImage]
"""What was found behind each image of a row."""


def look_at_images(rows: Iterable[Row], folder: ImageFolder) -> Iterator[tuple[str, Chat | BadRow, Seen]]:
    """The same rows in order, with what is behind their images; several threads read and decode."""
    threads = image_threads()
    pending: deque[tuple[str, Chat | BadRow, list[Future[ImageRef]]]] = deque()
    in_flight = 0
    pool: ThreadPoolExecutor | None = None
    try:
        for place, chat in rows:
            raw = chat.raw if isinstance(chat, Chat) else ()
            if not raw and not pending:
                yield place, chat, []
                continue
            pool = pool or ThreadPoolExecutor(threads, thread_name_prefix="images")
            pending.append((place, chat, [pool.submit(folder.look, image) for image in raw]))
            in_flight += len(raw)
            while in_flight > 2 * threads or len(pending) > 1024:
                first = pending.popleft()
                in_flight -= len(first[2])
                yield first[0], first[1], _results(first[2])
                del first
        while pending:
            first = pending.popleft()
            yield first[0], first[1], _results(first[2])
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _results(futures: Sequence[Future[ImageRef]]) -> Seen:
    seen: Seen = []
    for future in futures:
        try:
            seen.append(future.result())
        except BadImage as bad:
            seen.append(bad)
    return seen


def image_threads() -> int:
    """Threads that read and decode images in parallel."""
    return min(16, os.cpu_count() or 1)


def usable(chat: Chat | BadRow, seen: Seen) -> Chat:
    """The chat with references to its images.

    Raises:
        BadRow: The row, or one of its images, cannot be used.
    """
    if isinstance(chat, BadRow):
        raise chat
    refs = []
    for index, item in enumerate(seen):
        if isinstance(item, BadImage):
            which = f"image {index + 1} of {len(seen)}" if len(seen) > 1 else "its image"
            raise BadRow(item.reason, f"{which}: {item.detail}")
        refs.append(item)
    return replace(chat, images=tuple(refs), raw=()) if refs else chat
