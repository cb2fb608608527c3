"""Uniform average (model soup), θ̄ = (1/K) Σ θ_k: branch sizes are ignored.

Source: Wortsman et al., Model soups, arXiv:2203.05482, uniform soup.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from merit.merge.operators import average


def coefficients(counts: Sequence[Fraction], scale: Fraction) -> tuple[Fraction, list[Fraction]]:
    """Coefficients (c_0, [c_k]) of θ0 and the θ_k, exact: c_0 = 1 − λ, c_k = λ/K."""
    return average.coefficients([Fraction(1)] * len(counts), scale)
