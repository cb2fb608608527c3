"""How stable a split is: the same split on resampled geometries, and how often every dataset lands in its group.

Pure NumPy; the split method is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from merit.split.components import cosine_matrix
from merit.split.view import GradientGeometry, Groups

Splitter = Callable[[np.ndarray, np.ndarray], Groups]
"""From cosines and inner products (T, T) to groups of indices into them."""


@dataclass(frozen=True)
class SplitStability:
    """Result of :func:`split_stability`.

    Attributes:
        probability: (T,) the share of replicates in which a dataset lands in its group.
        together: (T, T) the share of replicates in which two datasets share a group.
        replicates: How many geometries were drawn.
    """

    probability: np.ndarray
    together: np.ndarray
    replicates: int

    @property
    def mean(self) -> float:
        """Mean of the probabilities."""
        return float(self.probability.mean())


def split_stability(
    geometry: GradientGeometry, split: Splitter, replicates: int = 100, seed: int = 0
) -> SplitStability:
    """Probability of every dataset to land in its group, over calibration samples that might have been drawn.

    A replicate's groups are matched to the split's own by the assignment that shares most datasets, since the order of
    groups and the sign of axes carry no meaning.

    Args:
        geometry: Measured gradients; row i of every result is its dataset i.
        split: The split, as a function of the geometry.
        replicates: Resampled geometries.
        seed: Of the resampling.
    """
    size = len(geometry.names)
    own = _labels(split(geometry.cosine, geometry.gram), size)
    groups = int(own.max()) + 1
    same, together = np.zeros(size), np.zeros((size, size))
    for gram in geometry.resampled(replicates, seed):
        other = _labels(split(cosine_matrix(gram), gram), size)
        overlap = np.zeros((groups, int(other.max()) + 1))
        np.add.at(overlap, (own, other), 1)
        rows, columns = linear_sum_assignment(-overlap)
        matched = dict(zip(columns.tolist(), rows.tolist(), strict=True))
        same += np.array([matched.get(int(k), -1) for k in other]) == own
        together += other[:, None] == other[None, :]
    return SplitStability(same / replicates, together / replicates, replicates)


def _labels(groups: Iterable[Iterable[int]], size: int) -> np.ndarray:
    labels = np.full(size, -1)
    for k, group in enumerate(groups):
        labels[list(group)] = k
    return labels
