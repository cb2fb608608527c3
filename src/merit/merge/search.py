"""The search of merge weights: coefficients c_k = λ w_k ≥ 0 of θ0 + Σ c_k δ_k, low ≤ Σ c_k ≤ high. Pure: no model, no files.

In the c_k, a loss that is quadratic in the weights is a quadratic, and simplex and range of λ are linear constraints. So
after some seeded points anywhere, SciPy's COBYQA goes on from the best: a trust-region method that fits a quadratic to the
points it has, without derivatives, and takes a bound on what is lost as a constraint.

Source: Ragonneau, Model-based derivative-free optimization methods and software, PhD thesis 2022 (COBYQA); the knee as the
point farthest from the chord: Satopää et al., Finding a "kneedle" in a haystack, ICDCS workshops 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, NonlinearConstraint, minimize

from merit.errors import MergeError
from merit.merge.searched import DIGITS, Ratio, WeightPoint, WeightSearch, weights_of
from merit.merge.weights import Losses
from merit.recipe.merge import SearchSettings

__all__ = ["Objective", "RowLosses", "implied_ratios", "rival_points", "search_weights"]

Coefficients = tuple[float, ...]
_FIRST_RADIUS, _LAST_RADIUS = 0.2, 1e-3  # of the trust region, in coefficients
_RESAMPLES = 1000


@dataclass(frozen=True)
class Objective:
    """What is minimised, and what must hold, as functions of a point's losses.

    Attributes:
        settings: Objective and bound.
        base: Losses at θ0.
        plain: Losses of the token-weighted merge at λ = 1.
    """

    settings: SearchSettings
    base: Losses
    plain: Losses

    def value(self, point: Losses) -> float:
        """To be minimised. knee: learned + kept loss, each in units of the chord from the base to the plain merge."""
        if self.settings.objective != "knee":
            return point.learned
        learned, kept = self.base.learned - self.plain.learned, self.plain.kept - self.base.kept
        unit = learned if learned > 0 else 1.0  # nothing learned: nats
        return (point.learned - self.base.learned) / unit + (point.kept - self.base.kept) / (kept if kept > 0 else unit)

    @property
    def limit(self) -> float:
        """Highest kept loss (or drift) allowed; infinite for the knee."""
        if self.settings.objective == "knee":
            return math.inf
        return self.base.kept + self.settings.bound

    def best(self, points: Sequence[WeightPoint]) -> WeightPoint:
        """The point with the smallest value among those within limit and range; the earliest among equals.

        Raises:
            MergeError: There is none.
        """
        low, high = self.settings.scale_range
        within = [p for p in points if p.kept <= self.limit and low <= p.scale <= high]
        if not within:
            raise MergeError(
                f"merge.search: no point with λ from {low:g} to {high:g} costs at most bound {self.settings.bound:g}.",
                "Raise merge.search.bound, or let merge.search.scale_range begin at 0 (the base).",
            )
        return min(within, key=self.value)


def search_weights(
    losses: Callable[[Coefficients], Losses],
    start: Sequence[float],
    settings: SearchSettings,
    seed: int,
    names: Sequence[str] = (),
) -> WeightSearch:
    """Search.

    The order of the points depends on the arguments and the losses alone, so a search whose losses are remembered goes on
    where it stopped.

    Args:
        losses: (c_1 ... c_K) → losses of θ0 + Σ c_k δ_k; called once per point.
        start: w_k by tokens, Σ w_k = 1.
        settings: Objective, bound, range of λ, number of points.
        seed: Of the first points.
        names: The branches'.

    Raises:
        MergeError: A loss is not finite, or no point is within the bound.
    """
    search = _Search(losses, settings.scale_range, settings.points(len(start)))
    base, plain = search.measure(np.zeros(len(start))), search.measure(np.asarray(start))
    objective = Objective(settings, base, plain)
    for point in _first_points(start, settings.scale_range, search.left // 3, seed):
        search.at(point)
    if search.left > 0 and (len(start) > 1 or settings.scale_range[0] < settings.scale_range[1]):
        _descend(search, objective, _begin(search.points, objective))
    return WeightSearch(
        objective=settings.objective,
        bound=settings.bound,
        scale_range=settings.scale_range,
        seed=seed,
        branches=tuple(names),
        start=tuple(float(w) for w in start),
        chosen=objective.best(search.points),
        points=tuple(search.points),
    )


class _Exhausted(Exception):
    """Every point that may be measured has been."""


class _Search:
    """Points measured so far, each once."""

    def __init__(
        self, losses: Callable[[Coefficients], Losses], scale_range: tuple[float, float], evaluations: int
    ) -> None:
        self._losses, self._range, self._evaluations = losses, scale_range, evaluations
        self._known: dict[Coefficients, WeightPoint] = {}

    @property
    def points(self) -> list[WeightPoint]:
        return list(self._known.values())

    @property
    def left(self) -> int:
        return self._evaluations - len(self._known)

    def at(self, x: np.ndarray) -> WeightPoint:
        """The losses at the nearest point of the simplex's range.

        Raises:
            _Exhausted: It is a new point, and there are no evaluations left.
        """
        return self.measure(_into_range(x, self._range))

    def measure(self, x: np.ndarray) -> WeightPoint:
        point = tuple(round(max(0.0, float(c)), DIGITS) for c in x)
        if point not in self._known:
            if self.left <= 0:
                raise _Exhausted
            found = self._losses(point)
            if not (math.isfinite(found.learned) and math.isfinite(found.kept)):
                raise MergeError(
                    f"The loss at coefficients {list(point)} is not finite ({found.learned}, {found.kept})."
                )
            self._known[point] = WeightPoint(found.learned, found.kept, point)
        return self._known[point]


def _into_range(x: np.ndarray, scale_range: tuple[float, float]) -> np.ndarray:
    """x ≥ 0, scaled so that its sum lies in the range, after rounding too."""
    x, (low, high) = np.round(np.maximum(x, 0.0), DIGITS), scale_range
    total = x.sum()
    if low <= round(total, DIGITS) <= high:
        return x
    wanted = min(max(total, low), high)
    x = np.round(x * wanted / total if total > 0 else np.full(len(x), wanted / len(x)), DIGITS)
    x[np.argmax(x)] += wanted - x.sum()  # what rounding lost
    return x


def _first_points(start: Sequence[float], scale_range: tuple[float, float], count: int, seed: int) -> list[np.ndarray]:
    """Half the token-weighted merge, the uniform average, and points anywhere: w uniform on the simplex, λ in range."""
    rng, branches = np.random.default_rng(seed), len(start)
    points = [np.asarray(start) / 2, np.full(branches, 1 / branches)]
    while len(points) < count:
        points.append(rng.dirichlet(np.ones(branches)) * rng.uniform(*scale_range))
    return points[: max(0, count)]


def _begin(points: Sequence[WeightPoint], objective: Objective) -> np.ndarray:
    low, high = objective.settings.scale_range
    within = [p for p in points if low <= p.scale <= high and p.kept <= objective.limit]
    chosen = objective.best(points) if within else min(points, key=lambda p: p.kept)
    return np.array(chosen.coefficients)


def _descend(search: _Search, objective: Objective, begin: np.ndarray) -> None:
    """COBYQA from a point until the evaluations are used up or it has converged; then again, with what is left."""
    low, high = objective.settings.scale_range
    constraints: list[LinearConstraint | NonlinearConstraint] = [LinearConstraint(np.ones(len(begin)), low, high)]
    if math.isfinite(objective.limit):
        constraints.append(NonlinearConstraint(lambda x: search.at(x).kept, -np.inf, objective.limit))
    radius = _FIRST_RADIUS
    while search.left > 0 and radius > _LAST_RADIUS:
        try:
            minimize(
                lambda x: objective.value(search.at(x)),
                begin,
                method="COBYQA",
                bounds=Bounds(np.zeros(len(begin)), np.full(len(begin), high)),
                constraints=constraints,
                options={
                    "initial_tr_radius": radius,
                    "final_tr_radius": _LAST_RADIUS,
                    "maxfev": 50 * search.left + 100,
                },
            )
        except _Exhausted:
            return
        begin, radius = _begin(search.points, objective), radius / 4


# ---- which mixture the weights stand for ----------------------------------------------------------------------------


@dataclass(frozen=True)
class RowLosses:
    """Summed losses of rows at several points.

    Attributes:
        sums: (P, N) nats.
        counts: (N,) tokens.
        owners: (N,) number of the row's dataset.
    """

    sums: np.ndarray
    counts: np.ndarray
    owners: np.ndarray

    def means(self, draws: np.ndarray) -> np.ndarray:
        """Mean over datasets of the loss per token, for draws (B, N) of how often each row counts: (B, P)."""
        parts = []
        for dataset in np.unique(self.owners):
            mine = self.owners == dataset
            tokens = draws[:, mine] @ self.counts[mine]
            parts.append(draws[:, mine] @ self.sums[:, mine].T / tokens[:, None])
        return np.asarray(np.mean(parts, axis=0))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Rows drawn with replacement within each dataset, as often as it has rows: (RESAMPLES, N)."""
        draws = np.zeros((_RESAMPLES, len(self.counts)))
        for dataset in np.unique(self.owners):
            mine = np.flatnonzero(self.owners == dataset)
            draws[:, mine] = rng.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), size=_RESAMPLES)
        return draws


