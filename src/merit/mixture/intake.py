"""The rows of one part on their way: chats as they were read, then encoded rows as they were chosen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from merit.hf.rows import EncodedRow
from merit.mixture.chat import Chat
from merit.mixture.formats import RowFormat, to_chat
from merit.mixture.images import UNREAD, ImageFile, ImageFolder, put_images
from merit.mixture.part import Part


@dataclass
class Intake:
    """A part's usable chats, where each stands, the bad rows by reason, and what to read a row's images again by."""

    chats: list[Chat]
    places: list[str]
    dropped: Counter[str]
    numbers: list[int]
    part: Part
    row_format: RowFormat
    ignored: Counter[str]

    def fetch(self, indices: np.ndarray, folder: ImageFolder) -> None:
        """Read the embedded images of these chats again, where that was put off, and keep them on disk."""
        assert folder.store is not None
        wanted = [i for i in sorted(indices.tolist()) if UNREAD in self.chats[i].raw]
        numbers = [self.numbers[i] for i in wanted]
        for i, (_, row) in zip(wanted, self.part.again(numbers), strict=True):
            self.chats[i] = put_images(to_chat(row, self.row_format), folder.store)
        folder.store.written()

    @property
    def source_rows(self) -> int:
        """Rows read, bad ones included."""
        return len(self.chats) + sum(self.dropped.values())


@dataclass
class Used:
    """Rows used, their chats, every chat examined, rows dropped by reason, and the number of usable chats not examined."""

    rows: list[EncodedRow]
    chats: list[Chat]
    seen: list[Chat]
    dropped: Counter[str]
    over_budget: int

    def keep_images(self, store: ImageFile) -> int:
        """Keep the embedded images of these rows only, and follow those that move; returns their bytes on disk."""
        moved = store.keep(row.images for row in self.rows)
        if moved:
            place = lambda ref: replace(ref, offset=moved[ref.digest]) if ref.file == store.name else ref  # noqa: E731
            self.rows = [replace(row, images=tuple(map(place, row.images))) if row.images else row for row in self.rows]
        return store.size
