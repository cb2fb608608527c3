"""Geometry of the datasets' gradients: Gram, cosines, principal components, and whether PCA has room to beat chance.

Pure NumPy in float64; rows are datasets. It knows no models, no files and no sampling noise
(:mod:`merit.conflict.reliability` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.linalg.blas import dsyrk, ssyrk

from merit.split.components import doubly_centred


class Sliceable(Protocol):
    """A vector that can be read in slices: an array, a memory map, or a vector on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


_BLOCK_BYTES = 2**28
PAPER_AXES = 3
"""Largest r of the paper (K = 8), and the largest that is suggested."""
_LEAST_RATIO = 1.1
"""A balanced cut must gain a tenth more than random ones: among near-equal cuts one is always the best, to no purpose."""


def gram_matrix(rows: Sequence[Sliceable], dtype: type = np.float64) -> np.ndarray:
    """Inner products of every pair of rows, read in column blocks of bounded memory (256 MiB).

    Args:
        rows: T vectors (D,), float32 or float64; memory-mapped files are read once, block by block.
        dtype: Arithmetic inside a block; blocks are always added in float64.

    Returns:
        (T, T) float64, exactly symmetric.
    """
    count, width = len(rows), len(rows[0])
    syrk = dsyrk if dtype is np.float64 else ssyrk
    columns = max(256, min(width, _BLOCK_BYTES // (count * np.dtype(dtype).itemsize)))
    gram = np.zeros((count, count))
    for start in range(0, width, columns):
        block: np.ndarray = np.empty((count, min(columns, width - start)), dtype=dtype)
        for index in range(count):
            block[index] = rows[index][start : start + columns]
        gram += syrk(1.0, block.T, trans=1, lower=1)
    lower = np.tril(gram)
    return lower + np.tril(gram, -1).T


@dataclass(frozen=True)
class Concentration:
    """How far one axis pulls gradients apart, against chance.

    Attributes:
        axis: 1, 2, ...
        gain: sᵀMs of the balanced cut along this axis, added over the parts that it cuts.
        random: Mean of the same over random cuts of the same parts into sides of the same sizes.
        ratio: gain / random; the split beats chance on this axis where it is above 1. 0 for an axis without variance.
        sign_cut_gain: μ_k‖v_k‖₁², a lower bound on sᵀMs for the cut s = sign(v_k), whose sides may be of any size.
        sign_cut_random: T/(T−1) tr(M), the mean of sᵀMs over random splits into equal halves.
        sign_cut_ratio: sign_cut_gain / sign_cut_random: the paper's condition. The split does not make this cut.
        signal: Share of μ_k that the two half-samples agree on; None where it was not measured.
    """

    axis: int
    gain: float
    random: float
    ratio: float
    sign_cut_gain: float
    sign_cut_random: float
    sign_cut_ratio: float
    signal: float | None


def spectral_concentration(
    cosine: np.ndarray, splits: Sequence[Sequence[Sequence[int]]], cross: np.ndarray | None = None
) -> list[Concentration]:
    """Does a cut along principal axis k pull gradients further apart than a random cut with sides of the same sizes?

    For s ∈ {±1}^T with Σs = 0, sᵀMs is (up to a constant) the merging gain of the cut s when M_ij = g_iᵀHg_j. Here
    H = I, the g_i are normalised to unit length and their mean is taken out: M = J C J. So this is about the *squared
    distance between the two sides' mean unit gradients*; it says the same of the loss only where curvature is alike in all
    directions that matter.

    *Balanced cut.* The cuts that the split makes: axis 1 cuts the mixture, axis k every part that the axes before it left,
    each part with its own mean taken out. For random s with n₊ and n₋ entries of each sign in a part of n datasets,
    E[s_i s_j] = ((n₊ − n₋)² − n) / (n(n − 1)) for i ≠ j, and M1 = 0, so E[sᵀMs] = 4 n₊n₋ / (n(n − 1)) · tr(M): the paper's
    n/(n − 1) · tr(M) for equal halves. Sizes count datasets. Where datasets differ in weight, chance means random
    assignments with as many datasets on each side, which need not weigh the same.

    *Sign cut.* The paper's condition, on the eigenvectors v_k of M. Its sides may be of any size, so that a single dataset
    against all others satisfies it although no balanced cut can make use of that.

    Args:
        cosine: C, (T, T), T >= 2 where there are splits.
        splits: For axes 1, 2, ... the 2^k groups of indices after cuts along axes 1 to k, the two sides of a part beside
            each other; empty for an axis that has no variance.
        cross: ⟨unit even-half gradient of i, unit odd-half gradient of j⟩ (T, T), scaled so that its expectation is C's
            without sampling noise; from it comes ``signal``.

    Source: paper Prop. F.10, F.11, Remark F.13.
    """
    cosine = np.asarray(cosine, dtype=np.float64)
    centred = doubly_centred(cosine)
    count = len(centred)
    values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    order = np.argsort(-values, kind="stable")[: min(len(splits), count - 1)]
    halves = count / (count - 1) * float(np.trace(centred)) if count > 1 else float("nan")
    agreed = None if cross is None else doubly_centred((cross + cross.T) / 2)
    found = []
    for place, (k, groups) in enumerate(zip(order, splits, strict=False), start=1):
        value, vector = float(max(values[k], 0.0)), vectors[:, k]
        cuts = [_cut_gain(cosine, *groups[i : i + 2]) for i in range(0, len(groups), 2)]
        gain, random = sum(cut[0] for cut in cuts), sum(cut[1] for cut in cuts)
        sign_gain = value * float(np.abs(vector).sum()) ** 2
        signal = None if agreed is None or value == 0 else float(vector @ agreed @ vector) / value
        ratio, sign_ratio = gain / random if random > 0 else 0.0, sign_gain / halves if halves > 0 else 0.0
        found.append(Concentration(place, gain, random, ratio, sign_gain, halves, sign_ratio, signal))
    return found


def _cut_gain(cosine: np.ndarray, lower: Sequence[int], upper: Sequence[int]) -> tuple[float, float]:
    """Gain sᵀMs of one part's cut, and its mean over random cuts into sides of these sizes."""
    part, size = [*lower, *upper], len(lower) + len(upper)
    centred = doubly_centred(cosine[np.ix_(part, part)])
    s = np.repeat([-1.0, 1.0], [len(lower), len(upper)])
    return float(s @ centred @ s), 4 * len(lower) * len(upper) / (size * (size - 1)) * float(np.trace(centred))


def norm_concentration(norms: np.ndarray) -> dict[str, float]:
    """How alike gradient norms are: the closer, the nearer cosine PCA is to raw-gradient PCA.

    Returns:
        mean, sd (with T − 1), max_over_min, and cv, cv_trimmed_5, cv_trimmed_10: sd / mean of all norms, and after
        taking off the given percentage of datasets (rounded down) at each end.

    Source: paper Theorem F.4 and Appendix B.
    """
    ordered = np.sort(np.asarray(norms, dtype=np.float64))

    def variation(share: float) -> float:
        cut = int(len(ordered) * share)
        kept = ordered[cut : len(ordered) - cut]
        return float(kept.std(ddof=1) / kept.mean()) if len(kept) > 1 else float("nan")

    return {
        "mean": float(ordered.mean()),
        "sd": float(ordered.std(ddof=1)) if len(ordered) > 1 else float("nan"),
        "max_over_min": float(ordered[-1] / ordered[0]),
        "cv": variation(0.0),
        "cv_trimmed_5": variation(0.05),
        "cv_trimmed_10": variation(0.10),
    }


def suggest_axes(concentration: Sequence[Concentration], datasets: int) -> tuple[int, str]:
    """A suggested r, and why, in words.

    An axis counts when its balanced cut gains at least a tenth more than random cuts into sides of the same sizes and, where
    measured, at least half of its variance is signal that two half-samples agree on. r is the number of leading axes that
    count, at most 3 (the paper's largest) and so many that the 2^r groups hold two datasets or more on average; at least 1.
    """
    room = max(1, int(np.log2(max(2, datasets // 2))))
    limit = min(PAPER_AXES, room)
    passed, why = 0, ""
    for item in concentration:
        if item.ratio < _LEAST_RATIO:
            why = (
                f"on axis {item.axis} the balanced cut has no room to beat random cuts of the same sizes "
                f"(ratio {item.ratio:.2f}, needs {_LEAST_RATIO})"
            )
            break
        if item.signal is not None and item.signal < 0.5:
            why = f"axis {item.axis} is mostly sampling noise ({item.signal:.0%} agreed between half-samples)"
            break
        passed += 1
        if passed == limit:
            why = (
                f"{datasets} datasets fill no more than {2**limit} groups"
                if limit == room < PAPER_AXES
                else "the paper tried no more than three axes"
            )
            break
    if not passed:
        return 1, f"r = 1, but without promise: {why or 'there are too few datasets to tell'}."
    factors = ", ".join(f"{item.ratio:.1f}" for item in concentration[:passed])
    ending = f"; it stops there because {why}" if why else ""
    who = "the first axis beats" if passed == 1 else f"the first {passed} axes beat"
    by = "a factor of" if passed == 1 else "factors of"
    measure = "in squared distance between the sides' mean unit gradients"
    return passed, f"r = {passed} ({2**passed} groups): {who} random balanced cuts by {by} {factors} {measure}{ending}."
