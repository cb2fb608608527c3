"""The search of merge weights on models whose losses are known in closed form."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.optimize import minimize

from merit.errors import MergeError
from merit.merge.curve import weights_svg
from merit.merge.search import (
    Objective,
    RowLosses,
    implied_ratios,
    rival_points,
    search_weights,
)
from merit.merge.searched import WeightPoint, WeightSearch, weights_of
from merit.merge.weights import Branch, Losses
from merit.recipe.merge import SearchSettings


class Quadratic:
    """θ0 = 0, branches δ_k in R^30, learned loss ½(θ − θ*)ᵀH(θ − θ*), kept loss ½ θᵀQθ; θ* is in the branches' span."""

    def __init__(self, branches: int, seed: int, scale: float = 0.8) -> None:
        rng = np.random.default_rng(seed)
        self.best = scale * rng.dirichlet(np.ones(branches))
        self.deltas = rng.normal(size=(branches, 30))
        a, b = rng.normal(size=(2, 30, 30))
        self.h, self.q = a @ a.T / 30 + 0.1 * np.eye(30), 0.3 * b @ b.T / 30
        self.asked: list[tuple[float, ...]] = []

    def learned(self, c) -> float:
        d = (np.asarray(c) - self.best) @ self.deltas
        return float(0.5 * d @ self.h @ d)

    def kept(self, c) -> float:
        d = np.asarray(c) @ self.deltas
        return float(0.5 * d @ self.q @ d)

    def __call__(self, c) -> Losses:
        self.asked.append(c)
        return Losses(1 + self.learned(c), 2 + self.kept(c))


@pytest.mark.parametrize("branches", [1, 2, 4, 8])
def test_a_planted_optimum_is_recovered(branches):
    model = Quadratic(branches, branches)
    settings = SearchSettings(objective="learned_under_drift", bound=100.0)
    found = search_weights(model, [1 / branches] * branches, settings, seed=3)
    np.testing.assert_allclose(found.chosen.coefficients, model.best, atol=2e-3)
    assert found.chosen.learned - 1 < 1e-5 * model.learned(np.zeros(branches))
    assert found.scale == pytest.approx(0.8, abs=5e-3)
    assert found.weights == pytest.approx(model.best / 0.8, abs=5e-3)
    assert len(model.asked) == len(set(model.asked)) == len(found.points) <= settings.points(branches)


