"""Splitting the mixture into K groups: a registry of methods, one pure file each.

A method takes a :class:`MixtureView` (arrays, sorted by dataset name) and returns groups of indices. This package reads no
files and no gradients; it neither trains nor judges the split. To add a method: one file with ``split(view, ...)``, one
line in ``METHODS``, one test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merit.errors import RecipeError
from merit.split import conflict_induced, joint, kmeans, pca, random, raw_pca
from merit.split.view import Groups, MixtureView

__all__ = ["METHODS", "MixtureView", "Split", "needs_conflict", "split_mixture"]

METHODS: Mapping[str, Callable[[MixtureView, int, int], Groups]] = {
    "pca": pca.split,
    "raw_pca": raw_pca.split,
    "random": random.split,
    "kmeans": kmeans.split,
    "conflict_induced": conflict_induced.split,
    "joint": joint.split,
}


def needs_conflict(method: str) -> bool:
    """Whether a method reads the gradients' geometry (random and joint do not)."""
    return method not in ("random", "joint")


@dataclass(frozen=True)
class Split:
    """A split and what is to be said about it.

    Attributes:
        method: Its name in ``METHODS``.
        axes: r; the method made 2^r groups (1 for joint).
        balance: What ``weights`` counted: samples or tokens.
        groups: Dataset names per group, sorted within each group.
        weights: Total weight per group.
        warnings: Plain sentences: imbalance, a dominating dataset, ties at a median.
    """

    method: str
    axes: int
    balance: str
    groups: list[list[str]]
    weights: list[float]
    warnings: list[str]


def split_mixture(
    method: str,
    axes: int,
    *,
    names: Sequence[str],
    weights: Sequence[float] | np.ndarray,
    balance: str = "samples",
    cosine: np.ndarray | None = None,
    gram: np.ndarray | None = None,
    seed: int = 0,
) -> Split:
    """Cut the mixture into K = 2^axes groups (1 for joint).

    The answer depends on names, weights, geometry and seed; not on the order of the datasets nor on the sign of any
    principal axis.

    Args:
        method: A key of ``METHODS``.
        axes: Number of conflict axes r, at least 1.
        names: Dataset names (T,), all different.
        weights: Positive weights (T,): sample counts s_t or target tokens n_t.
        balance: What the weights are; recorded only.
        cosine: Cosines of the datasets' gradients (T, T); needed unless the method is random or joint.
        gram: Inner products of the datasets' gradients (T, T); needed by raw_pca.
        seed: For random and kmeans.

    Raises:
        RecipeError: Fewer datasets than groups, or a method without its geometry.

    Source: paper §4 steps 3-4 (pca, raw_pca), §5 and A.1.3 (the others).
    """
    group_count = 1 if method == "joint" else 2**axes
    if len(names) < group_count:
        raise RecipeError(
            f"split: {len(names)} datasets cannot fill {group_count} groups (split.axes {axes} makes 2^{axes}).",
            f"Datasets are never cut. Use split.axes <= {int(np.log2(max(1, len(names))))}"
            f"{' (or split.method: joint)' if len(names) < 2 else ''}, or add datasets.",
        )
    order = sorted(range(len(names)), key=lambda i: names[i])
    grid = np.ix_(order, order)
    view = MixtureView(
        names=tuple(names[i] for i in order),
        weights=np.asarray(weights, dtype=np.float64)[order],
        cosine=None if cosine is None else np.asarray(cosine, dtype=np.float64)[grid],
        gram=None if gram is None else np.asarray(gram, dtype=np.float64)[grid],
    )
    view.check(method, needs_conflict(method))
    groups = METHODS[method](view, axes, seed)
    assert sorted(i for group in groups for i in group) == list(range(len(names))), (
        "a method lost or repeated a dataset"
    )
    assert len(groups) == group_count
    assert all(groups), "a method left a group empty"
    totals = [float(view.weights[group].sum()) for group in groups]
    return Split(
        method=method,
        axes=0 if method == "joint" else axes,
        balance=balance,
        groups=[[view.names[i] for i in sorted(group)] for group in groups],
        weights=totals,
        warnings=_warnings(view, groups, totals, balance),
    )


def _warnings(view: MixtureView, groups: Groups, totals: Sequence[float], balance: str) -> list[str]:
    if len(groups) == 1:
        return []
    found = []
    total = float(view.weights.sum())
    largest = int(view.weights.argmax())
    if view.weights[largest] > total / 2:
        found.append(
            f"{view.names[largest]} alone holds {view.weights[largest] / total:.0%} of the mixture's {balance}; "
            "datasets are never cut, so the groups cannot be balanced. A budget (mixture.samples or tokens) evens it out."
        )
    elif max(totals) > 1.5 * min(totals):
        found.append(
            f"the groups are uneven: the largest holds {max(totals) / min(totals):.1f} times the {balance} of the smallest, "
            "because datasets are never cut."
        )
    return found
