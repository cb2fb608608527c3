"""Inner products of the datasets' gradients, and how alike their norms are.

Pure NumPy; rows are datasets. It knows no models, no files and no sampling noise (:mod:`merit.conflict.reliability` does).
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
DOUBLE_LIMIT = 200
"""Up to this many datasets all arithmetic is float64 on whole vectors; above, see :func:`folded_products`."""


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


def fold_size(vectors: int) -> int:
    """Entries to fold each vector to, so that all of them take 270 MB together; at least 1,024."""
    return 1 << max(10, int(np.log2(_BLOCK_BYTES / (4 * vectors))))


def folded_products(rows: Sequence[Sequence[Sliceable]], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inner products of T gradients, and of the P parts that each is the sum of: the time grows as T²(D + P² size).

    Products of whole gradients are those of all D entries. The parts' contrasts, which are pure noise, are folded to
    ``size`` entries first (a count sketch: random signs, and a random shift for every ``size`` neighbours), which leaves
    their products unbiased, with a variance of at most (‖a‖²‖b‖² + ⟨a, b⟩²) / size; products within one dataset are exact.
    So whatever the parts of a gradient have in common, no fold blurs: parts add up to the gradient's own products.

    Args:
        rows: For every dataset its P parts (D,); each is read once, in slices.
        size: Entries after folding.

    Returns:
        (T, T) float64, and (PT, PT) float32: all first parts, all second ones, ...; both exactly symmetric.

    Source: Charikar, Chen & Farach-Colton 2002 (count sketch).
    """
    count, parts, width = len(rows), len(rows[0]), len(rows[0][0])
    generator = np.random.Generator(np.random.PCG64(0))
    size = min(size, width)
    folded = np.zeros((parts, count, size), dtype=np.float32)
    own, gram = np.zeros((parts, parts, count)), np.zeros((count, count))
    whole: np.ndarray = np.empty((count, size), dtype=np.float32)
    for start in range(0, width, size):
        columns = min(size, width - start)
        signs = generator.choice(np.array([-1.0, 1.0], dtype=np.float32), columns)
        shift = int(generator.integers(size))
        ahead = min(columns, size - shift)
        for i, vectors in enumerate(rows):
            block = np.stack([vector[start : start + columns] for vector in vectors]).astype(np.float32, copy=False)
            own[:, :, i] += block @ block.T
            block.sum(axis=0, out=whole[i, :columns])
            block *= signs
            folded[:, i, shift : shift + ahead] += block[:, :ahead]
            folded[:, i, : columns - ahead] += block[:, ahead:]
        gram += ssyrk(1.0, whole[:, :columns].T, trans=1, lower=1)
    gram = np.tril(gram) + np.tril(gram, -1).T
    flat = folded.reshape(parts * count, size)
    lower = ssyrk(1.0, flat.T, trans=1, lower=1)
    del folded, flat
    products = (np.tril(lower) + np.tril(lower, -1).T).reshape(parts, count, parts, count)
    del lower
    np.einsum("piri->pri", products)[:] = own
    products += ((gram - products.sum(axis=(0, 2), dtype=np.float64)) / parts**2).astype(np.float32)[:, None, :]
    return gram, products.reshape(parts * count, parts * count)


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
