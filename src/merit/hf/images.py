"""Images as files: where one is, whether it can be used, and its pixels on demand. Storage; no model.

Images are not kept in memory: rows carry :class:`ImageRef`, and :func:`read_image` decodes one when a batch
needs it. Before that, :func:`examine` decodes every image once, so that a damaged one is found before anything is trained.
What a model does with pixels (resizing, patches, placeholder tokens) is in :mod:`merit.hf.families`; which rows have
which images, in :mod:`merit.mixture`.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from PIL import Image as pillow
from PIL import UnidentifiedImageError
from PIL.Image import Image, Transpose
from PIL.ImageFile import ImageFile

from merit.errors import MixtureError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Supported image formats; everything else is refused."""

_ORIENTATION = 0x0112
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


class BadImage(Exception):
    """An image that cannot be used.

    Attributes:
        reason: image_missing, image_outside, image_format, image_damaged or image_too_large; rows are counted under it.
        detail: What is wrong, for the message.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


_SUFFIXES = {
    **{".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP"},
    **{".tif": "TIFF", ".tiff": "TIFF"},
}


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of one row.

    Attributes:
        file: The file that contains its encoded bytes: an image file, or a file of many concatenated images.
        offset: First byte in that file.
        nbytes: Number of encoded bytes.
        width: Pixels, after the file's EXIF rotation is applied.
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
    """Decode an image to RGB, with its EXIF rotation applied; see :func:`decode` for other kinds of pixels.

    Raises:
        MixtureError: The file is gone, or its content has changed since the mixture was encoded.
    """
    try:
        with Path(ref.file).open("rb") as handle:
            handle.seek(ref.offset)
            data = handle.read(ref.nbytes)
    except OSError as error:
        raise MixtureError(
            f"The image {ref.file} can no longer be read: {error.strerror}.",
            "Restore it; or start the run over, so that the mixture is encoded again.",
        ) from None
    if digest(data) != ref.digest:
        raise MixtureError(
            f"The image {ref.file} (from byte {ref.offset}) has changed since the mixture was encoded.",
            "Restore the old file; or start the run over, so that the mixture is encoded again.",
        )
    return decode(data, max_pixels=ref.width * ref.height)


def renamed(file: Path) -> str:
    """The actual format of an image file if its name says otherwise; else an empty string. Only the header is read."""
    said = _SUFFIXES.get(file.suffix.lower())
    if said is None:
        return ""
    try:
        with file.open("rb") as handle, _open(handle) as image:
            return "" if image.format == said else str(image.format)
    except Exception:  # problems are reported elsewhere
        return ""


def digest(data: bytes) -> str:
    """xxh3-128 of an image's encoded bytes, in hex."""
    return xxhash.xxh3_128_hexdigest(data)


