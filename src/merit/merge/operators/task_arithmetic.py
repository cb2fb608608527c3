"""Task arithmetic, θ0 + λ Σ w_k δ_k with δ_k = θ_k − θ0; ``normalize: false`` gives the paper's plain sum θ0 + λ Σ δ_k.

With weights and λ = 1 it is the average; with one branch it is the line from the base to that checkpoint (WiSE-FT).
Limits: λ has no data-free default for the plain sum (0.3 to 1.0 are searched on held-out data).

Source: Ilharco et al., Editing models with task arithmetic, arXiv:2212.04089, §2; Wortsman et al., Robust fine-tuning of
zero-shot models, arXiv:2109.01903, eq. 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from merit.merge.operators import average


def coefficients(
    counts: Sequence[Fraction], scale: Fraction, normalize: bool = True
) -> tuple[Fraction, list[Fraction]]:
    """Coefficients (c_0, [c_k]) of θ0 and the θ_k, exact: with weights as ``average``; else c_0 = 1 − Kλ, c_k = λ."""
    if normalize:
        return average.coefficients(counts, scale)
    return 1 - len(counts) * scale, [scale] * len(counts)
