"""Geometry of the datasets' gradients: Gram, cosines, principal components, and whether PCA has room to beat chance.

Pure NumPy in float64; rows are datasets. It knows no models, no files and no sampling noise
(:mod:`merit.conflict.reliability` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

__all__ = [
    "Concentration",
    "PrincipalComponents",
    "cosine_matrix",
    "doubly_centred",
    "gram_matrix",
    "norm_concentration",
    "principal_components",
    "spectral_concentration",
    "suggest_axes",
]

Centring = Literal["columns", "double"]


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
    from scipy.linalg.blas import dsyrk, ssyrk

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


def cosine_matrix(gram: np.ndarray) -> np.ndarray:
    """C_ij = G_ij / √(G_ii G_jj), (T, T), with an exact unit diagonal. Source: paper §4 step 2."""
    norms = np.sqrt(np.diag(gram))
    cosine = gram / np.outer(norms, norms)
    np.fill_diagonal(cosine, 1.0)
    return cosine


def doubly_centred(matrix: np.ndarray) -> np.ndarray:
    """J A J with J = I − 11ᵀ/T: rows and columns of a symmetric matrix centred."""
    return matrix - matrix.mean(axis=0)[None, :] - matrix.mean(axis=1)[:, None] + matrix.mean()


@dataclass(frozen=True)
class PrincipalComponents:
    """Result of :func:`principal_components`.

    Attributes:
        scores: (T, R): coordinates of every dataset on the leading axes.
        explained_variance: (R,): share of the centred matrix's variance on each axis; in [0, 1], descending.
        axes: (T, R): unit right singular vectors.
    """

    scores: np.ndarray
    explained_variance: np.ndarray
    axes: np.ndarray


def principal_components(matrix: np.ndarray, components: int, centring: Centring = "columns") -> PrincipalComponents:
    """PCA of a symmetric (T, T) matrix whose rows are observations.

    The sign of an axis is chosen so that its score of largest magnitude is positive (the first such in row order); scores of
    axes without variance are exactly zero.

    Args:
        matrix: Cosines (the paper's choice) or a Gram matrix (its raw-gradient PCA).
        components: Axes wanted; at most T − 1 come back.
        centring: ``columns`` as in the paper's method; ``double`` as in its curvature study.

    Source: paper §4 step 3, Appendix F.3.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    centred = doubly_centred(matrix) if centring == "double" else matrix - matrix.mean(axis=0)
    left, singular, right = np.linalg.svd(centred, full_matrices=False)
    count = max(0, min(components, len(matrix) - 1))
    variance = singular**2
    total = float(variance.sum())
    empty = singular <= np.finfo(np.float64).eps * len(matrix) * max(float(np.abs(matrix).max(initial=0.0)), 1e-300)
    singular = np.where(empty, 0.0, singular)
    scores = left[:, :count] * singular[:count]
    axes = right[:count].T
    if count:
        flip = np.where(scores[np.abs(scores).argmax(axis=0), np.arange(count)] < 0, -1.0, 1.0)
        scores, axes = scores * flip, axes * flip
    shares = np.where(empty, 0.0, variance)[:count] / total if total > 0 else np.zeros(count)
    return PrincipalComponents(scores, shares, axes)


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
        signal: Share of μ_k that the two half-samples agree on; NaN where it was not measured.
    """

    axis: int
    gain: float
    random: float
    ratio: float
    sign_cut_gain: float
    sign_cut_random: float
    sign_cut_ratio: float
    signal: float


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
        signal = float("nan") if agreed is None or value == 0 else float(vector @ agreed @ vector) / value
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
        if item.signal < 0.5:
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
