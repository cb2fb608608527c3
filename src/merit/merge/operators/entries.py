"""What an elementwise operator sees: some entries of one tensor, of all branches. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Entries:
    """Some neighbouring entries of one tensor.

    Attributes:
        deltas: δ_k = θ_k − θ0 (K, n) float64.
        weights: w_k (K,) float64, Σ w_k = 1.
        tensor: The tensor's name in the base's files.
        start: Index of the first entry in the flattened tensor.
        moments: Second moments of the branches' gradients (K, n) float64, at least 0; None where the operator needs none.
    """

    deltas: np.ndarray
    weights: np.ndarray
    tensor: str = ""
    start: int = 0
    moments: np.ndarray | None = None
