"""The split stage: runs the chosen method, and makes notes about its groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merit.errors import RecipeError
from merit.progress import count
from merit.split import conflict_induced, joint, kmeans, pca, random, raw_pca
from merit.split.balance import bisect, tied
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
SCORES: Mapping[str, Callable[[MixtureView, int], np.ndarray]] = {"pca": pca.scores, "raw_pca": raw_pca.scores}
"""Methods that cut along scores, in which there can be ties."""
FIRM = 0.9
"""Minimum share of resampled geometries for a dataset's group to count as stable."""


def split_mixture(
    method: str,
    axes: int = 2,
    *,
    weights: Mapping[str, float],
    geometry: GradientGeometry | None = None,
    balance: str = "samples",
    cosine: str = "plain",
    seed: int = 0,
) -> Split:
    """Cut the mixture into K = 2^axes groups (1 for joint).

    The result depends on names, weights, geometry and seed, but not on the order of the datasets or the sign of any
    principal axis. Duplicates are cut as one dataset, as long as there are enough others to fill the groups.

    Args:
        method: A key of ``METHODS``.
        axes: Number of conflict axes r, at least 1.
        weights: Positive weight per dataset name: sample counts s_t or target tokens n_t.
        geometry: The datasets' measured gradients; needed unless the method is random or joint. Datasets missing from
            it are left out of the split.
        balance: What the weights are; recorded only.
        cosine: ``plain``, or ``corrected`` for the noise in the norms.
        seed: For random and kmeans, and for the resampling behind ``stability``.

    Raises:
        RecipeError: Fewer datasets than groups, or a method without its geometry.
        ConflictError: The geometry is not finite.

    Source: paper §4 steps 3-4 (pca, raw_pca), §5 and A.1.3 (the others).
    """
    measured = geometry if needs_conflict(method) else None
    cutter = _Cutter.of(method, axes, seed, weights, measured, cosine)
    if measured is None:
        groups, ties, stability = cutter.cut(None, None), list[str](), None
    else:
        groups, ties = cutter.cut(measured.cosine, measured.gram), cutter.ties(measured.cosine, measured.gram)
        replicates = 100 if len(cutter.names) <= 200 else 20
        shares = split_stability(measured, cutter.cut, replicates, seed).probability.tolist()
        unknown = set(measured.unknown)
        stability = {
            name: None if name in unknown else share for name, share in zip(measured.names, shares, strict=True)
        }
    named = [sorted(cutter.names[i] for i in group) for group in groups]
    totals = [float(sum(weights[name] for name in group)) for group in named]
    return Split(
        method=method,
        axes=0 if method == "joint" else axes,
        balance=balance,
        groups=named,
        weights=totals,
        left_out=sorted(set(weights) - set(cutter.names)),
        warnings=[*cutter.warnings, *_tie_warning(ties), *_imbalance(weights, cutter.names, totals, balance)],
        stability=stability,
        open=sorted(name for name, share in (stability or {}).items() if share is None or share < FIRM or name in ties),
    )


@dataclass(frozen=True)
class _Cutter:
    """A method ready to cut matrices in the geometry's order; places are in ``names``.

    Attributes:
        names: Datasets in the geometry's order.
        units: What is cut: places of one dataset, or of duplicates, in the order of their first names.
        inflation: (T,) factors of the cosines; 1 for plain ones.
        warnings: Warnings from before the split.
    """

    method: str
    axes: int
    seed: int
    names: tuple[str, ...]
    units: list[list[int]]
    weights: np.ndarray
    inflation: np.ndarray
    warnings: list[str]

    @classmethod
    def of(
        cls,
        method: str,
        axes: int,
        seed: int,
        weights: Mapping[str, float],
        geometry: GradientGeometry | None,
        cosine: str,
    ) -> _Cutter:
        names = tuple(sorted(weights)) if geometry is None else tuple(geometry.names)
        _refuse_too_few(len(names), method, axes)
        place = {name: i for i, name in enumerate(names)}
        twins = {name: group for group in (geometry.duplicates if geometry else ()) for name in group}
        units = sorted({tuple(twins.get(name, (name,))) for name in names})
        warnings = [f"{', '.join(unit)} are duplicates: they are cut as one." for unit in units if len(unit) > 1]
        if len(units) < 2**axes:
            warnings = ["duplicates are cut apart, by name: without them there are fewer datasets than groups."]
            units = [(name,) for name in sorted(names)]
        plain = geometry is None or cosine == "plain"
        return cls(
            method=method,
            axes=axes,
            seed=seed,
            names=names,
            units=[[place[name] for name in unit] for unit in units],
            weights=np.array([sum(weights[name] for name in unit) for unit in units], dtype=np.float64),
            inflation=np.ones(len(names)) if plain or geometry is None else geometry.inflation,
            warnings=warnings,
        )

    def view(self, cosine: np.ndarray | None, gram: np.ndarray | None) -> MixtureView:
        """What the method sees; duplicates are represented by their first."""
        names = tuple(self.names[unit[0]] for unit in self.units)
        firsts = [unit[0] for unit in self.units]
        grid = np.ix_(firsts, firsts)
        if cosine is not None:
            cosine = (cosine * np.outer(self.inflation, self.inflation))[grid]
            np.fill_diagonal(cosine, 1.0)
        view = MixtureView(names, self.weights, cosine, None if gram is None else gram[grid])
        view.check(self.method)
        return view

    def cut(self, cosine: np.ndarray | None, gram: np.ndarray | None) -> Groups:
        """Groups of places."""
        groups = METHODS[self.method](self.view(cosine, gram), self.axes, self.seed)
        places = [[place for unit in group for place in self.units[unit]] for group in groups]
        assert sorted(i for group in places for i in group) == list(range(len(self.names))), (
            "a dataset was lost or repeated"
        )
        return places

    def ties(self, cosine: np.ndarray, gram: np.ndarray) -> list[str]:
        """Datasets whose side was decided only by their name."""
        scores = SCORES.get(self.method)
        if scores is None:
            return []
        view = self.view(cosine, gram)
        along = scores(view, self.axes)
        return [view.names[i] for i in tied(along, bisect(along, view.weights, view.names))]


def _tie_warning(ties: list[str]) -> list[str]:
    if not ties:
        return []
    more = f" and {len(ties) - 3} more" if len(ties) > 3 else ""
    return [f"{', '.join(ties[:3])}{more} have equal scores at a cut: their names decided, not their gradients."]


def _refuse_too_few(datasets: int, method: str, axes: int) -> None:
    group_count = 1 if method == "joint" else 2**axes
    if datasets < group_count:
        raise RecipeError(
            f"split: {count(datasets, 'dataset')} cannot fill {group_count} groups (split.axes {axes} makes 2^{axes}).",
            f"Datasets are never split. Use split.axes <= {int(np.log2(max(1, datasets)))}"
            f"{' (or split.method: joint)' if datasets < 2 else ''}, or add datasets.",
        )


def _imbalance(weights: Mapping[str, float], names: Sequence[str], totals: list[float], balance: str) -> list[str]:
    total = sum(totals)
    largest = max(sorted(names), key=lambda name: weights[name])
    if weights[largest] > total / 2:
        return [
            f"{largest} alone has {weights[largest] / total:.0%} of the mixture's {balance}; datasets are never split, so "
            "the groups cannot be balanced. A budget (mixture.samples or tokens) would fix this."
        ]
    if max(totals) > 1.5 * min(totals):
        return [
            f"the groups are uneven: the largest has {max(totals) / min(totals):.1f} times the {balance} of the smallest, "
            "because datasets are never split."
        ]
    return []
