"""Principal components of a cosine or Gram matrix: the axes that a split cuts along. Pure NumPy in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.linalg import eigh

_WHOLE = 200
"""Datasets up to which a matrix is decomposed as a whole."""

Centring = Literal["columns", "double"]


def cosine_matrix(gram: np.ndarray) -> np.ndarray:
    """C_ij = G_ij / √(G_ii G_jj), (T, T), with an exact unit diagonal. Source: paper §4 step 2."""
    norms = np.sqrt(np.diag(gram))
    cosine: np.ndarray = gram / np.outer(norms, norms)
    np.fill_diagonal(cosine, 1.0)
    return cosine


def doubly_centred(matrix: np.ndarray) -> np.ndarray:
    """J A J with J = I − 11ᵀ/T: rows and columns of a symmetric matrix centred."""
    centred: np.ndarray = matrix - matrix.mean(axis=0)[None, :] - matrix.mean(axis=1)[:, None] + matrix.mean()
    return centred


@dataclass(frozen=True)
class PrincipalComponents:
    """Result of :func:`principal_components`.

    Attributes:
        scores: (T, R): coordinates of every dataset on the leading axes.
        explained_variance: (R,): share of the centred matrix's variance on each axis; in [0, 1], descending.
        axes: (T, R): unit right singular vectors.
    """

    scores: np.ndarray
    explained_variance: np.ndarray
    axes: np.ndarray


def principal_components(matrix: np.ndarray, components: int, centring: Centring = "columns") -> PrincipalComponents:
    """PCA of a symmetric (T, T) matrix whose rows are observations.

    The sign of an axis is chosen so that its score of largest magnitude is positive (the first such in row order); scores of
    axes without variance are exactly zero.

    Args:
        matrix: Cosines (the paper's choice) or a Gram matrix (its raw-gradient PCA).
        components: Number of axes; at most T − 1 are returned.
        centring: ``columns`` as in the paper's method; ``double`` as in its curvature study.

    Source: paper §4 step 3, Appendix F.3.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    centred = doubly_centred(matrix) if centring == "double" else matrix - matrix.mean(axis=0)
    count = max(0, min(components, len(matrix) - 1))
    left, singular, right = _leading(centred, count)
    variance = singular**2
    total = float((centred**2).sum())
    rounding = np.finfo(np.float64).eps * len(matrix) * max(float(np.abs(matrix).max(initial=0.0)), 1e-300)
    empty = singular <= max(rounding, 1e-7 * float(singular.max(initial=0.0)) if len(matrix) > _WHOLE else 0.0)
    singular = np.where(empty, 0.0, singular)
    scores = left[:, :count] * singular[:count]
    axes = right[:count].T
    if count:
        flip = np.where(scores[np.abs(scores).argmax(axis=0), np.arange(count)] < 0, -1.0, 1.0)
        scores, axes = scores * flip, axes * flip
    shares = np.where(empty, 0.0, variance)[:count] / total if total > 0 else np.zeros(count)
    return PrincipalComponents(scores, shares, axes)


def _leading(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest singular triplets, at least ``count``; a large matrix is multiplied with itself first, which is faster."""
    if len(matrix) <= _WHOLE or not count:
        return np.linalg.svd(matrix, full_matrices=False)
    size = len(matrix)
    values, left = eigh(matrix @ matrix.T, subset_by_index=(size - count, size - 1))
    left, singular = left[:, ::-1], np.sqrt(np.maximum(values[::-1], 0.0))
    return left, singular, (left.T @ matrix) / np.maximum(singular, 1e-300)[:, None]
