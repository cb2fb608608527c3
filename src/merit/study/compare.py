"""Methods against the baseline, paired by seed: as they ended, and at equal learning. Pure: figures in, figures out.

**At equal learning.** A model that moves less learns less and keeps more, whatever made it. So every method is also read
off at one learned loss: the one that the recipe's own method has with the same seed. Going from the base along the
method's line, the kept and unseen losses are interpolated linearly between the two measured λ around the first crossing
of that loss. A method whose measured line never learns so much has no figure there. Joint training's line is WiSE-FT.

Source: Wortsman et al., Robust fine-tuning of zero-shot models, arXiv:2109.01903, for the line; Choi & Kim, arXiv
2606.01717, §5, for the one-sided paired Wilcoxon test over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from scipy import stats

from merit.evaluation.figures import Part
from merit.evaluation.statistics import holm, interval
from merit.study.figures import PART_COLUMNS, Column, Difference, Line, Place, Run, columns_of, is_better_high

__all__ = ["at_learned", "compare_methods", "equal_learning", "wilcoxon"]


def wilcoxon(gains: Sequence[float]) -> float:
    """One-sided Wilcoxon signed-rank p for "gains are positive"; seeds without a difference do not count.

    Exact up to 50 seeds without ties; five seeds that all gain give 1/32.

    Args:
        gains: Paired gains, one per seed.
    """
    values = np.asarray([gain for gain in gains if gain != 0], dtype=np.float64)
    if not len(values):
        return 1.0
    tied = len(set(np.abs(values).tolist())) < len(values)
    method = stats.PermutationMethod(n_resamples=100_000, rng=0) if tied and len(values) <= 16 else "auto"
    return float(stats.wilcoxon(values, alternative="greater", method=method).pvalue)


def at_learned(line: Line, learned: float) -> dict[Part, float] | None:
    """Losses where a line, walked from λ = 0 on, first reaches a learned loss; None if it never does.

    Args:
        line: With a point at λ = 0.
        learned: Mixture loss, nats per target token.
    """
    points = sorted(line.points, key=lambda point: point.scale)
    if not points or "mixture" not in points[0].losses:
        return None
    for before, after in pairwise(points):
        high, low = before.losses["mixture"], after.losses["mixture"]
        if (high - learned) * (low - learned) <= 0 and high != low:
            share = (high - learned) / (high - low)
            shared = before.losses.keys() & after.losses.keys()
            return {part: before.losses[part] + share * (after.losses[part] - before.losses[part]) for part in shared}
    return None


def equal_learning(runs: Sequence[Run], own: str) -> dict[tuple[str, int], dict[Column, float]]:
    """Kept and unseen losses at the own method's learned loss of the same seed, by method and seed.

    Args:
        runs: All runs; those without a line are left out.
        own: The method whose learned loss (λ = 1) counts.
    """
    targets = {run.seed: _learned(run) for run in runs if run.method == own}
    found: dict[tuple[str, int], dict[Column, float]] = {}
    for run in runs:
        target = targets.get(run.seed)
        losses = at_learned(run.line, target) if run.line is not None and target is not None else None
        if losses is not None:
            found[run.method, run.seed] = {
                PART_COLUMNS[part][0]: loss for part, loss in losses.items() if part != "mixture"
            }
    return found


def _learned(run: Run) -> float | None:
    """The mixture loss at λ = 1, of the run's own line where it was measured there: the saved model, whose weights are
    rounded, may differ in the last digits, and then the line that ends there would not reach it."""
    ends = [point.losses.get("mixture") for point in run.line.points if point.scale == 1] if run.line else []
    return ends[0] if ends and ends[0] is not None else run.values.get("learned")


def compare_methods(runs: Sequence[Run], baseline: str, own: str) -> tuple[Difference, ...]:
    """Every method against the baseline, column by column, corrected for their number within each place.

    Args:
        runs: All runs.
        baseline: The method that the others are paired with.
        own: The recipe's own method, for the comparison at equal learning.
    """
    ended = {(run.method, run.seed): run.values for run in runs if run.method != "base"}
    return (*_paired(ended, baseline, "end"), *_paired(equal_learning(runs, own), baseline, "equal"))


def _paired(
    values: Mapping[tuple[str, int], Mapping[Column, float]], baseline: str, place: Place
) -> tuple[Difference, ...]:
    methods = [method for method in dict.fromkeys(name for name, _ in values) if method != baseline]
    found, columns = [], columns_of(values.values())
    for method in methods:
        seeds = [seed for name, seed in values if name == method and (baseline, seed) in values]
        for column in columns:
            pairs = [(values[method, seed], values[baseline, seed]) for seed in seeds]
            both = [(ours[column], theirs[column]) for ours, theirs in pairs if column in ours and column in theirs]
            if both:
                found.append(_difference(method, column, place, np.asarray([a - b for a, b in both])))
    corrected = holm([item.p for item in found])
    return tuple(replace(item, p_holm=p) for item, p in zip(found, corrected, strict=True))


def _difference(method: str, column: Column, place: Place, values: np.ndarray) -> Difference:
    gains = values if is_better_high(column) else -values
    return Difference(
        method,
        column,
        place,
        mean=float(values.mean()),
        ci95=interval(values) if len(values) > 1 else None,
        p=wilcoxon(gains.tolist()),
        p_holm=1.0,
        seeds=len(values),
        wins=int((gains > 0).sum()),
        losses=int((gains < 0).sum()),
    )
