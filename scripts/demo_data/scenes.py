"""The vision demo's pictures: what may be in one (a case) and how it is painted.

A *case* holds the discrete facts (shapes, colours, levels, which handwritten digit); whatever a question can be about is
in it. Painting adds what no question is about: the background, small shifts, turns and sizes. Pictures are SIZE x SIZE
pixels, drawn without fonts. The handwritten digits are scikit-learn's real ones (Alpaydin & Kaynak, "Optical Recognition
of Handwritten Digits", UCI, 1998); everything else is drawn. Two scenes are words only and have no picture.

It asks no questions and writes no files (:mod:`demo_data.pictures`).
"""

from __future__ import annotations

import itertools
import json
import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from demo_data.words import HELD_OUT_SHARE

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["COLOURS", "PLACES", "SCENES", "SHAPES", "SIZE", "TRENDS", "Case", "Scene", "draw_case", "held_out", "paint"]

Case = dict[str, Any]
Point = tuple[float, float]

SIZE = 48
"""Width and height of every picture (pixels)."""
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (215, 35, 40),
    "orange": (245, 135, 20),
    "yellow": (240, 215, 40),
    "green": (35, 150, 60),
    "cyan": (40, 200, 215),
    "blue": (50, 80, 225),
    "purple": (150, 60, 185),
}
"""Colour name to RGB (0 to 255)."""
PLACES = (
    "top left", "top middle", "top right",
    "middle left", "centre", "middle right",
    "bottom left", "bottom middle", "bottom right",
)  # fmt: skip
"""Names of the 3 x 3 cells, row by row."""
TRENDS = ("rises", "falls", "peaks", "dips")
BACKGROUNDS = (250, 228, 60, 20)
_FINE = 4  # drawn this many times larger and scaled down, for smooth edges
_CELL = SIZE // 3
_RADIUS = {"small": 4.5, "large": 7.0}


class _Canvas:
    """A picture being painted; coordinates and lengths are pixels of the finished picture, y downwards."""

    def __init__(self, rng: random.Random, backgrounds: tuple[int, ...] = BACKGROUNDS) -> None:
        from PIL import Image, ImageDraw

        self.grey = rng.choice(backgrounds)
        self.image = Image.new("RGB", (SIZE * _FINE, SIZE * _FINE), (self.grey,) * 3)
        self.pen = ImageDraw.Draw(self.image)

    @property
    def axis(self) -> tuple[int, int, int]:
        return (130,) * 3

    def finished(self) -> Image:
        return self.image.reduce(_FINE)

    def box(self, left: float, top: float, right: float, bottom: float, colour: tuple[int, int, int]) -> None:
        corners = [round(value * _FINE) for value in (left, top, right, bottom)]
        self.pen.rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), fill=colour)

    def polygon(self, points: list[Point], colour: tuple[int, int, int]) -> None:
        self.pen.polygon([(x * _FINE, y * _FINE) for x, y in points], fill=colour)

    def disc(self, x: float, y: float, radius: float, colour: tuple[int, int, int]) -> None:
        self.pen.ellipse([(v + d * radius) * _FINE for d in (-1, 1) for v in (x, y)], fill=colour)

    def shape(self, name: str, x: float, y: float, radius: float, colour: str) -> None:
        paint = COLOURS[colour]
        if name in ("circle", "ring"):
            self.disc(x, y, radius, paint)
            if name == "ring":
                self.disc(x, y, 0.55 * radius, (self.grey,) * 3)
        elif name == "square":
            side = 0.88 * radius
            self.box(x - side, y - side, x + side, y + side, paint)
        elif name == "cross":
            long, short = radius, 0.36 * radius
            self.box(x - long, y - short, x + long, y + short, paint)
            self.box(x - short, y - long, x + short, y + long, paint)
        else:
            spikes = 3 if name == "triangle" else 5
            reach = 1.12 * radius
            inner = 0.5 * reach if spikes == 3 else 0.42 * reach  # a triangle's "inner" points lie on its sides
            points = []
            for i in range(2 * spikes):
                angle, length = math.pi * (i / spikes - 0.5), reach if i % 2 == 0 else inner
                points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
            self.polygon(points, paint)


# ---- one shape ------------------------------------------------------------------------------------------------------


def _one(rng: random.Random) -> Case:
    return {
        "shape": rng.choice(SHAPES),
        "colour": rng.choice(list(COLOURS)),
        "size": rng.choice(list(_RADIUS)),
        "cell": rng.randrange(9),
    }


