"""Made-up mixtures: true gradients, examples that scatter around them in few strong directions, quarters of samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from merit.conflict.reliability import SubSamples


def mixture(truth: np.ndarray, noise: np.ndarray, sizes: int | Sequence[int] | np.ndarray, seed: int) -> SubSamples:
    """Quarters of datasets with true gradients (T, D), whose examples scatter as ``noise`` (R, D) times normal draws."""
    rng = np.random.default_rng(seed)
    sizes = np.broadcast_to(sizes, len(truth))
    samples = [mean + rng.standard_t(3, size=(n, len(noise))) @ noise for mean, n in zip(truth, sizes, strict=True)]
    sums = np.array([s[p::4].sum(axis=0) / len(s) for p in range(4) for s in samples])
    counts = np.array([[len(s[p::4]) for p in range(4)] for s in samples], dtype=float)
    total = counts.sum(axis=1)
    with np.errstate(divide="ignore"):
        return SubSamples(sums @ sums.T, counts / total[:, None], 1 / counts, 1 / total, np.zeros(len(truth)))


def low_rank_noise(width: int, seed: int = 0) -> np.ndarray:
    """Few strong directions, as real gradients scatter."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(30, width)) * (1.0 / np.arange(1, 31))[:, None]


def planted(count: int, *patterns: np.ndarray) -> np.ndarray:
    truth = np.zeros((count, 60))
    truth[:, 0] = 1.0
    for place, pattern in enumerate(patterns, start=1):
        truth[:, place] = pattern
    return truth