def examine(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Decode an image once, to the last byte, as :func:`read_image` will.

    Args:
        data: The encoded bytes.
        max_pixels: Maximum pixels to decode, checked first from the header.

    Returns:
        Its width and height in pixels, after EXIF rotation.

    Raises:
        BadImage: It is not an image of a known format, is truncated or damaged, or has too many pixels.
    """
    return decode(data, max_pixels).size


def decode(data: bytes, max_pixels: int) -> Image:
    """RGB pixels of an encoded image.

    Only the first frame of an animation is used. Transparent parts are composited onto white, so that dark lines on a
    transparent background stay visible (plain conversion would put most of them on black). 16-bit greyscale is scaled to
    8 bits (plain conversion would clip it at 255). CMYK and palettes are converted.

    Args:
        data: The encoded bytes.
        max_pixels: Maximum pixels to decode.

    Raises:
        BadImage: As :func:`examine`.
    """
    if not data:
        raise BadImage("image_damaged", "it is empty (0 bytes)")
    try:
        with _open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(
                    "image_too_large",
                    f"it has {width} x {height} pixels, more than mixture.images.max_file_pixels ({max_pixels})",
                )
            image.load()
            return _rgb(_upright(image), image.format or "")
    except BadImage:
        raise
    except pillow.DecompressionBombError as error:
        size = re.search(r"\d+", str(error))
        raise BadImage(
            "image_too_large",
            f"it has {size.group() if size else 'too many'} pixels, more than mixture.images.max_file_pixels ({max_pixels})",
        ) from None
    except UnidentifiedImageError:
        found = _kind(data)
        raise BadImage(
            "image_format",
            f"it is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image, or its header is damaged{found}",
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise errors of their own, all of which mean the same
        raise BadImage("image_damaged", f"it cannot be decoded: {str(error) or type(error).__name__}") from None


def locate_image(text: str, folders: Sequence[Path]) -> Path:
    """The file that a path in a row refers to.

    Args:
        text: Path; a relative one is relative to the first folder.
        folders: Resolved folders, one of which the file must be in, after following links.

    Raises:
        BadImage: It is outside the folders, or not a file.
    """
    shown = text if len(text) <= 200 else text[:197] + "..."
    if not folders and not Path(text).is_absolute():
        raise BadImage(
            "image_missing", f"{shown} is a relative path, and no folder is given for it (the dataset's `images`)"
        )
    try:
        path = (Path(*folders[:1]) / text).resolve()
        inside = any(path.is_relative_to(folder) for folder in folders)
        if inside and path.is_file():
            return path
        kind = "a folder" if inside and path.is_dir() else "not there"
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, a name that is too long, links in a circle
        raise BadImage("image_missing", f"{shown!r} is not a usable path ({error})") from None
    within = f"{folders[0]}" if folders else "the dataset's folder"
    if not inside:
        raise BadImage("image_outside", f"{shown} leads out of {within}; set the folder that contains the images")
    raise BadImage("image_missing", f"{shown} is {kind} (looked for in {within})")


def read_image_file(path: Path, max_pixels: int) -> bytes:
    """An image file's bytes.

    Raises:
        BadImage: It cannot be read, or is larger than ``max_pixels`` could require.
    """
    try:
        size = path.stat().st_size
        if size > 8 * max_pixels + 2**20:  # 16 bits in four channels, and a header
            raise BadImage(
                "image_too_large",
                f"its file has {size} bytes, more than mixture.images.max_file_pixels ({max_pixels}) could need",
            )
        return path.read_bytes()
    except OSError as error:
        raise BadImage("image_missing", f"{path} cannot be read: {error.strerror}") from None


def encode_image(image: Image) -> bytes:
    """A PIL image as the bytes of a PNG file (lossless)."""
    image = _upright(image)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _open(file: BinaryIO) -> ImageFile:
    """Open an image of a known format, whatever its size: ``PIL.Image.open`` has one pixel limit for the whole process.

    Raises:
        UnidentifiedImageError: It has none of the formats.
    """
    pillow.init()
    prefix = file.read(16)
    for name in FORMATS:
        factory, accept = pillow.OPEN[name]
        if accept is not None and accept(prefix) is not True:
            continue
        file.seek(0)
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
            return factory(file, "")
    raise UnidentifiedImageError("no known format")


# Broken EXIF is harmless: keep these warnings out of the progress bar.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def _upright(image: Image) -> Image:
    """The image with its EXIF rotation applied; an unreadable EXIF block is ignored.

    Pillow's ``exif_transpose`` also rewrites the block, which fails if any other entry in it is damaged.
    """
    try:
        mark = image.getexif().get(_ORIENTATION)
    except Exception:  # what a damaged block raises depends on where it is damaged
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(mark) if isinstance(mark, int) else None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image, kind: str) -> Image:
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and kind == "PPM"):
        values = np.asarray(image).astype(np.uint32)
        return pillow.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage("image_format", "its pixels are 32-bit numbers, for which black and white are not defined")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


_KINDS = (
    (rb"\s*(?:<!doctype html|<html|<head)", "an HTML page"),
    (rb"\s*(?:<\?xml|<svg)", "an XML or SVG file"),
    (rb"%PDF", "a PDF file"),
    (rb"\s*[\[{]", "a JSON text"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"\x1f\x8b", "a gzip archive"),
    (rb".{4}ftypavi", "an AVIF image"),
    (rb".{4}ftyp(?:hei|mif)", "a HEIF image"),
    (rb"version https://git-lfs", "a Git LFS pointer whose file was not downloaded"),
)


def _kind(data: bytes) -> str:
    """What the bytes look like, for an error message; the bytes themselves are not shown."""
    found = next((name for pattern, name in _KINDS if re.match(pattern, data, re.IGNORECASE | re.DOTALL)), None)
    return f" (it looks like {found})" if found else ""