def _paint_one(case: Case, rng: random.Random) -> Image:
    canvas = _Canvas(rng)
    _place(canvas, rng, case["shape"], case["colour"], case["cell"], _RADIUS[case["size"]])
    return canvas.finished()


def _place(canvas: _Canvas, rng: random.Random, shape: str, colour: str, cell: int, radius: float) -> None:
    x, y = (_CELL * (i + 0.5) + rng.uniform(-0.8, 0.8) for i in (cell % 3, cell // 3))
    canvas.shape(shape, x, y, radius * rng.uniform(0.95, 1.05), colour)


# ---- several shapes -------------------------------------------------------------------------------------------------


def _many(rng: random.Random) -> Case:
    count = rng.randint(1, 6)
    return {
        "cells": sorted(rng.sample(range(9), count)),
        "shapes": [rng.choice(SHAPES)] * count if rng.random() < 0.5 else rng.choices(SHAPES, k=count),
        "colours": [rng.choice(list(COLOURS))] * count if rng.random() < 0.5 else rng.choices(list(COLOURS), k=count),
    }


def _paint_many(case: Case, rng: random.Random) -> Image:
    canvas = _Canvas(rng)
    for cell, shape, colour in zip(case["cells"], case["shapes"], case["colours"], strict=True):
        _place(canvas, rng, shape, colour, cell, 6.0)
    return canvas.finished()


# ---- two shapes side by side ----------------------------------------------------------------------------------------


def _beside(rng: random.Random) -> Case:
    return {
        "shapes": rng.sample(SHAPES, 2),
        "colours": rng.sample(list(COLOURS), 2),
        "rows": [rng.randrange(3), rng.randrange(3)],
        "asked": rng.randrange(2),
    }


def _paint_beside(case: Case, rng: random.Random) -> Image:
    canvas = _Canvas(rng)
    for column, (shape, colour, row) in enumerate(zip(case["shapes"], case["colours"], case["rows"], strict=True)):
        x = (0.25 + 0.5 * column) * SIZE + rng.uniform(-3, 3)
        y = _CELL * (row + 0.5) + rng.uniform(-0.8, 0.8)
        canvas.shape(shape, x, y, 6.8 * rng.uniform(0.95, 1.05), colour)
    return canvas.finished()


# ---- a handwritten digit --------------------------------------------------------------------------------------------


@cache
def _digits() -> tuple[Any, Any]:
    """scikit-learn's handwritten digits: ink (1797, 8, 8) from 0 to 16, and which digit each is (1797,)."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    return found.images, found.target


def _digit(rng: random.Random) -> Case:
    index = rng.randrange(len(_digits()[1]))
    return {"index": index, "digit": int(_digits()[1][index]), "colour": rng.choice(list(COLOURS))}


def _paint_digit(case: Case, rng: random.Random) -> Image:
    import numpy as np
    from PIL import Image

    canvas = _Canvas(rng)
    ink = Image.fromarray(np.round(np.minimum(_digits()[0][case["index"]] * 20, 255)).astype(np.uint8))
    side = round(SIZE * rng.uniform(0.84, 0.94) * _FINE)
    room = SIZE * _FINE - side
    left, top = round(room * rng.uniform(0.2, 0.8)), round(room * rng.uniform(0.2, 0.8))
    canvas.image.paste(COLOURS[case["colour"]], (left, top, left + side, top + side), ink.resize((side, side)))
    return canvas.finished()


# ---- charts ---------------------------------------------------------------------------------------------------------


def _bars(rng: random.Random) -> Case:
    count = rng.choice((3, 4))
    return {"colours": rng.sample(list(COLOURS), count), "levels": rng.sample(range(1, 9), count)}


def _paint_bars(case: Case, rng: random.Random) -> Image:
    canvas = _Canvas(rng)
    step = 42 / len(case["levels"])
    width = step * rng.uniform(0.6, 0.8)
    canvas.box(3, 44, 46, 45, canvas.axis)
    canvas.box(3, 3, 4, 45, canvas.axis)
    for i, (colour, level) in enumerate(zip(case["colours"], case["levels"], strict=True)):
        middle = 4.5 + step * (i + 0.5)
        canvas.box(middle - width / 2, 44 - 4.8 * level, middle + width / 2, 44, COLOURS[colour])
    return canvas.finished()


def _pie(rng: random.Random) -> Case:
    while True:  # sixteenths, no two slices within two of each other
        count = rng.choice((2, 3, 4))
        cuts = sorted(rng.sample(range(1, 16), count - 1))
        shares = [b - a for a, b in zip([0, *cuts], [*cuts, 16], strict=True)]
        ordered = sorted(shares)
        if all(b - a >= 2 for a, b in itertools.pairwise(ordered)):
            return {"colours": rng.sample(list(COLOURS), count), "shares": shares}


def _paint_pie(case: Case, rng: random.Random) -> Image:
    canvas = _Canvas(rng)
    x, y = (SIZE / 2 + rng.uniform(-2, 2) for _ in range(2))
    radius, start = rng.uniform(19, 21.5), rng.uniform(0, 360)
    frame = [(v + d * radius) * _FINE for d in (-1, 1) for v in (x, y)]
    for colour, share in zip(case["colours"], case["shares"], strict=True):
        end = start + 360 * share / 16
        canvas.pen.pieslice(frame, start, end, fill=COLOURS[colour])
        start = end
    return canvas.finished()


def _line(rng: random.Random) -> Case:
    trend, turn = rng.choice(TRENDS), rng.choice((1, 2, 3))
    turn = {"rises": 4, "falls": 0}.get(trend, turn)
    up, down = sorted(rng.sample(range(9), 5)), sorted(rng.sample(range(9), 5), reverse=True)
    if trend in ("rises", "falls"):
        levels = up if trend == "rises" else down
    else:  # strictly up to the turn and strictly down after it, then turned over for a dip
        top = rng.choice((7, 8))
        levels = [*sorted(rng.sample(range(top - 1), turn)), top]
        levels += sorted(rng.sample(range(top - 1), 4 - turn), reverse=True)
        levels = levels if trend == "peaks" else [8 - level for level in levels]
    return {"trend": trend, "levels": levels, "colour": rng.choice(list(COLOURS))}


def _paint_line(case: Case, rng: random.Random) -> Image:
    canvas = _Canvas(rng)
    canvas.box(3, 44, 46, 45, canvas.axis)
    canvas.box(3, 3, 4, 45, canvas.axis)
    left, step, width = 7 + rng.uniform(-1, 1), 8.8, rng.uniform(2.2, 3.0)
    points = [(left + step * i, 40 - 4.2 * level) for i, level in enumerate(case["levels"])]
    colour = COLOURS[case["colour"]]
    canvas.pen.line([(x * _FINE, y * _FINE) for x, y in points], fill=colour, width=round(width * _FINE), joint="curve")
    for x, y in points:
        canvas.disc(x, y, 0.5 * width, colour)
    return canvas.finished()


# ---- words only -----------------------------------------------------------------------------------------------------


def _words(rng: random.Random) -> Case:
    return {"words": rng.sample([*COLOURS, *SHAPES], 3)}


def _sum(rng: random.Random) -> Case:
    return {"a": rng.randrange(20), "b": rng.randrange(20)}


# ---- all of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """One kind of picture.

    Attributes:
        draw: Draws a case.
        paint: Paints a case; None where there is nothing to see.
        identity: The keys of the case that say which case it is; the others are varied like the background.
    """

    draw: Callable[[random.Random], Case]
    paint: Callable[[Case, random.Random], Image] | None
    identity: tuple[str, ...]


SCENES: dict[str, Scene] = {
    "one": Scene(_one, _paint_one, ("shape", "colour", "size", "cell")),
    "many": Scene(_many, _paint_many, ("cells", "shapes", "colours")),
    "beside": Scene(_beside, _paint_beside, ("shapes", "colours", "rows")),
    "digit": Scene(_digit, _paint_digit, ("index",)),
    "bars": Scene(_bars, _paint_bars, ("colours", "levels")),
    "pie": Scene(_pie, _paint_pie, ("colours", "shares")),
    "line": Scene(_line, _paint_line, ("levels",)),
    "words": Scene(_words, None, ("words",)),
    "sum": Scene(_sum, None, ("a", "b")),
}


def held_out(scene: str, case: Case) -> bool:
    """Tell on which side a case lies for good: one in eight is held out, whatever is asked about it."""
    key = scene + json.dumps([case[name] for name in SCENES[scene].identity])
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def draw_case(scene: str, rng: random.Random, *, test: bool) -> Case:
    """Draw a case of the held-out side (``test``) or of the training side."""
    while True:
        case = SCENES[scene].draw(rng)
        if held_out(scene, case) == test:
            return case


def paint(scene: str, case: Case, rng: random.Random) -> Image:
    """Paint a case: an RGB picture of SIZE x SIZE pixels. Facts come from the case, everything else from ``rng``."""
    painter = SCENES[scene].paint
    assert painter is not None, scene
    return painter(case, rng)
