"""The split stage: a method by name, and what is to be said about its groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from merit.errors import ConflictError, RecipeError
from merit.split import conflict_induced, joint, kmeans, pca, random, raw_pca
from merit.split.result import Split
from merit.split.stability import split_stability
from merit.split.view import GradientGeometry, Groups, MixtureView, needs_conflict

METHODS: Mapping[str, Callable[[MixtureView, int, int], Groups]] = {
    "pca": pca.split,
    "raw_pca": raw_pca.split,
    "random": random.split,
    "kmeans": kmeans.split,
    "conflict_induced": conflict_induced.split,
    "joint": joint.split,
}


def split_mixture(
    method: str,
    axes: int = 2,
    *,
    weights: Mapping[str, float],
    geometry: GradientGeometry | None = None,
    balance: str = "samples",
    seed: int = 0,
) -> Split:
    """Cut the mixture into K = 2^axes groups (1 for joint).

    The answer depends on names, weights, geometry and seed; not on the order of the datasets nor on the sign of any
    principal axis.

    Args:
        method: A key of ``METHODS``.
        axes: Number of conflict axes r, at least 1.
        weights: Positive weight per dataset name: sample counts s_t or target tokens n_t.
        geometry: The datasets' measured gradients; needed unless the method is random or joint. Datasets that it does not
            hold are left out of the split.
        balance: What the weights are; recorded only.
        seed: For random and kmeans, and for the resampling behind ``stability``.

    Raises:
        RecipeError: Fewer datasets than groups, or a method without its geometry.
        ConflictError: The geometry is not finite.

    Source: paper §4 steps 3-4 (pca, raw_pca), §5 and A.1.3 (the others).
    """
    measured = geometry if needs_conflict(method) else None
    names = sorted(weights if measured is None else measured.names)
    _refuse_too_few(names, method, axes)
    heavy = np.array([weights[name] for name in names], dtype=np.float64)
    place = {name: i for i, name in enumerate(names if measured is None else measured.names)}
    order = [place[name] for name in names]

    def cut(cosine: np.ndarray | None, gram: np.ndarray | None) -> Groups:
        """Groups of places in ``names``, from matrices in the geometry's order."""
        grid = np.ix_(order, order)
        view = MixtureView(
            tuple(names), heavy, None if cosine is None else cosine[grid], None if gram is None else gram[grid]
        )
        view.check(method)
        return METHODS[method](view, axes, seed)

    groups = cut(None, None) if measured is None else cut(measured.cosine, measured.gram)
    assert sorted(i for group in groups for i in group) == list(range(len(names))), (
        "a method lost or repeated a dataset"
    )
    totals = [float(heavy[group].sum()) for group in groups]
    warnings = _imbalance(names, heavy, totals, balance)
    stability = None
    if measured is not None:
        try:
            found = split_stability(
                measured,
                lambda cosine, gram: [[order[i] for i in group] for group in cut(cosine, gram)],
                replicates=100 if len(names) <= 200 else 20,
                seed=seed,
            )
            stability = dict(zip(measured.names, found.probability.tolist(), strict=True))
        except ConflictError as error:
            warnings.append(f"how stable the split is cannot be said: {error.message}")
    return Split(
        method=method,
        axes=0 if method == "joint" else axes,
        balance=balance,
        groups=[[names[i] for i in sorted(group)] for group in groups],
        weights=totals,
        left_out=sorted(set(weights) - set(names)),
        warnings=warnings,
        stability=stability,
    )


def _refuse_too_few(names: list[str], method: str, axes: int) -> None:
    group_count = 1 if method == "joint" else 2**axes
    if len(names) < group_count:
        raise RecipeError(
            f"split: {len(names)} datasets cannot fill {group_count} groups (split.axes {axes} makes 2^{axes}).",
            f"Datasets are never cut. Use split.axes <= {int(np.log2(max(1, len(names))))}"
            f"{' (or split.method: joint)' if len(names) < 2 else ''}, or add datasets.",
        )


def _imbalance(names: list[str], weights: np.ndarray, totals: list[float], balance: str) -> list[str]:
    total = float(weights.sum())
    largest = int(weights.argmax())
    if weights[largest] > total / 2:
        return [
            f"{names[largest]} alone holds {weights[largest] / total:.0%} of the mixture's {balance}; datasets are never "
            "cut, so the groups cannot be balanced. A budget (mixture.samples or tokens) evens it out."
        ]
    if max(totals) > 1.5 * min(totals):
        return [
            f"the groups are uneven: the largest holds {max(totals) / min(totals):.1f} times the {balance} of the smallest, "
            "because datasets are never cut."
        ]
    return []
