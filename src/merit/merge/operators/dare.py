"""DARE: drop each entry of δ_k with probability p, rescale the rest by 1/(1 − p), then take the weighted average.

The paper trains full models on different tasks and adds up (task arithmetic) or merges by other rules; here the sparse δ_k
get the branches' weights, τ = Σ w_k m_k δ_k / (1 − p). Limits: unbiased, but the result is one random draw (``seed``), and
its noise grows with p/(1 − p) and with ‖δ_k‖: the paper finds p = 0.9 harmless where fine-tuning changes weights by less
than about 0.002, and harmful for larger changes. Entries that did not change stay.

Source: Yu et al., Language models are super mario: absorbing abilities from homologous models as a free lunch,
arXiv:2311.03099, §3.
"""

from __future__ import annotations

import numpy as np
import xxhash

from merit.merge.operators.entries import Entries


def merge_entries(entries: Entries, drop: float = 0.9, seed: int = 0) -> np.ndarray:
    """Merge some entries of one tensor.

    Args:
        entries: δ_k, weights and place of the entries.
        drop: p, the probability that an entry is dropped.
        seed: Of the draw, together with tensor, branch and place: the result does not depend on threads or block order.

    Returns:
        τ (n,) float64.
    """
    tau = np.zeros(entries.deltas.shape[1])
    for k, (delta, weight) in enumerate(zip(entries.deltas, entries.weights, strict=True)):
        tau += weight / (1 - drop) * np.where(kept(entries, k, drop, seed), delta, 0.0)
    return tau


def kept(entries: Entries, k: int, drop: float, seed: int) -> np.ndarray:
    """Which entries of δ_k (n,) are kept: one uniform number each, from a stream of its own per tensor, branch and block."""
    name = xxhash.xxh3_64_intdigest(entries.tensor.encode())
    rng = np.random.default_rng([seed, name, k, entries.start])
    mask: np.ndarray = np.greater_equal(rng.random(entries.deltas.shape[1]), drop)
    return mask
