"""How sure a split is: the same split on resampled geometries, and how often every dataset lands in its group.

Pure NumPy on half-sample inner products. It knows no split method (one is handed in) and runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merit.conflict.geometry import cosine_matrix
from merit.errors import ConflictError

__all__ = ["SplitStability", "resampled_grams", "split_stability"]

Splitter = Callable[[np.ndarray, np.ndarray], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class SplitStability:
    """Result of :func:`split_stability`.

    Attributes:
        probability: Per dataset, the share of replicates in which it lands in its group.
        together: (T, T), the share of replicates in which two datasets share a group; rows in the order of ``names``.
        replicates: How many geometries were drawn.
    """

    probability: dict[str, float]
    together: np.ndarray
    replicates: int

    @property
    def mean(self) -> float:
        """Mean of the probabilities."""
        return float(np.mean(list(self.probability.values())))


def resampled_grams(arrays: Mapping[str, np.ndarray], replicates: int, seed: int) -> list[np.ndarray]:
    """Gram matrices (T, T) as other calibration samples of the same sizes would have given.

    Replicate gradients are g* = g + ε c (S_e/a − S_o/b), one ε = ±1 per dataset, with c² = (q − Q) / (q_e + q_o): then
    g* varies about g as g does about the gradient of all rows (half-sample replication). A sample of all rows does not
    vary. g already holds one such error, so replicates are noisier than the truth by one share, and probabilities from
    them err low.

    Args:
        arrays: What ``geometry.npz`` holds.
        replicates: Number of matrices.
        seed: Of the ε.

    Raises:
        ConflictError: A dataset has one calibration example out of more rows: nothing tells its noise.

    Source: McCarthy 1969 (balanced half-samples); Wolter, Introduction to Variance Estimation, 2007, ch. 3.
    """
    a, names = arrays["share_even"], arrays["names"]
    b = 1.0 - a
    left = np.maximum(arrays["q"] - arrays["q_all"], 0.0)
    left = np.where(left <= 1e-12 * arrays["q"], 0.0, left)
    lone = (left > 0) & ((a <= 0) | (b <= 0))
    if lone.any():
        raise ConflictError(
            f"conflict: {names[int(lone.argmax())]} has a single calibration example, so its sampling noise is unknown.",
            "Set conflict.examples to 2 or more.",
        )
    spread = np.sqrt(np.where(left > 0, left / (arrays["q_even"] + arrays["q_odd"]), 0.0))
    with np.errstate(divide="ignore"):
        to_even, to_odd = np.where(spread > 0, spread / a, 0.0), np.where(spread > 0, spread / b, 0.0)
    size, half = len(names), np.asarray(arrays["half_gram"], dtype=np.float64)
    generator = np.random.Generator(np.random.PCG64(seed))
    grams = []
    for _ in range(replicates):
        sign = generator.choice([-1.0, 1.0], size)
        weights = np.concatenate([1.0 + sign * to_even, 1.0 - sign * to_odd])
        weighted = half * np.outer(weights, weights)
        grams.append(weighted[:size, :size] + weighted[size:, size:] + weighted[:size, size:] + weighted[size:, :size])
    return grams


def split_stability(
    arrays: Mapping[str, np.ndarray], split: Splitter, *, replicates: int = 100, seed: int = 0
) -> SplitStability:
    """Probability of every dataset to land in its group, over calibration samples that might have been drawn.

    A replicate's groups are matched to the split's own by the assignment that shares most datasets, since the order of
    groups and the sign of axes carry no meaning.

    Args:
        arrays: What ``geometry.npz`` holds (:func:`merit.conflict.stage.measure_conflict`).
        split: ``split(cosine, gram)``, both (T, T) in the order of ``arrays["names"]``, returns groups of dataset names.
        replicates: Resampled geometries.
        seed: Of the resampling.

    Raises:
        ConflictError: Some dataset's noise is unknown.
    """
    from scipy.optimize import linear_sum_assignment

    names = [str(name) for name in arrays["names"]]
    place = {name: i for i, name in enumerate(names)}

    def labels(gram: np.ndarray, cosine: np.ndarray) -> np.ndarray:
        found = np.full(len(names), -1)
        for k, group in enumerate(split(cosine, gram)):
            found[[place[name] for name in group]] = k
        return found

    own = labels(arrays["gram"], arrays["cosine"])
    groups = int(own.max()) + 1
    same, together = np.zeros(len(names)), np.zeros((len(names), len(names)))
    for gram in resampled_grams(arrays, replicates, seed):
        other = labels(gram, cosine_matrix(gram))
        overlap = np.zeros((groups, int(other.max()) + 1))
        np.add.at(overlap, (own, other), 1)
        rows, columns = linear_sum_assignment(-overlap)
        matched = dict(zip(columns.tolist(), rows.tolist(), strict=True))
        same += np.array([matched.get(int(k), -1) for k in other]) == own
        together += other[:, None] == other[None, :]
    return SplitStability(
        dict(zip(names, (same / replicates).tolist(), strict=True)), together / replicates, replicates
    )
