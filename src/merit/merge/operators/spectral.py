"""Thin SVD and nearest orthonormal factor in float64, by the Gram eigenproblem on the short side. Pure, no files.

For an m×n matrix with q = min(m, n) this costs about 2mnq + 9q³ + 2mnq operations, a full SVD 14mnq and more. Its
limit: squaring loses singular values below about 1e-8 of the largest; below TINY they are returned as zero with zero
vectors, and between TINY and about 1e-5 the vectors on the long side are orthonormal to fewer digits.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

TINY = 1e-7
"""Singular values below TINY times the largest count as zero."""


class Deltas(Protocol):
    """K task vectors δ_k (m, n) float64, each computed on demand."""

    def __len__(self) -> int: ...
    def __getitem__(self, k: int, /) -> np.ndarray: ...


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin SVD, singular values in decreasing order.

    Args:
        matrix: (m, n) float64.

    Returns:
        U (m, q), S (q,), Vᵀ (q, n). Directions of zero singular values are zero vectors on the long side.
    """
    rows, columns = matrix.shape
    if rows < columns:
        left, sizes, right = svd(np.ascontiguousarray(matrix.T))
        return right.T, sizes, left.T
    largest = float(np.abs(matrix).max(initial=0.0))
    if largest == 0.0:
        return np.zeros((rows, columns)), np.zeros(columns), np.eye(columns)
    scaled = matrix / largest  # keeps the Gram matrix away from underflow
    _, vectors = np.linalg.eigh(scaled.T @ scaled)
    vectors = np.ascontiguousarray(vectors[:, ::-1])
    left = scaled @ vectors
    sizes = np.linalg.norm(left, axis=0)
    order = np.argsort(-sizes, kind="stable")
    left, sizes, vectors = left[:, order], sizes[order], vectors[:, order]
    keep = sizes > TINY * sizes[0]
    left = np.where(keep, left / np.where(keep, sizes, 1.0), 0.0)
    return left, np.where(keep, sizes, 0.0) * largest, vectors.T


def nearest_orthonormal(matrix: np.ndarray, drop: float = 1e-6) -> tuple[np.ndarray, float, int]:
    """P Qᵀ of the SVD P D Qᵀ of a tall matrix: the nearest matrix with orthonormal columns (orthogonal Procrustes).

    Directions with D ≤ ``drop`` are dropped; otherwise the factor would fill them with arbitrary vectors.

    Args:
        matrix: (m, p) float64, m ≥ p.
        drop: Smallest singular value that counts; columns are expected to have about unit length.

    Returns:
        The factor (m, p), the smallest singular value that was kept (0.0 when none was), and the number of directions kept.
    """
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    keep = values > drop * drop
    if not keep.any():
        return np.zeros_like(matrix), 0.0, 0
    sizes, vectors = np.sqrt(values[keep]), vectors[:, keep]
    return matrix @ (vectors / sizes) @ vectors.T, float(sizes.min()), sizes.size
