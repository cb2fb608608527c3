"""Token-weighted average, θ̄ = Σ w_k θ_k with w_k = N_k / Σ N_j: MERIT's merge. On the line θ0 + λ(θ̄ − θ0) for λ ≠ 1.

Limits: it is a mean of weights, so it needs branches of one base that lie in one low-loss region (see the diagnostics).

Source: Choi & Kim, arXiv:2606.01717, §4, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def coefficients(counts: Sequence[Fraction], scale: Fraction) -> tuple[Fraction, list[Fraction]]:
    """Coefficients (c_0, [c_k]) of θ0 and the θ_k, exact: c_0 = 1 − λ, c_k = λ N_k / Σ N_j."""
    total = sum(counts, Fraction(0))
    return 1 - scale, [scale * n / total for n in counts]
