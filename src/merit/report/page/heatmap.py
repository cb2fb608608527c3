"""A square of cosines on a canvas: a byte per cell, so that 1,000 datasets stay small. The page's script draws it."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np

from merit.report.page.markup import Html, join, page_data, tag

__all__ = ["heatmap"]

_HOW = "Point at a cell to read it, or go to the figure with Tab and use the arrow keys."
_SHOWN = (-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0)
_MOST_NAMED = 16


def heatmap(key: str, title: str, matrix: np.ndarray, names: Sequence[str], sizes: Sequence[int]) -> Html:
    """Symmetric (T, T) values in [−1, 1], with lines between consecutive blocks of ``sizes`` rows.

    Args:
        key: Unique in the page.
        title: Read aloud.
        matrix: (T, T); its rows in the order of ``names``.
        names: (T,).
        sizes: Rows per block; they add up to T.
    """
    upper = matrix[np.triu_indices(len(matrix))]
    cells = np.rint((np.clip(upper, -1.0, 1.0) + 1.0) * 127).astype(np.uint8)
    data = {
        "names": list(names),
        "sizes": list(sizes),
        "cells": base64.b64encode(cells.tobytes()).decode("ascii"),
    }
    canvas = tag(
        "canvas", title, class_="heatmap", data_from=f"{key}-data", width=720, height=720, tabindex="0",
        role="application", aria_roledescription="matrix", aria_label=f"{title}; arrow keys read its cells",
        aria_describedby=f"{key}-reading",
    )  # fmt: skip
    cell = tag("span", class_="cell", aria_hidden="true")
    reading = tag("output", _HOW, id=f"{key}-reading", class_="reading", aria_live="off")
    plot = tag("div", canvas, cell, class_="plot")
    return join([_blocks(sizes), plot, _scale(), reading, page_data(f"{key}-data", data)])


def _blocks(sizes: Sequence[int]) -> Html:
    """The groups' names above their columns, where there is room for them."""
    if not 1 < len(sizes) <= _MOST_NAMED:
        return Html("")
    word = "group " if len(sizes) <= 4 else ""
    names = [tag("span", f"{word}{k}", style=f"flex:{size} 1 0") for k, size in enumerate(sizes)]
    return tag("div", *names, class_="blocks", aria_hidden="true")


def _scale() -> Html:
    """The colours of a few values."""
    shown = [
        tag("span", tag("i", style=f"background:{_colour(v)}"), f"{v:+g}".replace("-", "−") if v else "0")
        for v in _SHOWN
    ]
    return tag("div", "cosine ", *shown, class_="key")


def _colour(value: float) -> str:
    """As the script paints it: blue above 0, orange below, darker with the root of the size."""
    strength = abs(value) ** 0.5
    end = (0, 90, 160) if value >= 0 else (200, 85, 0)
    return f"rgb({','.join(str(round(255 + (c - 255) * strength)) for c in end)})"
