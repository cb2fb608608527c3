"""Seeded draws of rows: calibration samples and sample budgets.

A draw depends on the recipe's seed, the dataset's name and its row count alone: neither the order of datasets in the
recipe nor other draws change it. It reads no data.
"""

from __future__ import annotations

import hashlib

import numpy as np


def draw(rows: int, n: int, seed: int, name: str, purpose: str = "calibration") -> np.ndarray:
    """Draw row indices without replacement: the first ``n`` of a seeded permutation, so a larger draw extends a smaller.

    Args:
        rows: Rows to draw from.
        n: Rows wanted; all of them where there are fewer.
        seed: The recipe's seed.
        name: The dataset's name.
        purpose: Draws for different purposes are independent of each other.

    Returns:
        (min(n, rows),) int64 indices, in the order drawn.
    """
    digest = hashlib.sha256(f"{purpose}\0{seed}\0{name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    return np.argsort(generator.random(rows), kind="stable")[:n].astype(np.int64)
