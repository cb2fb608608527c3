"""K-means on unit-length gradients: the paper's clustering baseline, without any balance between groups (paper §5)."""

from __future__ import annotations

import numpy as np

from merit.split.view import Groups, MixtureView


def split(view: MixtureView, axes: int, seed: int) -> Groups:
    """2^axes clusters, best of 20 seeded starts, ordered by their first dataset's name.

    The rows of U Λ^(1/2), from the eigendecomposition C = U Λ Uᵀ, have the unit gradients' mutual distances, so
    clustering them is clustering the gradients. Small negative eigenvalues (sketch noise) are set to 0.
    """
    from sklearn.cluster import KMeans  # noqa: PLC0415  (over a second, which every command would start later)

    assert view.cosine is not None
    values, vectors = np.linalg.eigh((view.cosine + view.cosine.T) / 2)
    points = vectors * np.sqrt(np.clip(values, 0.0, None))
    labels = KMeans(n_clusters=2**axes, n_init=20, random_state=seed).fit(points).labels_
    groups = [np.flatnonzero(labels == label).tolist() for label in range(2**axes)]
    while not all(groups):  # fewer distinct gradients than clusters: give an empty cluster one dataset of the largest
        largest = max(groups, key=len)
        groups[groups.index([])] = [largest.pop()]
    return sorted(groups)
