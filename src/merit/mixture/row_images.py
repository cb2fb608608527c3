"""The images that a row names or holds, in every form that data sets use; a row that cannot be used is a :class:`BadRow`.

A path stays a path and bytes stay bytes: whether there is an image behind them is :mod:`merit.mixture.image_store`'s
business, and where they stand in the text is :mod:`merit.mixture.formats`'.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from merit.hf.images import encode_image

RawImage = str | bytes
"""A path as the row has it, or the bytes of an image file."""

_COLUMNS = ("images", "image")
_DATA = re.compile(r"data:[\w/+.;-]*;base64,", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


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


def row_images(row: Mapping[str, Any]) -> tuple[list[RawImage], bool]:
    """The images of a row's ``images`` or ``image`` column, and whether it has such a column at all.

    A column that is null, empty text or an empty list holds none.

    Raises:
        BadRow: Both columns hold images, or a value is no image.
    """
    found = {column: _listed(row[column]) for column in _COLUMNS if column in row}
    filled = [column for column, values in found.items() if values]
    if len(filled) > 1:
        raise BadRow("image_count", "both columns, images and image, hold images; it is not clear which are meant")
    if not filled:
        return [], bool(found)
    [column] = filled
    values = found[column]
    return [
        raw_image(value, f"{column}[{index}]" if len(values) > 1 else column) for index, value in enumerate(values)
    ], True


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # a CSV cell holds a list as JSON
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None or value == "" else [value]


def raw_image(value: Any, where: str) -> RawImage:
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
    if type(value).__module__.partition(".")[0] == "PIL":
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
            raise BadRow("image_damaged", f"{where} is no valid base64 text: {error}") from None
    if text.startswith("file://"):
        return text.removeprefix("file://")
    if _SCHEME.match(text):
        raise BadRow(
            "image_url",
            f"{where} is an address ({text[:80]}): images are read from files only; fetch it and name the file",
        )
    return text
