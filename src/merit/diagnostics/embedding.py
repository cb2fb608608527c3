"""The datasets' gradients on a map, by t-SNE and by PCA, and whether the split's groups lie together. Source: Appendix B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from merit.diagnostics.lab import Lab
from merit.diagnostics.result import Diagnosis, Verdict, graded

__all__ = ["Embedding", "measure", "silhouette", "tsne"]

READY, DOUBTFUL = 0.05, 0.25
"""Share of random groupings of the same sizes whose silhouette is at least as large."""
PERMUTATIONS = 500


@dataclass(frozen=True)
class Embedding(Diagnosis):
    """Two maps.

    Attributes:
        datasets: Names.
        groups: Number of every dataset's group; −1 where it is in none.
        pca: (T, 2) scores on the first two axes of the column-centred cosines, which the split cuts.
        tsne: (T, 2) t-SNE of the distances 1 − cos; no unit.
        silhouette: Mean silhouette of the groups in these distances, −1 to 1; None with fewer than two groups.
        p: Share of random groupings with at least this silhouette.
        explained: Share of variance on the two axes.
    """

    name: ClassVar[str] = "embedding"
    title: ClassVar[str] = "map of the datasets' gradients"
    rule: ClassVar[str] = (
        f"share of random groupings of the same sizes with at least the groups' silhouette: ready up to {READY:.0%}, "
        f"doubtful up to {DOUBTFUL:.0%}"
    )
    units: ClassVar[dict[str, str]] = {"explained": "share of variance", "p": "probability"}

    datasets: tuple[str, ...]
    groups: tuple[int, ...]
    pca: tuple[tuple[float, float], ...]
    tsne: tuple[tuple[float, float], ...]
    silhouette: float | None
    p: float | None
    explained: tuple[float, float]


def silhouette(distances: np.ndarray, groups: np.ndarray, seed: int) -> tuple[float, float] | None:
    """Mean silhouette of a grouping (T,) in distances (T, T), and its share of random groupings at least as good.

    None where there are not at least two groups, and more datasets than groups.

    Source: Rousseeuw, "Silhouettes", Journal of Computational and Applied Mathematics 20 (1987), 53-65.
    """
    kinds = len(np.unique(groups))
    if not 2 <= kinds < len(groups):
        return None
    value = float(silhouette_score(distances, groups, metric="precomputed"))
    rng = np.random.default_rng([seed, len(groups)])
    others = [silhouette_score(distances, rng.permutation(groups), metric="precomputed") for _ in range(PERMUTATIONS)]
    return value, float((1 + sum(other >= value - 1e-12 for other in others)) / (1 + PERMUTATIONS))


def measure(lab: Lab) -> Embedding:
    """From the geometry of the gradients and the split."""
    geometry, arrays = lab.geometry, lab.geometry.arrays
    owner = {name: k for k, group in enumerate(lab.subject.groups) for name in group}
    groups = np.array([owner.get(name, -1) for name in geometry.names])
    distances = np.maximum(0.0, 1.0 - arrays.cosine)
    np.fill_diagonal(distances, 0.0)
    found = silhouette(distances, groups, lab.subject.seed)
    plane = np.zeros((len(groups), 2))
    plane[:, : arrays.scores.shape[1]] = arrays.scores[:, :2]
    explained = [*map(float, arrays.explained_variance[:2]), 0.0, 0.0][:2]
    map_ = tsne(distances, lab.subject.seed)
    verdict: Verdict
    if found is None:
        verdict, reason = "doubtful", "there are not two groups to tell apart"
    else:
        verdict = graded(found[1], READY, DOUBTFUL)
        reason = f"silhouette of the groups {found[0]:+.3f}; {found[1]:.1%} of random groupings are at least as good"
    return Embedding(
        verdict,
        reason,
        datasets=geometry.names,
        groups=tuple(map(int, groups)),
        pca=tuple((float(x), float(y)) for x, y in plane),
        tsne=tuple((float(x), float(y)) for x, y in map_),
        silhouette=found[0] if found else None,
        p=found[1] if found else None,
        explained=(explained[0], explained[1]),
    )


def tsne(distances: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE by scikit-learn; few datasets need a perplexity below their number."""
    count = len(distances)
    if count < 4:
        return np.zeros((count, 2))
    perplexity = min(30.0, (count - 1) / 3)
    maker = TSNE(2, metric="precomputed", init="random", perplexity=perplexity, random_state=seed, n_jobs=1)
    found: np.ndarray = maker.fit_transform(distances)
    return found
