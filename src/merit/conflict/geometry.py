"""Inner products of the datasets' gradients, and how alike their norms are.

Pure NumPy in float64; rows are datasets. It knows no models, no files and no sampling noise
(:mod:`merit.conflict.reliability` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from scipy.linalg.blas import dsyrk, ssyrk


class Sliceable(Protocol):
    """A vector that can be read in slices: an array, a memory map, or a vector on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


_BLOCK_BYTES = 2**28


def gram_matrix(rows: Sequence[Sliceable], dtype: type = np.float64) -> np.ndarray:
    """Inner products of every pair of rows, read in column blocks of bounded memory (270 MB).

    Args:
        rows: T vectors (D,), float32 or float64; memory-mapped files are read once, block by block.
        dtype: Arithmetic inside a block; blocks are always added in float64.

    Returns:
        (T, T) float64, exactly symmetric.
    """
    count, width = len(rows), len(rows[0])
    syrk = dsyrk if dtype is np.float64 else ssyrk
    columns = max(256, min(width, _BLOCK_BYTES // (count * np.dtype(dtype).itemsize)))
    gram = np.zeros((count, count))
    for start in range(0, width, columns):
        block: np.ndarray = np.empty((count, min(columns, width - start)), dtype=dtype)
        for index in range(count):
            block[index] = rows[index][start : start + columns]
        gram += syrk(1.0, block.T, trans=1, lower=1)
    lower = np.tril(gram)
    return lower + np.tril(gram, -1).T


def norm_concentration(norms: np.ndarray) -> dict[str, float]:
    """How alike gradient norms are: the closer, the nearer cosine PCA is to raw-gradient PCA.

    Returns:
        mean, sd (with T − 1), max_over_min, and cv, cv_trimmed_5, cv_trimmed_10: sd / mean of all norms, and after
        taking off the given percentage of datasets (rounded down) at each end.

    Source: paper Theorem F.4 and Appendix B.
    """
    ordered = np.sort(np.asarray(norms, dtype=np.float64))

    def variation(share: float) -> float:
        cut = int(len(ordered) * share)
        kept = ordered[cut : len(ordered) - cut]
        return float(kept.std(ddof=1) / kept.mean()) if len(kept) > 1 else float("nan")

    return {
        "mean": float(ordered.mean()),
        "sd": float(ordered.std(ddof=1)) if len(ordered) > 1 else float("nan"),
        "max_over_min": float(ordered[-1] / ordered[0]),
        "cv": variation(0.0),
        "cv_trimmed_5": variation(0.05),
        "cv_trimmed_10": variation(0.10),
    }
