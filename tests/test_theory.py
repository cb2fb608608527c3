"""The propositions over random instances, against the quadratic loss itself: branches are trained, merged and measured."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merit import theory
from merit.split.components import doubly_centred, principal_components

SEEDS = st.integers(0, 2**32 - 1)
CLOSE = {"rel": 1e-10, "abs": 1e-10}


def instance(seed: int, count: int, width: int = 5, *, centred: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Gradients (T, d) and a positive semi-definite H (d, d)."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((width, int(rng.integers(1, width + 1))))
    gradients = rng.standard_normal((count, width)) * rng.uniform(0.1, 3, width)
    return gradients - gradients.mean(axis=0) * centred, root @ root.T


def balanced_splits(count: int) -> list[np.ndarray]:
    """Every split into two halves, as signs."""
    return [
        np.where(np.isin(np.arange(count), (0, *chosen)), 1.0, -1.0)
        for chosen in combinations(range(1, count), count // 2 - 1)
    ]


def gain_by_training(groups: list[np.ndarray], gradients: np.ndarray, hessian: np.ndarray, rate: float) -> float:
    """One step of SGD per group from θ0 = 0, a uniform average, and the losses of both on a quadratic of curvature H."""
    optimum = np.ones(len(hessian))  # any optimum gives the same gain; a near one keeps the differences exact
    branches = [-rate * gradients[group].mean(axis=0) for group in groups]
    losses = [theory.loss(branch, optimum, hessian, 0.7) for branch in branches]
    merged = theory.loss(np.mean(branches, axis=0), optimum, hessian, 0.7)
    return theory.measured_gain(losses, merged, [1] * len(groups))


@given(SEEDS, st.integers(1, 6))
def test_the_merging_gain_is_the_weighted_variance_along_the_curvature(seed: int, count: int) -> None:
    """Theorem 3.1."""
    rng = np.random.default_rng(seed)
    displacements, hessian = instance(seed, count, centred=False)
    start, optimum, weights = rng.standard_normal(5), rng.standard_normal(5), rng.uniform(0.1, 5, count)
    losses = [theory.loss(start + delta, optimum, hessian, -2.0) for delta in displacements]
    merged = theory.loss(start + np.average(displacements, axis=0, weights=weights), optimum, hessian, -2.0)
    predicted = theory.predicted_gain(displacements, hessian, weights.tolist())
    assert theory.measured_gain(losses, merged, weights.tolist()) == pytest.approx(predicted, rel=1e-9, abs=1e-9)
    assert predicted >= -1e-12
    uniform = theory.predicted_gain(displacements, hessian, [1] * count)
    assert theory.pairwise_gain(displacements, hessian) == pytest.approx(uniform, **CLOSE)


@given(SEEDS, st.integers(1, 6))
def test_the_spread_identity_is_exact(seed: int, count: int) -> None:
    displacements, _ = instance(seed, count, centred=False)
    weights = np.random.default_rng(seed).uniform(0.1, 5, count).tolist()
    total, mean, spread = theory.spread_identity(displacements, weights)
    assert total == pytest.approx(mean + spread, rel=1e-10)


@given(SEEDS, st.sampled_from([4, 6, 8]), st.floats(1e-3, 2))
def test_two_groups_gain_what_training_them_gains(seed: int, count: int, rate: float) -> None:
    gradients, hessian = instance(seed, count, centred=False)
    matrix = theory.conflict_matrix(gradients, hessian)
    signs = np.random.default_rng(seed).permutation([1.0] * (count // 2) + [-1.0] * (count // 2))
    trained = gain_by_training([signs > 0, signs < 0], gradients, hessian, rate)
    assert theory.two_group_gain(signs, matrix, rate) == pytest.approx(trained, rel=1e-8, abs=1e-9)


@given(SEEDS, st.sampled_from([1, 2, 3]))
def test_successive_cuts_add(seed: int, axes: int) -> None:
    """Remark F.13: the gain of all groups is the sum over the cuts and their products, so a further cut never loses."""
    gradients, hessian = instance(seed, 8, centred=False)
    order = np.random.default_rng(seed).permutation(8)
    cuts = [np.where((order >> axis) & 1, 1.0, -1.0) for axis in range(axes)]
    matrix = theory.conflict_matrix(gradients, hessian)
    groups = [np.flatnonzero(order % 2**axes == k) for k in range(2**axes)]
    gain = theory.nested_split_gain(cuts, matrix, 0.3)
    assert gain == pytest.approx(gain_by_training(groups, gradients, hessian, 0.3), rel=1e-8, abs=1e-9)
    assert gain >= sum(theory.two_group_gain(cut, matrix, 0.3) for cut in cuts) - 1e-12
    assert gain >= theory.nested_split_gain(cuts[:-1], matrix, 0.3) - 1e-12


@given(SEEDS, st.integers(2, 7))
def test_groups_of_any_size_gain_what_training_them_gains(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    gradients, hessian = instance(seed, count, centred=False)
    sizes, owner = rng.uniform(0.5, 9, count), rng.integers(0, 3, count)
    groups = [np.flatnonzero(owner == k).tolist() for k in range(3) if (owner == k).any()]
    moved = np.array([-0.4 * np.average(gradients[g], axis=0, weights=sizes[g]) for g in groups])
    exact = theory.predicted_gain(moved, hessian, [sizes[g].sum() for g in groups])
    found = theory.group_gain(groups, sizes, theory.conflict_matrix(gradients, hessian), 0.4)
    assert found == pytest.approx(exact, rel=1e-8, abs=1e-10)
    merge = rng.uniform(0.5, 9, count)
    exact = theory.predicted_gain(moved, hessian, [merge[g].sum() for g in groups])
    found = theory.group_gain(groups, sizes, theory.conflict_matrix(gradients, hessian), 0.4, merge)
    assert found == pytest.approx(exact, rel=1e-8, abs=1e-10)


@given(SEEDS, st.sampled_from([2, 4, 6, 8]))
def test_a_random_split_gains_the_mean_over_all_splits(seed: int, count: int) -> None:
    """Proposition F.10, by enumeration; also without its assumption."""
    for centred in (True, False):
        gradients, hessian = instance(seed, count, centred=centred)
        matrix = theory.conflict_matrix(gradients, hessian)
        mean = np.mean([theory.two_group_gain(signs, matrix, 0.5) for signs in balanced_splits(count)])
        assert theory.random_split_gain(matrix, 0.5) == pytest.approx(mean, rel=1e-8, abs=1e-10)
        if centred:
            assert theory.expected_random_gain(matrix, 0.5) == pytest.approx(mean, rel=1e-8, abs=1e-10)


@given(SEEDS, st.sampled_from([4, 6, 8]))
def test_the_pca_split_reaches_its_bound(seed: int, count: int) -> None:
    """Proposition F.11."""
    gradients, hessian = instance(seed, count)
    matrix = theory.conflict_matrix(gradients, hessian)
    signs = theory.pca_signs(matrix)
    bound = theory.pca_gain_bound(matrix, 1.0)
    assert signs @ matrix @ signs / (2 * count**2) >= bound * (1 - 1e-9) - 1e-12
    if signs.sum() == 0:
        assert theory.two_group_gain(signs, matrix, 1.0) >= bound * (1 - 1e-9) - 1e-12
        if theory.pca_beats_random(matrix):
            assert theory.two_group_gain(signs, matrix, 1.0) > theory.expected_random_gain(matrix, 1.0)


@given(SEEDS, st.sampled_from([4, 6, 10]))
def test_conflicts_of_rank_one_gain_at_most_t_minus_one_times_as_much(seed: int, count: int) -> None:
    """Corollary F.12: T − 1 is reached where all conflicts are equally strong; centred conflicts always beat random."""
    rng = np.random.default_rng(seed)
    vector = rng.standard_normal(count)
    vector -= vector.mean()
    matrix = 2.5 * np.outer(vector, vector)
    ratio = theory.pca_gain_bound(matrix, 1.0) / theory.expected_random_gain(matrix, 1.0)
    assert theory.rank_one_ratio(vector) == pytest.approx(ratio, rel=1e-9)
    assert 1 < 2 * (count - 1) / count - 1e-9 <= ratio <= count - 1 + 1e-9
    assert theory.pca_beats_random(matrix)
    equal = rng.permutation([1.0] * (count // 2) + [-1.0] * (count // 2))
    assert theory.rank_one_ratio(equal) == pytest.approx(count - 1)
    best = theory.two_group_gain(equal, np.outer(equal, equal), 1.0)
    random = theory.random_split_gain(np.outer(equal, equal), 1.0)
    assert best / random == pytest.approx(count - 1)


@pytest.mark.parametrize("count", [4, 6, 8])
def test_no_split_beats_random_where_conflicts_are_isotropic(count: int) -> None:
    """Corollary F.12, second part."""
    matrix = 3.0 * (np.eye(count) - 1 / count)
    gains = [theory.two_group_gain(signs, matrix, 0.1) for signs in balanced_splits(count)]
    assert gains == pytest.approx([theory.expected_random_gain(matrix, 0.1)] * len(gains), rel=1e-12)


@given(st.tuples(*[st.floats(0.1, 10)] * 4), st.floats(1e-3, 1))
def test_four_tasks_gain_with_the_cube_of_the_curvature(
    numbers: tuple[float, float, float, float], rate: float
) -> None:
    """The example of F.4, and which split PCA of its gradients picks (Proposition F.6)."""
    one, two, alpha, beta = numbers
    gradients, hessian, splits = theory.four_tasks((one, two), (alpha, beta))
    matrix = theory.conflict_matrix(gradients, hessian)
    gains = {name: theory.two_group_gain(signs, matrix, rate) for name, signs in splits.items()}
    expected = {"first": rate**2 / 2 * one**3 * alpha**2, "second": rate**2 / 2 * two**3 * beta**2, "crossed": 0.0}
    assert gains == pytest.approx(expected, rel=1e-9, abs=1e-12)
    trained = gain_by_training([splits["first"] > 0, splits["first"] < 0], gradients, hessian, rate)
    assert gains["first"] == pytest.approx(trained, rel=1e-8, abs=1e-12)
    if abs(one * alpha - two * beta) > 1e-3 * one * alpha:
        scores = principal_components(gradients @ gradients.T, 1).scores[:, 0]
        picked = "first" if (one * alpha) ** 2 > (two * beta) ** 2 else "second"
        assert abs(np.sign(scores) @ splits[picked]) == 4


@given(SEEDS, st.integers(1, 3), st.floats(0, 0.02))
def test_cosines_lead_to_the_space_of_raw_gradients_where_norms_concentrate(
    seed: int, size: int, spread: float
) -> None:
    """Theorem F.4."""
    rng = np.random.default_rng(seed)
    unit = rng.standard_normal((8, 5)) * np.array([4, 2, 1, 0.5, 0.2])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    gradients = unit * 7 * (1 + rng.uniform(-spread, spread, (8, 1)))
    sine = theory.space_sine(unit @ unit.T, gradients @ gradients.T, size)
    assert sine <= theory.cosine_space_bound(gradients, size) + 1e-7
    if spread == 0:
        assert sine < 1e-6


def test_doubly_centred_cosines_are_the_pca_of_unit_gradients() -> None:
    gradients, _ = instance(3, 9)
    unit = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(doubly_centred(unit @ unit.T))[::-1]
    singular = np.linalg.svd(unit - unit.mean(axis=0), compute_uv=False)
    assert values[:5] == pytest.approx(singular**2, **CLOSE)


def test_unequal_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="as many of each"):
        theory.two_group_gain([1, 1, 1, -1], np.eye(4), 1.0)
    assert theory.cosine_space_bound(np.eye(3), 1) == np.inf
