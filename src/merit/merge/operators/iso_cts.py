"""Iso-CTS: a common subspace of Σ δ_k plus task-specific ones, all with the same singular value (a flat spectrum).

Sum-scaled. ``common_fraction: 1`` is Iso-C, which only flattens the spectrum of Σ δ_k. Limits: the flat spectrum moves every
direction that it keeps, rounding noise included; the scale α (here λ) has no data-free default and is searched on held-out
data. Directions of δ_k below 1e-7 of its norm are dropped and counted; so is all of a branch that left a matrix untouched.

Source: Marczak et al., No task left behind: isotropic model merging with common and task-specific subspaces,
arXiv:2502.04959, Algorithm 2 (Iso-C: Algorithm 1).
"""

from __future__ import annotations

import numpy as np

from merit.merge.operators import spectral, tsv


def merge_matrix(deltas: spectral.Deltas, common_fraction: float = 0.8) -> tuple[np.ndarray, dict[str, float]]:
    """Merge one weight matrix.

    Args:
        deltas: K matrices δ_k (m, n), float64; each is used twice.
        common_fraction: Share of the min(m, n) directions that is common.

    Returns:
        τ (m, n) float64, and ``common`` (number of common directions), ``sigma`` (the flat singular value), ``dropped``
        (directions left out, see ``tsv.assemble``).
    """
    branches, short = len(deltas), min(deltas[0].shape)
    total = np.zeros_like(deltas[0])
    for k in range(branches):
        total += deltas[k]
    specific = round((short - int(common_fraction * short)) / branches)  # halves to even, as the authors do
    common = short - branches * specific
    if common < 0:  # only for tiny matrices with many branches
        specific, common = short // branches, short - branches * (short // branches)
    left, sizes, right = spectral.svd(total)
    left, sizes, right = left[:, :common], sizes[:common], right[:common]
    triples = [(left, sizes, right)]
    if specific:
        for k in range(branches):
            delta = deltas[k]
            u, s, v = spectral.svd(delta - left @ (left.T @ delta))
            # what a rank-deficient δ_k leaves is rounding noise, which the flat spectrum must not amplify to full size
            s = np.where(s > spectral.TINY * np.linalg.norm(delta), s, 0.0)
            triples.append((u[:, :specific], s[:specific], v[:specific]))
    sigma = float(np.concatenate([s for _, s, _ in triples]).mean())
    flat = [(u, np.where(s > 0, sigma, 0.0), v) for u, s, v in triples]
    tau, numbers = tsv.assemble(flat)
    return tau, {"common": float(common), "sigma": sigma, "dropped": numbers["dropped"]}
