"""Paired differences: an interval for their mean, a p-value valid for few and skewed ones, and Holm's correction.

Arrays in, numbers out. Which comparisons form a family is decided in :mod:`merit.evaluation.summary`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = ["ERROR", "MIN_UNITS", "Paired", "compare", "holm", "interval", "p_value"]

RESAMPLES = 10_000
"""Bootstrap resamples."""
FLIPS = 20_000
"""Random sign patterns, if there are too many to try all."""
EXACT = 14
"""Units up to which every sign pattern is tried."""
ERROR = 0.05
"""Maximum probability of any false call among the measures of one comparison."""
SKEW_REACH = 6.0
"""t up to which Johnson's correction grows: it is made for t near the threshold, and far beyond it would undo any
difference."""
STEEP_BELOW = 21
"""Units below which the correction for what few values show of their skewness grows with the cube of 1/n."""
MIN_UNITS = 12
"""Minimum datasets (or answers) for calling a difference: with fewer, skewed differences alone would give more than
5 % of false calls (benchmarks/results/verdict.md)."""


@dataclass(frozen=True)
class Paired:
    """See :class:`merit.evaluation.figures.Difference`."""

    difference: float
    ci95: tuple[float, float] | None
    p: float
    units: int
    wins: int
    losses: int
    ties: int


def interval(values: np.ndarray, weights: np.ndarray | None = None, *, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a (weighted) mean over units that are drawn with replacement.

    The expanded percentile interval: the percentiles are moved outward so that for n units it is as wide as Student's
    interval where that is exact; plain percentiles are too narrow for the few datasets of a mixture.
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


def p_value(values: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p of "the mean difference is zero", the larger of two tests' so that each covers the other's weakness.

    Sign flips: exact for any symmetric distribution, however heavy its tails. Johnson's t: allows for skewness, whose
    estimate from few values is too small and is therefore multiplied by 1 + 20/n · max(1, (21/n)²).
    Source: Fisher, The Design of Experiments (1935), §21; Johnson, "Modified t Tests and Confidence Intervals for
    Asymmetrical Populations", Journal of the American Statistical Association 73 (1978), 536-544. The factor and its
    reach are ours, from the simulations in benchmarks/evaluation/verdict.py.

    Args:
        values: (n,) float64 differences, n ≥ 3.
        seed: Seed of the sign patterns, if not all are tried.
    """
    return max(_sign_flips(values, seed), _skewed_t(values))


def _sign_flips(values: np.ndarray, seed: int) -> float:
    n, threshold = len(values), abs(float(values.sum())) * (1 - 1e-12)
    if n <= EXACT:
        return float(np.mean(np.abs(_every_sign(n) @ values) >= threshold))
    rng = np.random.default_rng([seed, n, 1])
    reached = 1  # the values as they are
    for start in range(0, FLIPS, 1000):
        signs = rng.integers(0, 2, size=(min(1000, FLIPS - start), n)) * 2.0 - 1
        reached += int((np.abs(signs @ values) >= threshold).sum())
    return reached / (FLIPS + 1)


@functools.cache
def _every_sign(n: int) -> np.ndarray:
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1) * 2.0 - 1


def _skewed_t(values: np.ndarray) -> float:
    n, mean, spread = len(values), float(values.mean()), float(values.std(ddof=1))
    if spread <= 1e-12 * abs(mean):
        return 0.0 if mean else 1.0  # all alike
    unseen = 20 / n * max(1.0, (STEEP_BELOW / n) ** 2)  # the long tail has no value yet
    third = float(((values - mean) ** 3).mean()) * n * n / ((n - 1) * (n - 2)) * (1 + unseen)
    squared = min(mean**2, SKEW_REACH**2 * spread**2 / n)
    moved = mean + third / (6 * spread**2 * n) + third * squared / (3 * spread**4)
    if moved * mean <= 0:  # the correction undoes the difference
        return 1.0
    return float(2 * stats.t.sf(abs(moved) / (spread / np.sqrt(n)), n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: calling those of at most 5 % makes any false call with at most 5 % probability.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6 (1979),
    65-70.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, worst = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def compare(values: np.ndarray, weights: np.ndarray | None, *, lower_is_better: bool, seed: int) -> Paired:
    """Paired differences with their interval and p-value.

    Args:
        values: (n,) differences, ours − theirs.
        weights: (n,) weight of each unit in the mean; None: 1.
        lower_is_better: Of the metric.
        seed: Seed of the bootstrap and of the sign patterns.
    """
    n, gains = len(values), -values if lower_is_better else values
    shares = values if weights is None else values * (weights * n / weights.sum())  # their mean is the weighted one
    return Paired(
        difference=float(np.average(values, weights=weights)),
        ci95=interval(values, weights, seed=seed) if n >= 2 else None,
        p=p_value(shares, seed=seed) if n >= 3 else 1.0,
        units=n,
        wins=int((gains > 0).sum()),
        losses=int((gains < 0).sum()),
        ties=int((gains == 0).sum()),
    )
