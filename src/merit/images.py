"""Images as files: where one lies, what is known of it, and its pixels when they are asked for. Storage; no model.

An image is never kept in memory: rows carry :class:`ImageRef`, and :func:`read_image` decodes one at the moment a batch
needs it. What a model makes of pixels (resizing, patches, placeholder tokens) is :mod:`merit.vision`'s business.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from merit.errors import MixtureError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Image formats that are decoded; everything else is refused."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of one row.

    Attributes:
        file: The file that holds its encoded bytes: an image file, or a file of many images one after the other.
        offset: First byte in that file.
        nbytes: Number of encoded bytes.
        width: Pixels, after the file's own rotation mark (EXIF) is followed.
        height: Pixels, likewise.
        digest: xxh3-128 of the encoded bytes, in hex.
    """

    file: str
    offset: int
    nbytes: int
    width: int
    height: int
    digest: str


def read_image(ref: ImageRef) -> Image:
    """Decode an image to RGB, turned as its EXIF mark says.

    Raises:
        MixtureError: The file is gone, or holds other bytes than when the mixture was prepared.
    """
    from PIL import Image, ImageOps

    try:
        with Path(ref.file).open("rb") as handle:
            handle.seek(ref.offset)
            data = handle.read(ref.nbytes)
    except OSError as error:
        raise MixtureError(
            f"The image {ref.file} cannot be read any more: {error.strerror}.",
            "Put it back; or start the run over, so that the mixture is prepared again.",
        ) from None
    if xxhash.xxh3_128_hexdigest(data) != ref.digest:
        raise MixtureError(
            f"The image {ref.file} (from byte {ref.offset}) is not the one that the mixture was prepared with.",
            "Put the old file back; or start the run over, so that the mixture is prepared again.",
        )
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return ImageOps.exif_transpose(image).convert("RGB")
