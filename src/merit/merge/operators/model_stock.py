"""Model Stock: per tensor, the average of the branches, drawn back towards the base by how little their updates agree.

With the mean cosine c of the K task vectors of a tensor, τ = t · mean(δ_k), t = K c / (1 + (K − 1) c): the point of the
branches' plane that is nearest to the centre they scatter around. Limits: the derivation takes branches of equal length
that differ by chance alone (the same data, other seeds). MERIT's branches see different datasets, so small cosines mean
different tasks and not noise, and the step can come out much shorter than the average's: ``t`` by tensor is in the record.
Weights are ignored. A mean cosine of 0 or below gives t = 0, the base; fewer than two changed branches, t = 1.

Source: Jang et al., Model Stock: all we need is just a few fine-tuned models, arXiv:2403.19522, §4.
"""

from __future__ import annotations

import numpy as np

from merit.merge.operators.spectral import Deltas


def merge_tensor(deltas: Deltas) -> tuple[np.ndarray, dict[str, float]]:
    """Merge one tensor.

    Args:
        deltas: K arrays δ_k of any shape, float64; one is in memory at a time.

    Returns:
        τ in their shape, and ``t`` and the mean ``cosine`` between different branches.
    """
    total, directions, changed = np.zeros_like(deltas[0]), np.zeros_like(deltas[0]), 0
    for k in range(len(deltas)):
        delta = deltas[k]
        size = float(np.abs(delta).max(initial=0.0))
        total += delta
        if size > 0:
            scaled = delta / size  # norms of tiny numbers would underflow
            directions += scaled / np.linalg.norm(scaled)
            changed += 1
    mean = total / len(deltas)
    if changed < 2:
        return mean, {"t": 1.0}
    cosine = float((np.vdot(directions, directions) - changed) / (changed * (changed - 1)))
    t = max(0.0, changed * cosine / (1 + (changed - 1) * cosine)) if cosine > 0 else 0.0
    return t * mean, {"t": t, "cosine": cosine}
