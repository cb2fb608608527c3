"""What a search of merge weights found: every point, how the chosen one was chosen, and what mixture it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from merit.merge.weights import Branch, Losses

__all__ = ["Ratio", "WeightPoint", "WeightSearch"]


@dataclass(frozen=True)
class WeightPoint(Losses):
    """One point θ0 + Σ c_k δ_k.

    Attributes:
        coefficients: c_k = λ w_k by branch.
    """

    coefficients: tuple[float, ...]

    @property
    def scale(self) -> float:
        """λ = Σ c_k."""
        return round(sum(self.coefficients), DIGITS)


@dataclass(frozen=True)
class Ratio:
    """A dataset's part of the mixture, in tokens: as it was trained on, and as the weights imply.

    Attributes:
        dataset: Its name.
        branch: The branch that was trained on it.
        share: Of all branches' tokens.
        implied: w_k times its share of its branch's tokens.
        low, high: 95 % bootstrap interval of ``implied`` over the reporting rows.
    """

    dataset: str
    branch: str
    share: float
    implied: float
    low: float
    high: float


@dataclass(frozen=True)
class WeightSearch:
    """Searched weights.

    Attributes:
        objective, bound, scale_range, seed: What was searched for, and how.
        branches: Names, in the order of the coefficients.
        start: w_k by tokens, where the search begins.
        chosen: The chosen point, measured on the choosing rows.
        points: Every measured point, in order.
        kept: What the points' ``kept`` is, in words.
        reported: Base, token-weighted merge and chosen point on the reporting rows.
        ratios: The mixture that the weights stand for.
        rows: Choosing and reporting rows.
        left_out: Datasets with too few different rows to report on.
        memory: Whether the branches were held in memory or read for every point, and why.
        seconds: Wall time, of all parts if it was interrupted and gone on with.
    """

    objective: str
    bound: float
    scale_range: tuple[float, float]
    seed: int
    branches: tuple[str, ...]
    start: tuple[float, ...]
    chosen: WeightPoint
    points: tuple[WeightPoint, ...]
    kept: str = ""
    reported: Mapping[str, Losses] = field(default_factory=dict)
    ratios: tuple[Ratio, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    memory: str = ""
    seconds: float = 0.0

    @property
    def scale(self) -> float:
        """λ of the chosen point."""
        return self.chosen.scale

    @property
    def weights(self) -> tuple[float, ...]:
        """w_k of the chosen point, Σ w_k = 1; where it begins if the base was chosen (λ = 0)."""
        return weights_of(self.chosen.coefficients, self.start)

    @property
    def warnings(self) -> list[str]:
        """What speaks against the chosen point: it lies at an end of the range of λ, or is nearly one branch alone."""
        found, (low, high) = [], self.scale_range
        margin = _END * (high - low)
        if low < high and self.scale >= high - margin:
            found.append(
                f"The search ended at the end of its range of λ ({high:g}): the branches look undertrained; train them "
                "longer, or widen merge.search.scale_range."
            )
        if low < high and self.scale <= low + margin:
            found.append(
                f"The search ended at the low end of its range of λ ({low:g}): by merge.search's objective and bound the "
                "branches lose too much for what they learned."
            )
        if len(self.weights) > 1 and self.scale > 0:
            found += [
                f"{name} has {weight:.2f} of the weight: the merged model is nearly this branch alone; the others look "
                "undertrained."
                for name, weight in zip(self.branches, self.weights, strict=True)
                if weight > _ALONE
            ]
        return found

    def weigh(self, branches: Sequence[Branch]) -> list[Branch]:
        """The branches with the chosen weights: with λ as the scale, their coefficients are exactly those measured."""
        chosen = self.chosen.coefficients if self.scale else self.start
        return [replace(branch, weight=c, counted="auto") for branch, c in zip(branches, chosen, strict=True)]


_END, _ALONE = 0.01, 0.95  # share of the range that counts as its end; weight of a branch that is nearly alone

DIGITS = 6
"""Decimals of a coefficient: a point is measured and merged with the same short numbers."""


def weights_of(coefficients: Sequence[float], otherwise: Sequence[float]) -> tuple[float, ...]:
    """w_k = c_k / Σ c_j."""
    total = sum(coefficients)
    return tuple(c / total for c in coefficients) if total > 0 else tuple(otherwise)
