"""Gram, cosines, principal components, the spectral test and the suggestion, against straightforward references."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merit.conflict.assemble import successive_splits
from merit.conflict.geometry import (
    Concentration,
    gram_matrix,
    norm_concentration,
    spectral_concentration,
    suggest_axes,
)
from merit.split.components import cosine_matrix, doubly_centred, principal_components


def random_cosine(count: int, seed: int, width: int = 40) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, width)) + 0.3
    return cosine_matrix(rows @ rows.T)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gram_in_blocks_equals_the_product(dtype, monkeypatch):
    monkeypatch.setattr("merit.conflict.geometry._BLOCK_BYTES", 7 * 8 * 300)
    rows = np.random.default_rng(0).normal(size=(7, 1000)).astype(np.float32)
    expected = rows.astype(np.float64) @ rows.astype(np.float64).T
    found = gram_matrix(list(rows), dtype)
    np.testing.assert_allclose(found, expected, atol=1e-11 if dtype is np.float64 else 1e-3)
    assert np.array_equal(found, found.T)


def test_cosine_has_unit_diagonal_and_ignores_length():
    rows = np.random.default_rng(1).normal(size=(5, 20))
    stretched = rows * np.array([1e-3, 1, 10, 1e4, 7])[:, None]
    np.testing.assert_allclose(cosine_matrix(stretched @ stretched.T), cosine_matrix(rows @ rows.T), atol=1e-13)
    assert np.array_equal(np.diag(cosine_matrix(rows @ rows.T)), np.ones(5))


@pytest.mark.parametrize("centring", ["columns", "double"])
def test_components_equal_an_eigendecomposition(centring):
    cosine = random_cosine(12, 0)
    found = principal_components(cosine, 4, centring)
    j = np.eye(12) - 1 / 12
    centred = j @ cosine @ (j if centring == "double" else np.eye(12))
    values, vectors = np.linalg.eigh(centred.T @ centred)
    order = np.argsort(-values)[:4]
    np.testing.assert_allclose(found.explained_variance, values[order] / values.sum(), atol=1e-12)
    expected = centred @ vectors[:, order]
    np.testing.assert_allclose(np.abs(found.scores), np.abs(expected), atol=1e-9)
    assert (found.scores[np.abs(found.scores).argmax(axis=0), range(4)] > 0).all()
    np.testing.assert_allclose(found.scores.sum(axis=0), 0, atol=1e-12)


def test_cosine_components_are_those_of_unit_gradients():
    """Doubly centred cosine PCA = PCA of the unit-normalised gradients (paper Theorem F.4)."""
    rows = np.random.default_rng(3).normal(size=(9, 30))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    _, singular, _ = np.linalg.svd(unit - unit.mean(axis=0))
    found = principal_components(cosine_matrix(rows @ rows.T), 3, "double")
    np.testing.assert_allclose(found.explained_variance, (singular**4 / (singular**4).sum())[:3], atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 15), st.integers(0, 1000), st.randoms())
def test_scores_do_not_depend_on_the_order_of_datasets(count, seed, random):
    cosine = random_cosine(count, seed)
    order = list(range(count))
    random.shuffle(order)
    one, two = principal_components(cosine, 3), principal_components(cosine[np.ix_(order, order)], 3)
    for axis in range(one.scores.shape[1]):
        a, b = one.scores[order, axis], two.scores[:, axis]
        assert min(np.abs(a - b).max(), np.abs(a + b).max()) < 1e-7


def test_axes_without_variance_score_zero():
    found = principal_components(np.ones((4, 4)), 3)
    assert np.array_equal(found.scores, np.zeros((4, 3)))
    assert np.array_equal(found.explained_variance, np.zeros(3))
    two_kinds = np.array([[1, 1, -1, -1]]).T @ np.array([[1, 1, -1, -1.0]])
    found = principal_components(two_kinds, 3)
    assert found.explained_variance[0] == pytest.approx(1.0)
    assert np.array_equal(found.scores[:, 1:], np.zeros((4, 2)))


def test_no_more_components_than_datasets_allow():
    assert principal_components(np.eye(3), 6).scores.shape == (3, 2)
    assert principal_components(np.ones((1, 1)), 6).scores.shape == (1, 0)


def planted(count: int, seed: int, *directions, noise: float = 0.05) -> np.ndarray:
    """Cosines of gradients with a shared part, planted ±1 patterns (each in a dimension of its own) and noise."""
    rows = np.zeros((count, 30))
    rows[:, 0] = 1.0
    for place, pattern in enumerate(directions, start=1):
        rows[:, place] = pattern
    rows += noise * np.random.default_rng(seed).normal(size=rows.shape)
    return cosine_matrix(rows @ rows.T)


def measured_cuts(cosine, weights=None, axes=3):
    count = len(cosine)
    names = [f"d{i:02}" for i in range(count)]
    splits = successive_splits(principal_components(cosine, axes).scores, weights or [1] * count, names)
    return splits, spectral_concentration(cosine, splits)


def gain_of(cosine, chosen, count):
    """Gain sᵀMs for the side ``chosen``, from the definition."""
    s = -np.ones(count)
    s[list(chosen)] = 1
    j = np.eye(count) - 1 / count
    return s @ j @ cosine @ j @ s


@pytest.mark.parametrize("upper", [4, 3, 1])
def test_random_term_is_the_mean_over_all_cuts_of_these_sizes(upper):
    """Prop. F.10 and its generalisation to unequal sides, by enumeration."""
    cosine = random_cosine(8, 4)
    side = list(range(8 - upper)), list(range(8 - upper, 8))
    found = spectral_concentration(cosine, [side])[0]
    every = [gain_of(cosine, chosen, 8) for chosen in combinations(range(8), upper)]
    assert found.random == pytest.approx(np.mean(every))
    assert found.gain == pytest.approx(gain_of(cosine, side[1], 8))
    assert found.sign_cut_random == pytest.approx(np.mean([gain_of(cosine, c, 8) for c in combinations(range(8), 4)]))


def test_the_second_axis_is_judged_inside_the_parts_of_the_first():
    cosine = random_cosine(8, 5)
    first, second = [[0, 3, 5, 6], [1, 2, 4, 7]], [[0, 3], [5, 6], [1, 7, 2], [4]]
    found = spectral_concentration(cosine, [first, second])[1]
    gain = random = 0.0
    for part, chosen in (([0, 3, 5, 6], (2, 3)), ([1, 7, 2, 4], (3,))):
        inner = cosine[np.ix_(part, part)]
        gain += gain_of(inner, chosen, 4)
        random += np.mean([gain_of(inner, c, 4) for c in combinations(range(4), len(chosen))])
    assert found.gain == pytest.approx(gain)
    assert found.random == pytest.approx(random)


def test_sign_cut_gain_bounds_what_the_sign_split_achieves():
    """Prop. F.11: for s = sign(v₁), sᵀMs ≥ μ₁‖v₁‖₁²."""
    for seed in range(10):
        cosine = random_cosine(10, seed)
        centred = doubly_centred(cosine)
        _, vectors = np.linalg.eigh(centred)
        s = np.sign(vectors[:, -1])
        assert s @ centred @ s >= measured_cuts(cosine)[1][0].sign_cut_gain - 1e-9


def test_one_dataset_against_all_others_is_no_room_for_a_balanced_cut():
    """The sign cut isolates the one; cuts into equal halves can hardly differ."""
    rows = 0.01 * np.random.default_rng(0).normal(size=(8, 50))
    rows[:, 0] += 1.0
    rows[0, 0] -= 2.0
    cosine = cosine_matrix(rows @ rows.T)
    splits, found = measured_cuts(cosine)
    assert [len(side) for side in splits[0]] == [4, 4]
    every = [gain_of(cosine, chosen, 8) for chosen in combinations(range(8), 4)]
    assert max(every) / np.mean(every) < 1.01
    assert found[0].ratio == pytest.approx(1.0, abs=0.01)
    assert found[0].sign_cut_ratio > 3
    suggested, why = suggest_axes(found, 8)
    assert suggested == 1
    assert "without promise" in why
    assert "no room" in why
    assert " beats " not in why


@pytest.mark.parametrize("seed", range(5))
def test_planted_balanced_directions_are_found_and_counted(seed):
    rng = np.random.default_rng(seed)
    corners = rng.permutation([[a, b] for a in (1.0, -1.0) for b in (0.6, -0.6) for _ in range(4)])
    splits, found = measured_cuts(planted(16, seed, *corners.T))
    assert {frozenset(g) for g in splits[1]} == {
        frozenset(np.flatnonzero((corners == corner).all(axis=1))) for corner in np.unique(corners, axis=0)
    }
    assert found[0].ratio > 5
    assert found[1].ratio > 5
    assert suggest_axes(found[:2], 16)[0] == 2


def test_heavy_datasets_move_the_cut_and_chance_is_of_the_same_sizes():
    pattern = [1.0] * 2 + [-1.0] * 6
    splits, found = measured_cuts(planted(8, 1, pattern), weights=[3, 3, 1, 1, 1, 1, 1, 1])
    assert sorted(map(len, splits[0])) == [2, 6]
    cosine = planted(8, 1, pattern)
    assert found[0].random == pytest.approx(np.mean([gain_of(cosine, c, 8) for c in combinations(range(8), 2)]))
    assert found[0].ratio > 3


def test_rank_one_conflict_has_room_and_isotropic_conflict_has_none():
    side = np.array([1.0, -1.0] * 6)
    _, found = measured_cuts(np.outer(side, side))
    assert found[0].ratio == pytest.approx(11.0), "T − 1 for rank-one conflicts (Cor. F.12)"
    assert found[0].sign_cut_ratio == pytest.approx(11.0)
    assert found[1].ratio == 0.0, "an axis without variance cuts nothing"
    assert suggest_axes(found, 12)[0] == 1
    _, isotropic = measured_cuts(np.eye(12))
    assert all(item.ratio <= 1 + 1e-9 for item in isotropic), "no split beats chance on isotropic conflicts"
    assert all(item.sign_cut_ratio <= 1 + 1e-9 for item in isotropic)


def test_too_few_datasets_make_no_cut():
    assert measured_cuts(np.ones((1, 1)))[1] == []
    assert len(measured_cuts(random_cosine(3, 0))[1]) == 1


def test_signal_is_the_share_that_halves_agree_on():
    side = np.array([1.0, -1.0] * 6)
    cosine = 0.5 * np.outer(side, side) + 0.5 * np.eye(12)
    splits, _ = measured_cuts(cosine)
    found = spectral_concentration(cosine, splits, cross=0.5 * np.outer(side, side))
    assert found[0].signal == pytest.approx(0.5 * 12 / (0.5 * 12 + 0.5))
    assert found[1].signal == pytest.approx(0.0, abs=1e-9)


def concentration(*pairs):
    return [
        Concentration(k, ratio, 1.0, ratio, 9.0, 1.0, 9.0, signal) for k, (ratio, signal) in enumerate(pairs, start=1)
    ]


@pytest.mark.parametrize(
    ("pairs", "datasets", "axes", "words"),
    [
        ([(3, 0.9), (2, 0.8), (1.5, 0.7), (1.2, 0.9)], 60, 3, "no more than three"),
        ([(3, 0.9), (2, 0.2), (1.5, 0.7)], 60, 1, "sampling noise"),
        ([(3, 0.9), (2, 0.9), (0.7, 0.7)], 60, 2, "random cuts"),
        ([(0.9, 0.9)], 60, 1, "without promise"),
        ([(3, 0.9), (2, 0.9), (2, 0.9)], 8, 2, "fill no more than 4 groups"),
        ([(3, None), (0.5, None)], 60, 1, "random cuts"),
        ([(1.05, 0.9)], 60, 1, "no room"),
        (
            [(3.14, 0.9), (0.7, 0.9)],
            60,
            1,
            "the first axis beats random balanced cuts by a factor of 3.1 in squared distance",
        ),
        (
            [(3.14, 0.9), (2, 0.9), (0.7, 0.9)],
            60,
            2,
            "the first 2 axes beat random balanced cuts by factors of 3.1, 2.0 in squared",
        ),
        ([], 1, 1, "without promise"),
    ],
)
def test_suggestion_says_why(pairs, datasets, axes, words):
    suggested, why = suggest_axes(concentration(*pairs), datasets)
    assert suggested == axes
    assert words in why


def test_norm_concentration_trims_both_ends():
    norms = np.array([0.01, *np.full(18, 2.0), 50.0])
    found = norm_concentration(norms)
    assert found["cv"] == pytest.approx(norms.std(ddof=1) / norms.mean())
    assert found["cv_trimmed_5"] == 0.0
    assert found["max_over_min"] == pytest.approx(5000)
