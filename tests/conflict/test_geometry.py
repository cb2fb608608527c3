"""Gram, cosines and principal components against straightforward references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merit.conflict.geometry import folded_products, gram_matrix, norm_concentration
from merit.split.components import cosine_matrix, principal_components


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


def test_norm_concentration_trims_both_ends():
    norms = np.array([0.01, *np.full(18, 2.0), 50.0])
    found = norm_concentration(norms)
    assert found["cv"] == pytest.approx(norms.std(ddof=1) / norms.mean())
    assert found["cv_trimmed_5"] == 0.0
    assert found["max_over_min"] == pytest.approx(5000)


def quarters_of(count: int, width: int, *, noise: float = 0.4) -> np.ndarray:
    """(T, 4, D) float32: quarters of a common direction, a direction of each dataset, and noise."""
    rng = np.random.default_rng(5)
    truth = rng.normal(size=width) + rng.normal(size=(count, 1, width))
    return (truth / 4 + noise * rng.normal(size=(count, 4, width))).astype(np.float32)


def exact_products(quarters: np.ndarray) -> np.ndarray:
    """(4, 4, T, T) float64."""
    flat = quarters.transpose(1, 0, 2).reshape(-1, quarters.shape[2]).astype(np.float64)
    count = len(quarters)
    return (flat @ flat.T).reshape(4, count, 4, count).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("width", [512, 5000])
def test_a_fold_changes_nothing_but_products_of_noise(width):
    quarters = quarters_of(6, width)
    true = exact_products(quarters)
    gram, products = folded_products([list(item) for item in quarters], 512)
    np.testing.assert_allclose(gram, true.sum(axis=(0, 1)), rtol=1e-5)
    found = products.reshape(4, 6, 4, 6).transpose(0, 2, 1, 3)
    assert np.array_equal(products, products.T)
    np.testing.assert_allclose(found.sum(axis=(0, 1)), gram, rtol=1e-5)
    within = np.einsum("prii->pri", found - true)
    assert np.abs(within).max() < 1e-4 * width, "products within a dataset are those of all entries"
    lengths = np.sqrt(np.einsum("ppii->pi", true))
    error = (found - true) / (lengths[:, None, :, None] * lengths[None, :, None, :])
    if width == 512:
        assert np.abs(error).max() < 1e-5, "nothing is folded"
    else:
        off = error[:, :, ~np.eye(6, dtype=bool)]
        assert 0.1 / np.sqrt(512) < off.std() < 1 / np.sqrt(512)


def test_folded_contrasts_are_unbiased_whatever_the_layout():
    """Energy in one column of a weight matrix, which a fold without shifts would put into few entries."""
    rng = np.random.default_rng(0)
    quarters = np.zeros((2, 4, 64 * 256), dtype=np.float32)
    quarters[:, :, ::256] = rng.normal(size=(2, 4, 64))
    true, found = exact_products(quarters), np.zeros((4, 4, 2, 2))
    for seed in range(60):
        rolled = np.roll(quarters, 17 * seed, axis=2)  # other signs and shifts meet the same vectors
        found += folded_products([list(item) for item in rolled], 256)[1].reshape(4, 2, 4, 2).transpose(0, 2, 1, 3) / 60
    np.testing.assert_allclose(found, true, atol=5 * 64 / np.sqrt(256 * 60) * 1.5)


def test_single_precision_tells_duplicates_from_near_ones():
    """Cosines closer to 1 than a millionth are called duplicates; products of many datasets are float32 in blocks."""
    rng = np.random.default_rng(0)
    width = 2**16
    first = rng.normal(size=(4, width)).astype(np.float32)
    near = (first + 2.5e-3 * rng.normal(size=(4, width))).astype(np.float32)  # 1 - cosine is 3e-6
    gram, _ = folded_products([list(first), list(first), list(near)], 2**14)
    cosine = cosine_matrix(gram)
    assert abs(1 - cosine[0, 1]) < 2e-7
    true = exact_products(np.stack([first, near])).sum(axis=(0, 1))
    assert 1 - cosine[0, 2] == pytest.approx(1 - cosine_matrix(true)[0, 1], abs=2e-7)
    assert 1 - cosine[0, 2] > 2e-6


def test_leading_axes_of_many_datasets_are_those_of_a_whole_decomposition():
    rows = np.random.default_rng(7).normal(size=(230, 40)) * np.r_[6, 4, 3, np.ones(37)] + 0.3
    cosine = cosine_matrix(rows @ rows.T)
    found = principal_components(cosine, 3)
    left, singular, right = np.linalg.svd(cosine - cosine.mean(axis=0))
    np.testing.assert_allclose(np.abs(found.scores), np.abs(left[:, :3] * singular[:3]), atol=1e-9)
    np.testing.assert_allclose(np.abs(found.axes), np.abs(right[:3].T), atol=1e-9)
    np.testing.assert_allclose(found.explained_variance, (singular**2)[:3] / (singular**2).sum(), atol=1e-12)
    alike = principal_components(np.ones((230, 230)), 3)
    assert not alike.scores.any()
