"""One row in the one form that everything after the row formats uses, or why it cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merit.hf.images import ImageRef

Message = dict[str, Any]
"""``{"role": "system" | "user" | "assistant" | "tool", "content": text}``; maybe ``tool_calls``, ``reasoning_content``."""

RawImage = str | bytes
"""A path as the row has it, or the bytes of an image file."""

IMAGE = "\ufffc"
"""Stands in a turn's content where an image stands (Unicode's object replacement character)."""


class BadRow(Exception):
    """A row that cannot be used.

    Attributes:
        reason: Key under which dropped rows are counted.
        detail: What is wrong, for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    @property
    def about_image(self) -> bool:
        """Whether ``mixture.images.bad`` decides what becomes of the row, and not ``mixture.bad_rows``."""
        return self.reason.startswith("image_")


@dataclass(frozen=True, slots=True)
class Chat:
    """One row.

    Attributes:
        messages: The turns in order; the last is the assistant's.
        first_target: Assistant turns before this message index are context, not targets (a list-valued ``prompt``).
        untrained: Indices of further assistant turns that are no targets (``weight: 0``).
        tools: Descriptions of the functions that the assistant may call, for the chat template.
        ignored: Keys of the row and its turns that nothing reads.
        images: The row's images; the i-th ``IMAGE`` of all contents, in order, stands for the i-th. A row without images
            keeps an ``IMAGE`` that is part of its text.
        raw: The same images before decoding: a path or bytes, as the row has them, or where the bytes are
            meanwhile (:class:`merit.mixture.images.ImageFile`).
    """

    messages: list[Message]
    first_target: int = 0
    images: tuple[ImageRef, ...] = ()
    raw: tuple[RawImage | ImageRef, ...] = ()
    untrained: frozenset[int] = frozenset()
    tools: tuple[dict[str, Any], ...] = ()
    ignored: frozenset[str] = frozenset()

    @property
    def targets(self) -> list[bool]:
        """Per assistant turn, whether it is a target."""
        return [
            index >= self.first_target and index not in self.untrained
            for index, turn in enumerate(self.messages)
            if turn["role"] == "assistant"
        ]


Row = tuple[str, Chat | BadRow]
"""A row's place, and its chat or why it cannot be used."""
