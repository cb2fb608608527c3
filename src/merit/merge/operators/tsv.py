"""TSV-Merge: keep 1/K of each δ_k's singular triples, concatenate them, decorrelate the singular vectors.

Sum-scaled: τ is not divided by K. Limits: branches that share leading directions make the stacked vectors rank-deficient;
directions with a singular value below 1e-6 are dropped and the smallest kept one is recorded. The order of branches
does not matter in exact arithmetic. A branch that left a matrix untouched contributes nothing to it, and its share of the
directions stays empty. Matrices with min(m, n) < K keep nothing under the paper's rule; here they keep one triple.

Source: Gargiulo et al., Task singular vectors: reducing task interference in model merging, arXiv:2412.00081, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from merit.merge.operators import spectral


def merge_matrix(deltas: spectral.Deltas) -> tuple[np.ndarray, dict[str, float]]:
    """Merge one weight matrix.

    Args:
        deltas: K matrices δ_k (m, n), float64.

    Returns:
        τ (m, n) float64, and what ``assemble`` reports.
    """
    keep = max(1, min(deltas[0].shape) // len(deltas))
    triples = []
    for k in range(len(deltas)):
        left, sizes, right = spectral.svd(deltas[k])
        triples.append((left[:, :keep], sizes[:keep], right[:keep]))
    return assemble(triples)


def assemble(triples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, dict[str, float]]:
    """Rebuild a matrix from stacked triples (U, S, Vᵀ) with decorrelated factors; zero singular values are ignored.

    Returns:
        The matrix, and ``sigma_min``: smallest singular value kept in the decorrelation, ``dropped``: directions that were
        dropped, of zero size or shared exactly with others.
    """
    left = np.concatenate([u for u, _, _ in triples], axis=1)
    sizes = np.concatenate([s for _, s, _ in triples])
    right = np.concatenate([v for _, _, v in triples], axis=0)
    used = sizes > 0
    if not used.any():
        return np.zeros((left.shape[0], right.shape[1])), {"sigma_min": 0.0, "dropped": sizes.size}
    left, low_left, kept_left = _orthonormal(left[:, used])
    right, low_right, kept_right = _orthonormal(right[used].T)
    numbers = {"sigma_min": min(low_left, low_right), "dropped": sizes.size - min(kept_left, kept_right)}
    return (left * sizes[used]) @ right.T, numbers


def _orthonormal(columns: np.ndarray) -> tuple[np.ndarray, float, int]:
    if columns.shape[1] <= columns.shape[0]:
        return spectral.nearest_orthonormal(columns)
    rows, smallest, kept = spectral.nearest_orthonormal(np.ascontiguousarray(columns.T))
    return rows.T, smallest, kept
