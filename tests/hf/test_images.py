"""Decoding: what counts as an image, what its pixels become, and what is refused before a byte of it is decoded."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from merit.errors import MixtureError
from merit.hf.images import BadImage, ImageRef, decode, digest, encode_image, examine, locate_image, read_image

LIMIT = 10**6
_MARK = struct.pack("<HHII", 274, 3, 1, 6)
DAMAGED_EXIF = (  # a resolution, and a width, that are no numbers
    struct.pack("<H", 2) + _MARK + struct.pack("<HHI4sI", 0x11A, 7, 2, b"ab", 0),
    struct.pack("<H", 2) + _MARK + struct.pack("<HHI4sI", 0x100, 2, 2, b"a", 0),
)


def noise(width=40, height=30, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, body=b""):
    """A PNG file by hand: 8-bit RGB of the claimed size, whatever its data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def reason(data, limit=LIMIT):
    with pytest.raises(BadImage) as caught:
        examine(data, limit)
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("PPM", {})]
)
def test_lossless_formats_come_back_pixel_for_pixel(kind, options):
    data = encoded(noise(), kind, **options)
    assert examine(data, LIMIT) == (40, 30)
    assert (np.asarray(decode(data, LIMIT)) == np.asarray(noise())).all()


def test_jpeg():
    flat = Image.new("RGB", (40, 30), (200, 100, 50))
    seen = np.asarray(decode(encoded(flat, "JPEG", quality=95), LIMIT)).astype(int)
    assert seen.shape == (30, 40, 3)
    assert abs(seen - [200, 100, 50]).max() <= 4


