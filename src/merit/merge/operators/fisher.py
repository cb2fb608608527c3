"""Fisher-weighted average: each entry of θ̄ is a mean of the θ_k weighted by w_k F_k, F_k the entry's Fisher information.

F_k is the optimizer's own estimate: Adam's second moment of the gradient, bias-corrected, as the branch left it
(``train.save_second_moments``). The paper computes the Fisher from samples after training; recycling the moments costs
nothing, and Li et al. find it to do about as well. Limits: they are squares of gradients of a *batch*, weighted towards the
last steps (so the branches should share batch size and betas, as MERIT's do), and a diagonal ignores how weights act
together. Where no branch has a moment above 0, it is the plain weighted average.

Source: Matena & Raffel, Merging models with Fisher-weighted averaging, arXiv:2111.09832, §2.2; the moments instead of the
Fisher: Li et al., Fishers for free? Approximating the Fisher information matrix by recycling the squared gradient
accumulator, arXiv:2507.18807.
"""

from __future__ import annotations

import numpy as np

from merit.merge.operators.entries import Entries


def merge_entries(entries: Entries) -> np.ndarray:
    """τ (n,) float64: Σ w_k F_k δ_k / Σ w_k F_k, or Σ w_k δ_k where Σ w_k F_k = 0."""
    assert entries.moments is not None
    weighted = entries.weights[:, None] * entries.moments
    largest = weighted.max(axis=0)
    informed = largest > 0
    shares = weighted / np.where(informed, largest, 1.0)  # moments may be near the smallest numbers
    total = shares.sum(axis=0)
    mean = (shares * entries.deltas).sum(axis=0) / np.where(informed, total, 1.0)
    tau: np.ndarray = np.where(informed, mean, entries.weights @ entries.deltas)
    return tau
