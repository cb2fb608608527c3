"""Pictures on disk, references to them, and chats with images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import xxhash
from PIL import Image, ImageDraw

from merit.hf.images import ImageRef
from merit.mixture.formats import IMAGE, Chat

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 220), "white": (245, 245, 245)}


def picture(colour: str, size: tuple[int, int], corner: int = 0) -> Image.Image:
    image = Image.new("RGB", size, (20, 20, 20))
    width, height = size
    left, top = (corner % 2) * width // 2, (corner // 2) * height // 2
    ImageDraw.Draw(image).rectangle([left + 1, top + 1, left + width // 2 - 2, top + height // 2 - 2], COLOURS[colour])
    return image


def save(image: Image.Image, file: Path) -> ImageRef:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    data = file.read_bytes()
    return ImageRef(str(file), 0, len(data), *image.size, xxhash.xxh3_128_hexdigest(data))


def picture_chats(
    folder: Path,
    count: int,
    seed: int = 0,
    many: bool = True,
    sizes: Sequence[tuple[int, int]] = ((32, 32), (40, 24), (24, 56)),
) -> list[Chat]:
    """Chats about coloured squares: one image, two images in two turns (every third), none (every fourth)."""
    rng = random.Random(seed)
    chats = []
    for i in range(count):
        colour, size = rng.choice(list(COLOURS)), rng.choice(sizes)
        ref = save(picture(colour, size, rng.randrange(4)), folder / f"{seed}-{i}.png")
        turns = [{"role": "user", "content": f"{IMAGE}Which colour?"}, {"role": "assistant", "content": colour}]
        images: tuple[ImageRef, ...] = (ref,)
        if many and i % 3 == 2:
            other = rng.choice(list(COLOURS))
            images += (save(picture(other, (32, 32)), folder / f"{seed}-{i}b.png"),)
            turns += [
                {"role": "user", "content": f"And {IMAGE} here?"},
                {"role": "assistant", "content": other},
            ]
        if many and i % 4 == 3:
            turns, images = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "hi"}], ()
        chats.append(Chat(turns, images=images))
    return chats
