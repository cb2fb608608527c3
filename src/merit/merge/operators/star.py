"""STAR: per branch, truncate the spectrum of δ_k and rescale the rest to the old nuclear norm; then average uniformly.

Limits: rounding noise of low-precision branches is rescaled *into* the kept directions, so ‖τ‖ can exceed the mean's; the
merge record has the ratio. An untouched matrix (δ_k = 0) stays 0.

Source: Lee et al., STAR: Spectral truncation and rescale for model merging, arXiv:2502.10339, §3.2, eq. 1 and 2.
"""

from __future__ import annotations

import numpy as np

from merit.merge.operators import spectral


def merge_matrix(deltas: spectral.Deltas, eta: float = 40.0) -> tuple[np.ndarray, dict[str, float]]:
    """Merge one weight matrix.

    Args:
        deltas: K matrices δ_k (m, n), float64.
        eta: Share of the nuclear norm to keep, in percent.

    Returns:
        τ (m, n) float64, and ``rank``: mean rank kept.
    """
    total, ranks = np.zeros_like(deltas[0]), []
    for k in range(len(deltas)):
        left, sizes, right = spectral.svd(deltas[k])
        nuclear = sizes.sum()
        if nuclear == 0.0:
            ranks.append(0)
            continue
        rank = min(int(np.searchsorted(np.cumsum(sizes), eta / 100 * nuclear, side="left")) + 1, sizes.size)
        ranks.append(rank)
        total += (left[:, :rank] * (sizes[:rank] * (nuclear / sizes[:rank].sum()))) @ right[:rank]
    return total / len(deltas), {"rank": float(np.mean(ranks))}
