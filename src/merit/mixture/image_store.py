"""The images of a dataset's rows: each found, read and decoded once, by several threads; embedded ones put into one file.

An image file is referred to where it lies. Embedded bytes go to disk as their rows are read, each once, into one file per
dataset and split; after the rows are chosen it keeps those of used rows. No more images than threads, times two, are in
memory at any time. It does not know what a row means (:mod:`merit.mixture.formats`) nor what a model makes of an image.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Self

from merit.images import BadImage, ImageRef, digest, examine, locate_image, read_image_file
from merit.mixture.formats import Chat, RowFormat, to_chat
from merit.mixture.reading import Part, hub_caches
from merit.mixture.row_images import BadRow, RawImage
from merit.recipe import ImageSettings

Seen = tuple[ImageRef, bytes | None]
"""An image that was examined, with its bytes where they were embedded."""


class ImageFolder:
    """Where the images of one part's rows are looked for, and what is known of those seen.

    Args:
        part: The rows.
        folder: Folder that their paths start from; None: that of the data file.
        settings: The recipe's limits.
    """

    def __init__(self, part: Part, folder: str | Path | None, settings: ImageSettings) -> None:
        start = Path(folder) if folder is not None else part.folder
        caches = hub_caches() if part.hub is not None and folder is None else ()
        self.folders = tuple(path.resolve() for path in ((start,) if start is not None else caches))
        self.relative = start is not None
        self.max_pixels = settings.max_file_pixels
        self._files: dict[str, ImageRef | BadImage] = {}
        self._sizes: dict[str, tuple[int, int] | BadImage] = {}

    def locate(self, raw: str) -> Path:
        """The file that a path means.

        Raises:
            BadImage: There is none, or it lies elsewhere.
        """
        return locate_image(raw, self.folders if self.relative or Path(raw).is_absolute() else ())

    def look(self, raw: RawImage) -> Seen:
        """Read and decode one image, unless it was seen before.

        Raises:
            BadImage: It cannot be used.
        """
        if isinstance(raw, bytes):
            return self._examined(raw, ""), raw
        known = self._files.get(raw)
        if known is None:
            try:
                path = self.locate(raw)
                known = self._examined(read_image_file(path, self.max_pixels), str(path))
            except BadImage as bad:
                named = raw if len(raw) <= 200 else raw[:197] + "..."
                known = bad if named in bad.detail else BadImage(bad.reason, f"{named}: {bad.detail}")
            self._files[raw] = known
        if isinstance(known, BadImage):
            raise known
        return known, None

    def _examined(self, data: bytes, file: str) -> ImageRef:
        key = digest(data)
        found = self._sizes.get(key)
        if found is None:
            try:
                found = examine(data, self.max_pixels)
            except BadImage as bad:
                found = bad
            self._sizes[key] = found
        if isinstance(found, BadImage):
            raise found
        return ImageRef(file, 0, len(data), *found, key)


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

    def add(self, ref: ImageRef, data: bytes) -> ImageRef:
        """Write an image, unless its bytes are there; returns where it lies."""
        if ref.digest not in self._refs:
            if self._handle is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = self.path.open("wb")
            self._handle.write(data)
            self._refs[ref.digest] = replace(ref, file=self.name, offset=self._end)
            self._end += len(data)
        return self._refs[ref.digest]

    def keep(self, rows: Iterable[Sequence[ImageRef]]) -> dict[ImageRef, ImageRef]:
        """Close the file with the images of ``rows`` only, in the order of their first use.

        Returns:
            The new place of every image that has moved.
        """
        self.close()
        used = list(dict.fromkeys(ref for images in rows for ref in images if ref.file == self.name))
        self.size = sum(ref.nbytes for ref in used)
        if used == list(self._refs.values()):
            return {}
        moved: dict[ImageRef, ImageRef] = {}
        unfinished = self.path.with_name(self.path.name + ".part")
        with self.path.open("rb") as old, unfinished.open("wb") as new:
            for ref in used:
                old.seek(ref.offset)
                moved[ref] = replace(ref, offset=new.tell())
                new.write(old.read(ref.nbytes))
        unfinished.replace(self.path)
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


Item = tuple[str, Chat | BadRow, list[Seen | BadImage]]
"""A row's place; its chat, or why it cannot be used; and what was found behind each of its images."""


def read_chats(part: Part, row_format: RowFormat, folder: ImageFolder, rows: int | None = None) -> Iterator[Item]:
    """Every row of a part (or its first ``rows``) in order, its images examined.

    Raises:
        MixtureError: A file cannot be read or parsed.
    """
    threads = image_threads()
    pending: deque[tuple[str, Chat | BadRow, list[Future[Seen]]]] = deque()
    in_flight = 0
    pool: ThreadPoolExecutor | None = None
    try:
        for place, row in islice(part.read(), rows):
            try:
                chat: Chat | BadRow = to_chat(row, row_format)
            except BadRow as bad:
                chat = bad
            del row  # its embedded bytes are in the chat
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
                yield _item(*first)
                del first
        while pending:
            yield _item(*pending.popleft())
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _item(place: str, chat: Chat | BadRow, futures: list[Future[Seen]]) -> Item:
    seen: list[Seen | BadImage] = []
    for future in futures:
        try:
            seen.append(future.result())
        except BadImage as bad:
            seen.append(bad)
    return place, replace(chat, raw=()) if isinstance(chat, Chat) and futures else chat, seen


def image_threads() -> int:
    """Threads that read and decode images side by side."""
    return min(16, os.cpu_count() or 1)


def usable(chat: Chat | BadRow, seen: Sequence[Seen | BadImage], store: ImageFile | None = None) -> Chat:
    """The chat with references to its images, the embedded ones written into ``store``.

    Raises:
        BadRow: The row, or one of its images, cannot be used.
    """
    if isinstance(chat, BadRow):
        raise chat
    for index, item in enumerate(seen):
        if isinstance(item, BadImage):
            which = f"image {index + 1} of {len(seen)}" if len(seen) > 1 else "its image"
            raise BadRow(item.reason, f"{which}: {item.detail}")
    found = [item for item in seen if not isinstance(item, BadImage)]
    return replace(
        chat,
        images=tuple(store.add(ref, data) if store is not None and data is not None else ref for ref, data in found),
    )
