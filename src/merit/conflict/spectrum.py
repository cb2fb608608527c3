"""Does a split along principal axes pull gradients apart on examples that did not choose it? And what would chance give?

Pure NumPy on the inner products of quarter-samples. Three parts: what a cut gains, how much of it other examples confirm,
and the same figures for mixtures without any conflict (:mod:`merit.conflict.quarters`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackError, svds

from merit.conflict.geometry import DOUBLE_LIMIT
from merit.conflict.quarters import Quarters, null_mixtures
from merit.conflict.reliability import PARTS, SubSamples, reliability
from merit.split.balance import bisect
from merit.split.components import doubly_centred
from merit.split.view import Groups

PAPER_AXES = 3
"""Largest r of the paper (K = 8), and the largest that is suggested."""
LEAST_RATIO = 1.1
"""A balanced cut must gain a tenth more than random ones: among near-equal cuts one is always the best, to no purpose."""
_FEWEST = 6
"""Datasets with four quarters below which nothing is judged."""
_PAIRS = tuple((pair, tuple(set(range(PARTS)) - set(pair))) for pair in combinations(range(PARTS), 2))
"""The six ways to choose an axis on two quarters and to judge it on the other two."""
_ONE = np.eye(PARTS)
_SUMS = np.array([_ONE[a] + _ONE[b] for (a, b), _ in _PAIRS])
_DIFFERENCES = np.array([_ONE[c] - _ONE[d] for _, (c, d) in _PAIRS])


@dataclass(frozen=True)
class Concentration:
    """How far one axis pulls gradients apart, against chance.

    Attributes:
        axis: 1, 2, ...
        gain: sᵀMs of the balanced cut along this axis, added over the parts that it cuts; on the sample that chose it.
        random: Mean of the same over random cuts of the same parts into sides of the same sizes.
        ratio: gain / random; 0 for an axis without variance.
        ratio_null: Largest ratio of the mixtures without conflict.
        sign_cut_gain: sᵀMs of the cut at zero of the same axis, whose sides may be of any size.
        sign_cut_random: T/(T−1) tr(M), the mean of sᵀMs over random splits into equal halves.
        sign_cut_ratio: sign_cut_gain / sign_cut_random: the paper's condition. The split does not make this cut.
        sign_cut_ratio_null: Largest sign_cut_ratio of the mixtures without conflict.
        signal: Share of the gain that examples confirm which did not choose the cut: 1 without noise, 0 on average without
            conflict. None where too few datasets have four examples.
        signal_null: Largest signal of the mixtures without conflict.
        held_out_ratio: As ratio, on those examples; says nothing while signal is within its band.
    """

    axis: int
    gain: float
    random: float
    ratio: float
    ratio_null: float | None
    sign_cut_gain: float
    sign_cut_random: float
    sign_cut_ratio: float
    sign_cut_ratio_null: float | None
    signal: float | None
    signal_null: float | None
    held_out_ratio: float | None


def spectral_concentration(
    parts: SubSamples, weights: np.ndarray, names: Sequence[str], axes: int, *, corrected: bool = False
) -> list[Concentration]:
    """Judge the axes that the split cuts along.

    *The gain of a cut.* For s ∈ {±1}^T with Σs = 0, sᵀMs is (up to a constant) the merging gain of the cut s when M_ij =
    g_iᵀHg_j. Here H = I, the g_i have unit length and their mean is taken out: M = J C J. So this is about the *squared
    distance between the two sides' mean unit gradients*; it says the same of the loss only where curvature is alike in all
    directions that matter. The cuts are those that the split makes: along the components of the column-centred cosine
    matrix, axis 1 cuts the mixture, axis k every part that the axes before it left, each part with its own mean taken out.
    For random s with n₊ and n₋ entries of each sign in a part of n datasets, E[s_i s_j] = ((n₊ − n₋)² − n) / (n(n − 1)) for
    i ≠ j, and M1 = 0, so E[sᵀMs] = 4 n₊n₋ / (n(n − 1)) · tr(M): the paper's n/(n − 1) · tr(M) for equal halves.

    *Signal.* A cut that was chosen on noise gains on that noise. So axes are also found and cut on two quarters of every
    sample, and judged on the products of the other two, whose noise is independent: signal is that gain over the gain on the
    quarters that chose, both added over the six ways to do so. There, gradients are scaled by their unbiased norms, so that
    small samples do not look like gradients of another kind.

    *Null.* The same figures for mixtures in which every dataset has the same gradient, and its own measured noise
    (:func:`null_mixtures`): 99 of them (39 above 200 datasets, where they scatter less). An axis counts only above all of
    them. Above 200 datasets products are float32, and leading axes of quarters are found by iteration.

    Args:
        parts: The quarters of all T datasets, in name order.
        weights: (T,) what the cuts balance.
        names: (T,) sorted.
        axes: Axes to judge; as many are as T datasets can fill 2^k groups.
        corrected: The split cuts along cosines without the noise in their norms.

    Source: paper Prop. F.10, F.11, Remark F.13.
    """
    products = parts.products()
    axes = min(axes, len(names).bit_length() - 1, len(names) - 1)
    if axes < 1:
        return []
    gram = products.sum(axis=(0, 1), dtype=np.float64)
    whole = _Seen.of(_cosines(gram, _lengths(parts, gram) if corrected else None), weights, names, axes)
    judged = np.flatnonzero((parts.shares > 0).all(axis=1)).tolist()
    fewer = min(axes, len(judged).bit_length() - 1)
    confirmed, nulls = None, []
    if len(judged) >= _FEWEST:
        chosen = _Chosen(weights[judged], [names[i] for i in judged], fewer, corrected)
        places = list(range(PARTS))
        means: np.ndarray = products[np.ix_(places, places, judged, judged)].astype(_dtype(len(judged)), copy=False)
        shares = parts.shares[judged].T.astype(means.dtype)
        means /= shares[:, None, :, None]
        means /= shares[None, :, None, :]
        quarters = Quarters.of(means)
        confirmed = _Held.of(quarters, chosen)
        draws = 99 if len(judged) <= DOUBLE_LIMIT else 39
        generator = np.random.Generator(np.random.PCG64(0))
        for null in null_mixtures(means, quarters.norms(), draws, generator):
            cosine = _cosines(null.squares(np.ones((1, PARTS)))[0], PARTS * null.norms() if corrected else None)
            seen = _Seen.of(cosine, chosen.weights, chosen.names, fewer)
            nulls.append((seen.ratio, seen.sign_ratio, _Held.of(null, chosen).signal))
    limits = np.max(nulls, axis=0) if nulls else None
    return [
        Concentration(
            axis=k + 1,
            gain=float(whole.gain[k]),
            random=float(whole.random[k]),
            ratio=float(whole.ratio[k]),
            ratio_null=_figure(limits, 0, k),
            sign_cut_gain=float(whole.sign_gain[k]),
            sign_cut_random=whole.sign_random,
            sign_cut_ratio=float(whole.sign_ratio[k]),
            sign_cut_ratio_null=_figure(limits, 1, k),
            signal=float(confirmed.signal[k]) if confirmed and k < fewer else None,
            signal_null=_figure(limits, 2, k),
            held_out_ratio=float(confirmed.ratio[k]) if confirmed and k < fewer else None,
        )
        for k in range(axes)
    ]


def _dtype(datasets: int) -> type:
    return np.float64 if datasets <= DOUBLE_LIMIT else np.float32


def _lengths(parts: SubSamples, gram: np.ndarray) -> np.ndarray:
    """Norms (T,) without the noise; with it where it drowns the gradient."""
    unbiased = reliability(parts).unbiased_squared_norm
    return np.sqrt(np.where(unbiased > 0, unbiased, np.diag(gram)))


def _cosines(gram: np.ndarray, lengths: np.ndarray | None) -> np.ndarray:
    """Cosines (T, T) with a unit diagonal, in ``gram``'s memory: by its own norms, or by ``lengths`` (T,)."""
    inverse = (1.0 / (np.sqrt(np.diag(gram)) if lengths is None else lengths)).astype(gram.dtype)
    gram *= inverse[:, None]
    gram *= inverse[None, :]
    np.fill_diagonal(gram, 1.0)
    return gram