def test_what_other_pixels_become():
    def pixel(image, kind="PNG", at=(0, 0)):
        seen = decode(encoded(image, kind), LIMIT)
        assert seen.mode == "RGB"
        return seen.getpixel(at)

    assert pixel(Image.new("L", (2, 2), 77)) == (77, 77, 77)
    assert pixel(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(palette) == (10, 20, 30)
    # Transparent parts lie over white; opaque ones are untouched, half of black over white is grey.
    clear = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (9, 8, 7, 255))
    clear.putpixel((2, 0), (0, 0, 0, 128))
    assert [pixel(clear, at=(x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 8, 7)]
    assert abs(pixel(clear, at=(2, 0))[0] - 127) <= 1
    # 16 bits are scaled, not cut off at 255.
    for kind in ("PNG", "TIFF"):
        deep = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16))
        assert [pixel(deep, kind, at=(x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    portable = b"P5 4 1 65535\n" + np.array([0, 256, 32768, 65535], dtype=">u2").tobytes()
    assert [decode(portable, LIMIT).getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    cmyk = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), LIMIT)
    assert cmyk.getpixel((4, 4)) == Image.new("CMYK", (1, 1), (0, 255, 255, 0)).convert("RGB").getpixel((0, 0))


def test_numbers_without_a_black_and_white_are_refused():
    assert reason(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))[0] == "image_format"
    assert reason(encoded(Image.new("I", (2, 2), 7), "TIFF"))[0] == "image_format"


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
        red, green, blue = decode(data, LIMIT).getpixel((3, 3))
        assert (red > 240, green < 15, blue < 15) == (True, True, True)


def test_the_rotation_mark_is_followed():
    image = Image.new("RGB", (40, 30), "black")
    image.paste("white", (0, 0, 20, 30))  # left half
    exif = Image.Exif()
    exif[274] = 6  # to be turned a quarter clockwise: left becomes top
    data = encoded(image, "JPEG", exif=exif)
    assert examine(data, LIMIT) == (30, 40)
    turned = decode(data, LIMIT)
    assert turned.getpixel((15, 5))[0] > 240
    assert turned.getpixel((15, 35))[0] < 15


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mark", range(10))
def test_every_rotation_mark_as_pillow_follows_it(kind, mark):
    exif = Image.Exif()
    exif[274] = mark
    data = encoded(noise(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert (np.asarray(decode(data, LIMIT)) == np.asarray(expected)).all()
    assert (decode(data, LIMIT).size == (30, 40)) == (mark in (5, 6, 7, 8))


@pytest.mark.parametrize("exif", DAMAGED_EXIF)
def test_an_exif_block_with_damaged_entries_damages_no_image(exif):
    """The mark stands first and can be read; writing the rest of the block anew cannot succeed."""
    data = encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + exif)
    with pytest.raises(Exception):  # noqa: B017  the block is damaged indeed
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert examine(data, LIMIT) == (30, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_files_that_were_cut_short_are_damaged(kind):
    data = encoded(noise(), kind)
    assert examine(data, LIMIT) == (40, 30)
    for share in (0.5, 0.9):
        assert reason(data[: int(len(data) * share)])[0] in ("image_damaged", "image_format")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(
    ("data", "why", "words"),
    [
        (b"", "image_damaged", "0 bytes"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "image_format", "HTML page"),
        (b'{"error": "not found"}', "image_format", "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:x\n", "image_format", "Git LFS"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image_format", "SVG"),
        (b"secret words in a text", "image_format", "not a JPEG"),
        (png(0, 5), "image_format", "header"),
        (png(4, 4, zlib.compress(b"\0")), "image_damaged", "cannot be decoded"),
    ],
)
def test_what_is_no_image_says_what_it_is(data, why, words):
    found, detail = reason(data)
    assert found == why
    assert words in detail
    assert "secret" not in detail  # nothing of a file that is no image is shown


def test_formats_outside_the_list_are_refused():
    assert reason(encoded(Image.new("RGB", (16, 16)), "ICO"))[0] == "image_format"


@pytest.mark.parametrize("limit", [LIMIT, 89478485, 3 * 10**9])
def test_a_bomb_is_refused_from_its_header(limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    bomb = png(60000, 60000, zlib.compress(bytes(10**7)))
    tracemalloc.start()
    try:
        assert reason(bomb, limit)[0] == "image_too_large"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_limit_counts_pixels_to_the_last_one():
    data = encoded(noise(), "PNG")
    assert examine(data, 1200) == (40, 30)
    assert reason(data, 1199) == (
        "image_too_large",
        "it has 40 x 30 pixels, more than mixture.images.max_file_pixels (1199)",
    )


def test_a_limit_above_pillows_own_holds(monkeypatch):
    """Fails on commit f5727a1: Pillow's limit was raised for the whole process."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # Pillow refuses twice that
    data = encoded(noise(), "PNG")
    assert reason(data, 600)[0] == "image_too_large"
    assert examine(data, 1200) == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == 300


def test_an_image_is_read_from_its_place_and_checked_again(tmp_path):
    first, second = encoded(noise(seed=1), "PNG"), encoded(noise(20, 10, seed=2), "PNG")
    file = tmp_path / "many.bin"
    file.write_bytes(first + second)
    ref = ImageRef(str(file), len(first), len(second), 20, 10, digest(second))
    assert (np.asarray(read_image(ref)) == np.asarray(noise(20, 10, seed=2))).all()
    file.write_bytes(first + second[:-20] + bytes(20))
    with pytest.raises(MixtureError, match="has changed since the mixture was encoded"):
        read_image(ref)
    file.unlink()
    with pytest.raises(MixtureError, match="can no longer be read"):
        read_image(ref)


def test_pil_images_keep_their_pixels_as_files():
    for image in (noise(), noise(channels=4), noise(channels=1), noise().convert("P")):
        data = encode_image(image)
        again = Image.open(io.BytesIO(data))
        assert (np.asarray(again.convert("RGBA")) == np.asarray(image.convert("RGBA"))).all()


def test_paths_stay_in_their_folder(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.png").write_bytes(b"x")
    (tmp_path / "out.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "inner.png").symlink_to(folder / "sub" / "a.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    folders = (folder.resolve(),)

    def found(text, where=folders):
        try:
            return locate_image(text, where).name
        except BadImage as bad:
            return bad.reason

    assert found("sub/a.png") == found("./sub/../sub/a.png") == found("inner.png") == "a.png"
    assert found(str(folder / "sub" / "a.png")) == "a.png"
    for text in (
        "../out.png",
        "link.png",
        "linked/out.png",
        str(tmp_path / "out.png"),
        "sub/../../out.png",
        "/etc/passwd",
    ):
        assert found(text) == "image_outside", text
    for text in ("none.png", "sub", "circle.png", "nul\0.png", "x" * 5000, "sub/a.png/b"):
        assert found(text) == "image_missing", text
    assert found("a.png", ()) == "image_missing"
    assert found(str(tmp_path / "out.png"), ()) == "image_outside"
    assert found(str(folder / "sub" / "a.png"), (tmp_path / "elsewhere", *folders)) == "a.png"


def test_a_folder_whose_name_begins_alike_is_another(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data2").mkdir()
    (tmp_path / "data2" / "a.png").write_bytes(b"x")
    with pytest.raises(BadImage) as caught:
        locate_image("../data2/a.png", ((tmp_path / "data").resolve(),))
    assert caught.value.reason == "image_outside"
