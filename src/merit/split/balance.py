"""Balanced recursive bisection: cut at the weighted median on axis 1, then every part on axis 2, and so on.

Pure; the caller provides the scores (principal axes, random numbers).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from merit.split.view import Groups

_TIE = 1e-6  # scores closer than this share of the axis' largest are one score: rounding must not decide a cut


def bisect(scores: np.ndarray, weights: np.ndarray, names: Sequence[str]) -> Groups:
    """Cut T datasets into 2^r groups of nearly equal weight.

    Each part is cut between two neighbours on its axis, where the weights of the two sides differ least: next to the
    weighted median. Both sides keep enough datasets for the remaining cuts. Our choices where the source leaves it open:

    * *Equal scores* at the cut are ordered by name.
    * *Two cuts equally balanced*: the one across the wider gap in scores, then the one nearer the middle of the list,
      then the lower one.
    * *A dataset heavier than half* stays whole: its side is as light as the rule above allows.
    * *Sign of an axis*: chosen so that its largest absolute score (first by name among equals) is positive, so flipping an
      axis changes nothing.

    Args:
        scores: (T, r) float64, one column per axis.
        weights: (T,) positive float64.
        names: (T,) dataset names, sorted; T >= 2^r.

    Returns:
        2^r groups of indices. Group number in binary, most significant bit first: 0 the lower side, 1 the upper side of
        axis 1, 2, ...

    Source: paper §4 step 4, Algorithm 1.
    """
    axes = scores.shape[1]
    oriented = np.column_stack([_orient(scores[:, axis]) for axis in range(axes)]) if axes else scores
    parts: Groups = [list(range(len(names)))]
    for axis in range(axes):
        keep = 2 ** (axes - axis - 1)
        parts = [side for part in parts for side in _cut(part, oriented[:, axis], weights, names, keep)]
    return parts


def _orient(column: np.ndarray) -> np.ndarray:
    largest = float(np.abs(column).max(initial=0.0))
    if largest == 0.0:
        return np.zeros_like(column)
    rounded: np.ndarray = np.round(column / (largest * _TIE)) * _TIE
    first = int(np.flatnonzero(np.abs(rounded) >= np.abs(rounded).max() - _TIE)[0])
    return rounded if rounded[first] > 0 else -rounded


def _cut(part: list[int], column: np.ndarray, weights: np.ndarray, names: Sequence[str], keep: int) -> Groups:
    scores = column.tolist()
    order = sorted(part, key=lambda i: (scores[i], names[i]))
    cuts = np.arange(keep, len(order) - keep + 1)
    running, along = np.cumsum(weights[order]), column[order]
    imbalance = (np.abs(2 * running[cuts - 1] - running[-1]) / running[-1]).round(12)
    even = cuts[imbalance == imbalance.min()]
    gaps = along[even] - along[even - 1]
    widest = even[gaps == gaps.max()]
    best = min(widest.tolist(), key=lambda cut: (abs(cut - len(order) / 2), cut))
    return [order[:best], order[best:]]


def tied(scores: np.ndarray, groups: Groups) -> list[int]:
    """Datasets whose side of some cut was decided by their name: others with the same score are on the other side.

    Args:
        scores: (T, r), as :func:`bisect` was given them.
        groups: What it returned.
    """
    found: set[int] = set()
    for axis in range(scores.shape[1]):
        column = _orient(scores[:, axis])
        wide = len(groups) >> (axis + 1)  # groups on each side of a cut on this axis
        sides = [[i for group in groups[k : k + wide] for i in group] for k in range(0, len(groups), wide)]
        for lower, upper in zip(sides[::2], sides[1::2], strict=True):
            shared = set(column[lower]) & set(column[upper])
            found |= {i for i in (*lower, *upper) if column[i] in shared}
    return sorted(found)
