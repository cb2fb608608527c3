"""Leading eigenpairs of a symmetric operator by Lanczos with full reorthogonalization. Pure NumPy; it knows no models.

Source: Golub & Van Loan, Matrix Computations, 4th ed., §10.1 and §10.3.4; the paper's study uses 50 steps (F.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["Spectrum", "lanczos"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Ritz pairs after some steps.

    Attributes:
        values: (m,) all Ritz values, descending.
        vectors: (k, d) unit Ritz vectors of the k largest values, in the dtype of the products.
        residuals: (m,) ‖Hv − λv‖ of every pair, as the recurrence gives it.
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray


def lanczos(
    product: Callable[[np.ndarray], np.ndarray],
    size: int,
    *,
    steps: int,
    vectors: int,
    seed: int = 0,
    dtype: type = np.float64,
) -> Spectrum:
    """Ritz values and leading Ritz vectors.

    Every new vector is made orthogonal to all earlier ones twice, so no copies of converged pairs appear. It ends before
    ``steps`` when the space is exhausted.

    Args:
        product: v (d,) → Hv (d,).
        size: d.
        steps: m, at most d.
        vectors: k of the result.
        seed: Of the start vector.
        dtype: Of the basis in memory: m·d entries; inner products are float64.
    """
    steps = min(steps, size)
    basis: np.ndarray = np.zeros((steps, size), dtype=dtype)
    start = np.random.default_rng(seed).standard_normal(size)
    basis[0] = start / np.linalg.norm(start)
    diagonal, beside = np.zeros(steps), np.zeros(steps)
    done = 0
    for step in range(steps):
        image = np.asarray(product(basis[step]), dtype=np.float64)
        diagonal[step] = float(basis[step].astype(np.float64) @ image)
        for _ in range(2):
            for row in basis[: step + 1]:  # row by row: no second copy of the basis in float64
                image -= float(row.astype(np.float64) @ image) * row
        beside[step] = float(np.linalg.norm(image))
        done = step + 1
        scale = max(float(np.abs(diagonal[:done]).max()), float(beside[:step].max(initial=0.0)))
        if step + 1 == steps or beside[step] <= 1e-12 * scale:
            break
        basis[step + 1] = image / beside[step]
    tri = np.diag(diagonal[:done]) + np.diag(beside[: done - 1], 1) + np.diag(beside[: done - 1], -1)
    values, inner = np.linalg.eigh(tri)
    values, inner = values[::-1], inner[:, ::-1]
    leading = inner[:, :vectors].T.astype(dtype) @ basis[:done]
    leading /= np.linalg.norm(leading, axis=1, keepdims=True)
    return Spectrum(values, leading, np.abs(inner[-1]) * beside[done - 1])