def rival_points(
    points: Sequence[WeightPoint], chosen: WeightPoint, objective: Objective, count: int
) -> list[WeightPoint]:
    """Points that other rows might choose: base, plain merge, the chosen one, then far-apart ones of the better half.

    Args:
        points: All measured points; the first two are base and plain merge.
        chosen: The chosen one.
        objective: Orders them.
        count: How many at most, the first three included.
    """
    rivals = list(dict.fromkeys([points[0], points[1], chosen]))
    low, high = objective.settings.scale_range
    rest = sorted((p for p in points if p not in rivals and low <= p.scale <= high), key=objective.value)
    rest = rest[: max(count, len(rest) // 2)]
    while rest and len(rivals) < count:
        distances = [min(math.dist(p.coefficients, q.coefficients) for q in rivals[2:] or rivals) for p in rest]
        rivals.append(rest.pop(int(np.argmax(distances))))
    return rivals


def implied_ratios(
    search: WeightSearch,
    groups: Sequence[Mapping[str, int]],
    rivals: Sequence[WeightPoint],
    learned: RowLosses,
    kept: RowLosses,
    settings: SearchSettings,
) -> tuple[Ratio, ...]:
    """The mixture that the chosen weights stand for, and how far other rows would have moved it.

    Rows are drawn with replacement within each dataset, and each time the best of ``rivals`` is chosen anew; the interval is
    that of the chosen weights. It holds the branches fixed: their training is not repeated.

    Args:
        search: The search.
        groups: Tokens by dataset of every branch.
        rivals: Base, plain merge and others, in the order of the losses.
        learned, kept: Losses of the reporting rows at the rivals.
        settings: The objective.

    Source: the percentile bootstrap, Efron & Tibshirani, An introduction to the bootstrap, 1993, §13.
    """
    rng = np.random.default_rng(search.seed)
    kept_means, learned_means = (part.means(part.draw(rng)) for part in (kept, learned))
    drawn = []
    for low, high in zip(learned_means, kept_means, strict=True):
        points = [WeightPoint(a, b, p.coefficients) for a, b, p in zip(low, high, rivals, strict=True)]
        objective = Objective(settings, points[0], points[1])
        try:
            drawn.append(weights_of(objective.best(points).coefficients, search.start))
        except MergeError:  # these rows allow none of them
            continue
    chosen, total = search.weights, sum(sum(group.values()) for group in groups)
    bounds = np.quantile(np.array(drawn or [chosen]), [0.025, 0.975], axis=0)
    ratios = []
    for k, group in enumerate(groups):
        mine = sum(group.values())
        for name, tokens in group.items():
            part = tokens / mine
            interval = (float(bounds[0, k] * part), float(bounds[1, k] * part))
            ratios.append(Ratio(name, search.branches[k], tokens / total, chosen[k] * part, *interval))
    return tuple(ratios)
