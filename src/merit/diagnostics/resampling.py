"""How sure a figure of losses is: rows are drawn again with replacement. Pure NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["resampled"]

RESAMPLES = 1000


def resampled(
    figure: Callable[[np.ndarray], np.ndarray], sums: np.ndarray, counts: np.ndarray, seed: int
) -> tuple[float, float]:
    """95 % bootstrap interval (percentiles) of a figure of several mean losses on the same rows.

    Args:
        figure: Mean losses (R, P), nats per target token at P points in R resamples, → figures (R,).
        sums: (P, N) summed loss of every row at every point, nats.
        counts: (N,) target tokens of every row.
        seed: Of the resampling.
    """
    rng = np.random.default_rng([seed, len(counts)])
    times = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=RESAMPLES).astype(np.float64)
    values = figure((times @ sums.T) / (times @ counts)[:, None])
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