def _over(gain: np.ndarray, by: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.divide(gain, by, out=np.zeros_like(gain), where=by > 0)
    return found


def _figure(limits: np.ndarray | None, row: int, k: int) -> float | None:
    return float(limits[row, k]) if limits is not None and k < limits.shape[1] else None


@dataclass(frozen=True)
class _Seen:
    """Cuts on the cosines that chose them; arrays have one entry per axis."""

    gain: np.ndarray
    random: np.ndarray
    sign_gain: np.ndarray
    sign_random: float

    @classmethod
    def of(cls, cosine: np.ndarray, weights: np.ndarray, names: Sequence[str], axes: int) -> _Seen:
        scores = leading_scores(cosine, axes)
        gains = np.array([cut_gain(cosine, cut) for cut in successive_splits(scores, weights, names)])
        centred = doubly_centred(cosine)
        signs = np.where(scores > 0, 1.0, -1.0) * scores.any(axis=0)
        halves = len(cosine) / (len(cosine) - 1) * float(np.trace(centred))
        signs_gain = (signs * (centred @ signs.astype(centred.dtype))).sum(axis=0)
        return cls(gains[:, 0], gains[:, 1], signs_gain, halves)

    @property
    def ratio(self) -> np.ndarray:
        return _over(self.gain, self.random)

    @property
    def sign_ratio(self) -> np.ndarray:
        return self.sign_gain / self.sign_random if self.sign_random > 0 else np.zeros_like(self.sign_gain)


@dataclass(frozen=True)
class _Chosen:
    """What is cut on quarters: the datasets that have four, and how."""

    weights: np.ndarray
    names: Sequence[str]
    axes: int
    corrected: bool


@dataclass(frozen=True)
class _Held:
    """Cuts on quarters that did not choose them; arrays have one entry per axis."""

    gain: np.ndarray
    random: np.ndarray
    seen: np.ndarray

    @classmethod
    def of(cls, quarters: Quarters, chosen: _Chosen) -> _Held:
        """From products of quarter means."""
        norms = quarters.norms()
        gain, random, seen = np.zeros((3, chosen.axes))
        squares = quarters.squares(np.vstack([_SUMS, _DIFFERENCES]))
        sums, differences = squares[: len(_PAIRS)], squares[len(_PAIRS) :]
        differences -= sums[::-1]  # of the same two quarters: the last pair's other quarters are the first pair
        differences /= -4
        for sum_of_two, between in zip(sums, differences, strict=True):
            cosine = _cosines(sum_of_two, 2 * norms if chosen.corrected else None)
            scores = leading_scores(cosine, chosen.axes)
            for k, cut in enumerate(successive_splits(scores, chosen.weights, chosen.names)):
                confirmed = cut_gain(between, cut, norms)
                gain[k] += confirmed[0]
                random[k] += confirmed[1]
                seen[k] += cut_gain(cosine, cut)[0]
        return cls(gain, random, seen)

    @property
    def signal(self) -> np.ndarray:
        return _over(self.gain, self.seen)

    @property
    def ratio(self) -> np.ndarray:
        return _over(self.gain, self.random)


def leading_scores(cosine: np.ndarray, axes: int) -> np.ndarray:
    """Scores (T, axes) of the column-centred cosines, as the split finds them; axes without variance are zero.

    float32 cosines are not decomposed as a whole: their leading axes are found by iteration, to one part in 10,000.
    """
    centred = cosine - cosine.mean(axis=0)
    count = len(cosine)
    if cosine.dtype == np.float32:
        with suppress(ArpackError):
            start = np.cos(np.arange(count, dtype=np.float32))
            vectors, singular, _ = svds(centred, axes, tol=1e-4, v0=start, return_singular_vectors="u")
            best = np.argsort(-singular)
            return np.asarray(vectors[:, best].astype(np.float64) * singular[best])
    values, vectors = eigh(centred @ centred.T, subset_by_index=(count - axes, count - 1))
    kept = np.sqrt(np.where(values > (1e-8 * count) ** 2, values, 0.0))
    return np.asarray((vectors * kept)[:, ::-1], dtype=np.float64)


def successive_splits(scores: np.ndarray, weights: np.ndarray, names: Sequence[str]) -> list[Groups]:
    """The split's own groups along 1, 2, ... axes; none where an axis is empty.

    Args:
        scores: (T, R), of as many axes as T datasets can fill.
        weights: (T,) what the cuts balance.
        names: (T,) sorted.
    """
    axes = range(1, scores.shape[1] + 1)
    return [bisect(scores[:, :k], weights, names) if scores[:, k - 1].any() else [] for k in axes]


def cut_gain(matrix: np.ndarray, groups: Groups, lengths: np.ndarray | None = None) -> tuple[float, float]:
    """Gain sᵀMs of the last cuts that made ``groups`` (both sides of a part in a row), and its mean over random cuts.

    Args:
        matrix: (T, T) symmetric.
        groups: Places; both sides of a cut in a row.
        lengths: (T,) of the gradients whose products ``matrix`` holds; 1 by default.
    """
    members = np.zeros((len(matrix), len(groups)))
    for k, group in enumerate(groups):
        members[group, k] = 1.0
    sides = members if lengths is None else members / lengths[:, None]
    sums = sides.T @ (matrix @ sides.astype(matrix.dtype))
    traces, sizes = np.diag(matrix) @ sides**2, members.sum(axis=0)
    gain = random = 0.0
    for k in range(0, len(groups), 2):
        pair = slice(k, k + 2)
        size, between = sizes[pair].sum(), sums[pair, pair]
        s = np.array([-1.0, 1.0]) - (sizes[k + 1] - sizes[k]) / size  # the part's mean taken out
        gain += float(s @ between @ s)
        trace = traces[pair].sum() - between.sum() / size
        random += float(4 * sizes[k] * sizes[k + 1] / (size * (size - 1)) * trace)
    return gain, random


def suggest_axes(concentration: Sequence[Concentration], datasets: int) -> tuple[int, str]:
    """A suggested r, and why, in words; 0 where no split is recommended.

    An axis counts when its signal is above that of every mixture without conflict, and its balanced cut gains at least a
    tenth more than random cuts into sides of the same sizes on examples that did not choose it. r is the number of leading
    axes that count, at most 3 (the paper's largest), and such that the 2^r groups have two datasets or more on average.
    """
    room = max(1, int(np.log2(max(2, datasets // 2))))
    limit = min(PAPER_AXES, room)
    passed, why = 0, "there are too few datasets with four examples or more to tell"
    for item in concentration:
        if item.signal is None or item.signal_null is None or item.held_out_ratio is None:
            why = f"axis {item.axis} cannot be judged: too few datasets have four examples or more"
        elif item.signal <= item.signal_null:
            why = (
                f"on axis {item.axis} other examples confirm {item.signal:.0%} of the cut's gain, and up to "
                f"{item.signal_null:.0%} where there is no conflict at all"
            )
        elif item.held_out_ratio < LEAST_RATIO:
            why = (
                f"on axis {item.axis} the balanced cut has no room to beat random cuts of the same sizes "
                f"(ratio {item.held_out_ratio:.2f} on other examples, needs {LEAST_RATIO})"
            )
        else:
            passed += 1
            why = (
                f"{datasets} datasets fill no more than {2**limit} groups"
                if limit == room < PAPER_AXES
                else "the paper tried no more than three axes"
            )
            if passed < limit:
                continue
        break
    if not passed:
        return 0, f"r = 0, no split is recommended: {why}."
    factors = ", ".join(f"{item.held_out_ratio:.1f}" for item in concentration[:passed])
    who = "the first axis beats" if passed == 1 else f"the first {passed} axes beat"
    by = "a factor of" if passed == 1 else "factors of"
    return passed, (
        f"r = {passed} ({2**passed} groups): {who} random balanced cuts by {by} {factors} in squared distance between the "
        f"sides' mean unit gradients, on examples that did not choose them; it stops there because {why}."
    )