@pytest.mark.parametrize("branches", [2, 4])
def test_a_binding_bound_is_kept_and_used(branches):
    model = Quadratic(branches, 10 + branches)
    bound = 0.3 * model.kept(model.best)
    settings = SearchSettings(objective="learned_under_kept", bound=bound)
    found = search_weights(model, [1 / branches] * branches, settings, seed=0)
    reference = minimize(  # the same problem by another method, with the functions themselves
        model.learned,
        np.full(branches, 0.1),
        method="SLSQP",
        bounds=[(0, None)] * branches,
        constraints={"type": "ineq", "fun": lambda c: bound - model.kept(c)},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.chosen.kept <= 2 + bound
    gain = model.learned(np.zeros(branches)) - reference.fun
    assert found.chosen.learned - 1 - reference.fun < 0.01 * gain


def test_the_knee_is_the_point_farthest_below_the_chord():
    model, start = Quadratic(2, 5, scale=1.0), [0.5, 0.5]
    found = search_weights(model, start, SearchSettings(), seed=0)
    base, plain = np.array([model.learned([0, 0]), 0.0]), np.array([model.learned(start), model.kept(start)])
    unit = np.array([base[0] - plain[0], plain[1]])

    def below(c) -> float:
        """Distance below the line from base to plain merge, both axes scaled to its ends."""
        x, y = (np.array([model.learned(c), model.kept(c)]) - [plain[0], 0]) / unit
        return (1 - x - y) / math.sqrt(2)

    grid = [(a, b) for a in np.linspace(0, 1.5, 61) for b in np.linspace(0, 1.5, 61) if a + b <= 1.5]
    assert below(found.chosen.coefficients) > max(map(below, grid)) - 1e-3


@pytest.mark.parametrize("scale_range", [(0.0, 1.5), (0.4, 0.6), (1.0, 1.0)])
def test_scales_stay_in_their_range(scale_range):
    model = Quadratic(3, 1)
    settings = SearchSettings(objective="learned_under_drift", bound=100.0, scale_range=scale_range)
    found = search_weights(model, [0.2, 0.3, 0.5], settings, seed=0)
    low, high = scale_range
    assert all(low <= p.scale <= high for p in found.points[2:])  # the first two are the base and the plain merge
    assert low <= found.scale <= high
    assert [p.coefficients for p in found.points[:2]] == [(0, 0, 0), (0.2, 0.3, 0.5)]
    assert sum(found.weights) == pytest.approx(1)


def test_the_same_losses_give_the_same_points_and_the_budget_is_kept():
    first, second = Quadratic(3, 2), Quadratic(3, 2)
    settings = SearchSettings(evaluations=30)
    one = search_weights(first, [0.2, 0.3, 0.5], settings, seed=1)
    assert one == search_weights(second, [0.2, 0.3, 0.5], settings, seed=1)
    assert first.asked == second.asked
    assert len(first.asked) == 30
    other = search_weights(Quadratic(3, 2), [0.2, 0.3, 0.5], settings, seed=2)
    assert other.points != one.points


@pytest.mark.parametrize(
    ("coefficients", "scale_range", "said"),
    [
        ((0.6, 0.6), (0.0, 1.5), []),
        ((0.8, 0.69), (0.0, 1.5), ["the end of its range of λ (1.5)"]),
        ((0.002, 0.003), (0.0, 1.5), ["low end of its range of λ (0)"]),
        ((0.0, 0.0), (0.0, 1.5), ["low end of its range of λ (0)"]),
        ((0.02, 0.98), (0.0, 1.5), ["branch 1 has 0.98 of the weight"]),
        ((1.5, 0.0), (0.0, 1.5), ["the end of its range of λ (1.5)", "branch 0 has 1.00 of the weight"]),
        ((0.5, 0.5), (1.0, 1.0), []),
        ((1.0,), (0.0, 1.5), []),
    ],
)
def test_an_end_of_the_range_and_a_branch_alone_are_warned_of(coefficients, scale_range, said):
    count, point = len(coefficients), WeightPoint(1.0, 1.0, coefficients)
    names = tuple(f"branch {k}" for k in range(count))
    search = WeightSearch("knee", 0.05, scale_range, 0, names, (1 / count,) * count, point, (point,))
    assert len(search.warnings) == len(said)
    assert all(words in text for words, text in zip(said, search.warnings, strict=True))


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(MergeError, match="not finite"):
        search_weights(lambda c: Losses(math.nan, 0.0), [1.0], SearchSettings(), seed=0)
    tight = SearchSettings(objective="learned_under_kept", bound=0.0, scale_range=(0.5, 1.5))
    with pytest.raises(MergeError, match=r"merge\.search\.bound"):
        search_weights(Quadratic(2, 0), [0.5, 0.5], tight, seed=0)
    with pytest.raises(ValueError, match="scale_range"):
        SearchSettings(scale_range=(1.0, 0.5))


def test_the_chosen_coefficients_are_merged_exactly(tmp_path):
    point = WeightPoint(1.0, 1.0, (0.123457, 0.0, 0.4))
    search = WeightSearch("knee", 0.05, (0.0, 1.5), 0, ("a", "b", "c"), (0.2, 0.3, 0.5), point, (point,))
    branches = search.weigh([Branch(tmp_path / n, 1, n) for n in "abc"])
    assert search.scale == 0.523457
    assert [b.weight for b in branches] == [0.123457, 0.0, 0.4]
    assert search.weights == pytest.approx((0.123457 / 0.523457, 0, 0.4 / 0.523457))
    nothing = WeightSearch("knee", 0.05, (0.0, 1.5), 0, ("a",), (1.0,), WeightPoint(1.0, 1.0, (0.0,)), ())
    assert (nothing.scale, nothing.weights) == (0.0, (1.0,))
    assert nothing.weigh([Branch(tmp_path, 1, "a")])[0].weight == 1.0


# ---- ratios


def losses_of_rows(points, datasets, rows, seed):
    """Row losses that are the planted quadratic of their dataset plus noise that all points share in part."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(datasets), rows)
    best = rng.dirichlet(np.ones(2), size=datasets)
    noise = rng.normal(size=(len(owners), 2)) * 0.3
    counts = rng.integers(1, 9, len(owners))
    per_token = np.array(
        [[((np.array(p) - best[o] - noise[i]) ** 2).sum() for i, o in enumerate(owners)] for p in points]
    )
    return RowLosses(per_token * counts, counts, owners)


def test_means_weigh_tokens_within_and_datasets_between():
    found = RowLosses(np.array([[1.0, 6.0, 8.0]]), np.array([1, 2, 4]), np.array([0, 0, 1]))
    assert found.means(np.ones((1, 3))) == pytest.approx((7 / 3 + 2) / 2)
    assert found.means(np.array([[2.0, 0.0, 1.0]])) == pytest.approx((1 + 2) / 2)


def test_ratios_are_those_of_the_weights_and_their_intervals_shrink_with_rows():
    points = [WeightPoint(0, 0, p) for p in [(0.0, 0.0), (0.5, 0.5)]]
    points += [WeightPoint(0, 0, (w, 1 - w)) for w in np.linspace(0.05, 0.95, 19).round(2)]
    chosen = points[8]
    search = WeightSearch("learned_under_kept", 9.0, (0.0, 1.5), 0, ("one", "two"), (0.5, 0.5), chosen, tuple(points))
    settings = SearchSettings(objective="learned_under_kept", bound=9.0)
    groups = [{"a": 30, "b": 10}, {"c": 60}]
    widths = []
    for rows in (6, 200):
        learned = losses_of_rows([p.coefficients for p in points], 3, rows, 1)
        ratios = implied_ratios(search, groups, points, learned, learned, settings)
        assert [(r.dataset, r.branch) for r in ratios] == [("a", "one"), ("b", "one"), ("c", "two")]
        assert [r.share for r in ratios] == [0.3, 0.1, 0.6]
        w = weights_of(chosen.coefficients, ())
        assert [r.implied for r in ratios] == pytest.approx([w[0] * 0.75, w[0] * 0.25, w[1]])
        assert all(0 <= r.low <= r.high <= 1 for r in ratios)
        widths.append(ratios[2].high - ratios[2].low)
    assert widths[1] < 0.5 * widths[0]


def test_rivals_contain_the_anchors_and_differ_from_each_other():
    model = Quadratic(3, 4)
    found = search_weights(model, [0.2, 0.3, 0.5], SearchSettings(), seed=0)
    objective = Objective(SearchSettings(), found.points[0], found.points[1])
    rivals = rival_points(found.points, found.chosen, objective, 12)
    assert rivals[:2] == list(found.points[:2])
    assert found.chosen in rivals
    assert len(set(rivals)) == len(rivals) == 12


def test_every_point_is_drawn_and_three_are_named():
    model = Quadratic(3, 4)
    found = search_weights(model, [0.2, 0.3, 0.5], SearchSettings(), seed=0)
    root = ElementTree.fromstring(weights_svg(found))
    space = "{http://www.w3.org/2000/svg}"
    circles = root.findall(f"{space}circle")
    assert len(circles) == len(found.points)
    assert all(70 <= float(c.get("cx")) <= 540 and 40 <= float(c.get("cy")) <= 345 for c in circles)
    texts = [text.text for text in root.findall(f"{space}text")]
    assert "base" in texts
    assert "by tokens" in texts
    assert any(text.startswith("chosen: λ = ") for text in texts)
