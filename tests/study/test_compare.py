"""Statistics over seeds, against enumeration, scipy and simulation; and figures read off at equal learning."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from merit.evaluation.statistics import holm
from merit.study.compare import at_learned, compare_methods, equal_learning, wilcoxon
from merit.study.figures import Line, Point, Run


def by_enumeration(gains: list[float]) -> float:
    """P(W+ >= observed) over all signs, ranks of |gains|."""
    values = np.asarray([gain for gain in gains if gain])
    ranks = stats.rankdata(np.abs(values))
    observed = ranks[values > 0].sum()
    signs = itertools.product([0, 1], repeat=len(values))
    return float(np.mean([np.dot(sign, ranks) >= observed - 1e-9 for sign in signs]))


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=8))
def test_wilcoxon_is_exact_also_with_ties_and_zeros(gains: list[int]) -> None:
    values = [gain / 8 for gain in gains]
    expected = by_enumeration(values) if any(values) else 1.0
    assert wilcoxon(values) == pytest.approx(expected, abs=1e-9)


def test_five_seeds_that_all_gain_give_the_papers_p() -> None:
    assert wilcoxon([0.1, 0.2, 0.3, 0.15, 0.05]) == 1 / 32
    assert wilcoxon([-0.1, -0.2, -0.3, -0.15, -0.05]) == 1.0


def test_many_seeds_agree_with_scipy() -> None:
    gains = np.random.default_rng(0).normal(0.2, 1, 60)
    assert wilcoxon(gains.tolist()) == pytest.approx(stats.wilcoxon(gains, alternative="greater").pvalue)


def test_without_a_difference_five_in_a_hundred_are_called_at_most() -> None:
    rng = np.random.default_rng(1)
    called = [wilcoxon(rng.standard_t(3, 6).tolist()) <= 0.05 for _ in range(1000)]
    assert np.mean(called) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)


# ---- at equal learning ----------------------------------------------------------------------------------------------


def line(*points: tuple[float, float, float]) -> Line:
    return Line(tuple(Point(scale, {"mixture": learned, "kept": kept}) for scale, learned, kept in points), 1.0)


def test_between_two_points_losses_are_interpolated() -> None:
    found = at_learned(line((0, 4.0, 1.0), (0.5, 3.0, 1.2), (1, 2.0, 2.0)), 2.5)
    assert found == pytest.approx({"mixture": 2.5, "kept": 1.6})


def test_the_first_crossing_counts_and_an_unreached_loss_has_none() -> None:
    there_and_back = line((0, 4.0, 1.0), (1, 2.0, 2.0), (1.5, 3.5, 4.0))
    assert at_learned(there_and_back, 3.0) == pytest.approx({"mixture": 3.0, "kept": 1.5})
    assert at_learned(there_and_back, 1.9) is None
    assert at_learned(there_and_back, 4.5) is None


@given(st.floats(0.01, 0.99), st.permutations(range(5)))
def test_on_a_straight_line_any_grid_gives_the_same(share: float, order: list[int]) -> None:
    points = [(scale / 4, 4 - scale / 2, 1 + scale**2) for scale in order]
    points = [(scale, learned, 1 + scale) for scale, learned, _ in points]
    found = at_learned(line(*points), 4 - 2 * share)
    assert found is not None
    assert found["kept"] == pytest.approx(1 + share)


def run(method: str, seed: int, learned: float, kept: float) -> Run:
    return Run(method, seed, {"learned": learned, "kept": kept}, 100, 200, 1.0, line((0, 4, 1), (1, learned, kept)))


def test_every_method_is_read_off_where_the_own_one_ends() -> None:
    runs = [run("joint", 0, 2.0, 3.0), run("own", 0, 3.0, 1.5), run("weak", 0, 3.5, 1.1)]
    found = equal_learning(runs, "own")
    assert found["own", 0]["kept"] == pytest.approx(1.5)
    assert found["joint", 0]["kept"] == pytest.approx(2.0)
    assert ("weak", 0) not in found


def test_the_own_line_reaches_its_own_end_whatever_rounding_the_saved_model_has() -> None:
    """The line's last point is above what the saved model measures, by less than its weights' rounding."""
    own = replace(run("own", 0, 3.0, 1.5), values={"learned": 3.0 - 1e-7, "kept": 1.5})
    found = equal_learning([own, run("joint", 0, 2.0, 3.0)], "own")
    assert found["own", 0]["kept"] == pytest.approx(1.5)
    assert found["joint", 0]["kept"] == pytest.approx(2.0)


def test_differences_are_paired_by_seed_and_corrected_together() -> None:
    rng = np.random.default_rng(0)
    runs = [run("base", 0, 4, 1)]
    for seed in range(6):
        level = rng.normal(2, 0.5)
        runs += [run("joint", seed, level, 3.0), run("own", seed, level + 0.1, 2.0), run("x", seed, level - 0.01, 3.1)]
    found = compare_methods(runs, "joint", "own")
    at_end = {(item.method, item.column): item for item in found if item.place == "end"}
    assert set(at_end) == {("own", "learned"), ("own", "kept"), ("x", "learned"), ("x", "kept")}
    assert at_end["own", "learned"].mean == pytest.approx(0.1)
    assert (at_end["own", "learned"].wins, at_end["own", "learned"].losses) == (0, 6)
    assert at_end["own", "kept"].p == 1 / 64
    assert [item.p_holm for item in at_end.values()] == holm([item.p for item in at_end.values()])
    low, high = at_end["x", "learned"].ci95 or (0, 0)
    assert low == pytest.approx(-0.01)
    assert high == pytest.approx(-0.01)
    equal = {(item.method, item.column) for item in found if item.place == "equal"}
    assert equal == {("own", "kept"), ("x", "kept")}


def test_a_seed_without_the_baseline_is_not_paired() -> None:
    runs = [run("joint", 0, 2, 3), run("own", 0, 3, 2), run("own", 1, 3, 2)]
    assert {item.seeds for item in compare_methods(runs, "joint", "own")} == {1}
