"""Paired differences: an interval for their mean, a p-value, and what may be said. Arrays in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from merit.evaluation.figures import Outcome

__all__ = ["MIN_UNITS", "Paired", "compare", "interval"]

RESAMPLES = 10_000
"""Bootstrap resamples."""
MIN_UNITS = 6
"""Fewest datasets (or prompts) of a comparison that may be called clear: with fewer, Wilcoxon's two-sided p cannot pass
0.05 whatever the figures, and a bootstrap of so few values is no interval."""


@dataclass(frozen=True)
class Paired:
    """See :class:`merit.evaluation.figures.Difference`."""

    difference: float
    ci95: tuple[float, float] | None
    wilcoxon_p: float
    units: int
    wins: int
    losses: int
    ties: int
    outcome: Outcome


def interval(values: np.ndarray, weights: np.ndarray | None = None, *, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a (weighted) mean over units that are drawn with replacement.

    The expanded percentile interval: the percentiles are moved outward so that for n units it is as wide as Student's
    interval where that one is right; plain percentiles are too narrow for the few datasets of a mixture.
    Source: Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69 (2015), 371-386.

    Args:
        values: (n,) float64, n ≥ 2.
        weights: (n,) weight of each unit in the mean, drawn along with it; None: 1.
        seed: Seed of the resampling.
    """
    n = len(values)
    weights = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    rng = np.random.default_rng([seed, n])
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 500):
        drawn = rng.integers(0, n, size=(min(500, RESAMPLES - start), n))
        w = weights[drawn]
        means[start : start + len(drawn)] = (values[drawn] * w).sum(axis=1) / w.sum(axis=1)
    tail = float(stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf(0.025, n - 1)))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def compare(values: np.ndarray, weights: np.ndarray | None, *, lower_is_better: bool, seed: int) -> Paired:
    """What may be said of paired differences.

    Args:
        values: (n,) differences, ours − theirs.
        weights: (n,) weight of each unit in the mean; None: 1.
        lower_is_better: Of the metric.
        seed: Seed of the bootstrap.
    """
    gains = -values if lower_is_better else values
    changed = values[values != 0]  # Wilcoxon leaves out zeros; without them scipy's exact p is quick
    p = float(stats.wilcoxon(changed).pvalue) if len(changed) else 1.0
    ci = interval(values, weights, seed=seed) if len(values) >= 2 else None
    outcome: Outcome
    if len(values) < MIN_UNITS or ci is None:
        outcome = "few"
    elif ci[0] <= 0 <= ci[1]:
        outcome = "unclear"
    else:
        outcome = "better" if (ci[1] < 0) == lower_is_better else "worse"
    return Paired(
        difference=float(np.average(values, weights=weights)),
        ci95=ci,
        wilcoxon_p=p,
        units=len(values),
        wins=int((gains > 0).sum()),
        losses=int((gains < 0).sum()),
        ties=int((gains == 0).sum()),
        outcome=outcome,
    )
