"""A square of cosines on a canvas: a byte per cell, so that 1,000 datasets stay small. The page's script draws it."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np

from merit.report.page.markup import Html, join, page_data, tag

__all__ = ["heatmap"]


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
        "canvas", title, class_="heatmap", data_from=f"{key}-data", role="img", aria_label=title, width=720, height=720
    )
    reading = tag("output", "Point at a cell to read it.", class_="reading", aria_live="off")
    return join([canvas, reading, page_data(f"{key}-data", data)])
