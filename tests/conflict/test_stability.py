"""Resampled geometries vary as real resamples do, and split probabilities follow."""

from __future__ import annotations

import numpy as np
import pytest

from merit.conflict.geometry import cosine_matrix, principal_components
from merit.conflict.stability import resampled_grams, split_stability
from merit.errors import ConflictError


def arrays_of(means: np.ndarray, noise: float, n: int, seed: int, q_all: float = 0.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    count = len(means)
    samples = [mean + noise * rng.normal(size=(n, len(mean))) for mean in means]
    rows = np.array([s[k::2].sum(axis=0) / n for k in (0, 1) for s in samples])
    half = rows @ rows.T
    gram = half[:count, :count] + half[count:, count:] + half[:count, count:] + half[count:, :count]
    even = np.full(count, len(samples[0][0::2]) / n)
    return {
        "names": np.array([f"d{i}" for i in range(count)]),
        "half_gram": half,
        "gram": gram,
        "cosine": cosine_matrix(gram),
        "share_even": even,
        "q_even": 1 / (even * n),
        "q_odd": 1 / ((1 - even) * n),
        "q": np.full(count, 1 / n),
        "q_all": np.full(count, q_all),
    }


def by_sign(cosine, gram):
    score = principal_components(cosine, 1).scores[:, 0]
    names = [f"d{i}" for i in range(len(score))]
    return [
        [n for n, s in zip(names, score, strict=True) if s > 0],
        [n for n, s in zip(names, score, strict=True) if s <= 0],
    ]


def two_sides(count: int = 8, width: int = 200) -> np.ndarray:
    rng = np.random.default_rng(0)
    axis = rng.normal(size=width)
    return np.array([(1 if i % 2 else -1) * axis for i in range(count)]) + 0.2 * rng.normal(size=(count, width))


def test_replicate_noise_equals_sampling_noise():
    n, noise = 20, 1.5
    means = two_sides()
    arrays = arrays_of(means, noise, n, seed=1)
    grams = resampled_grams(arrays, 400, seed=0)
    extra = np.mean([np.diag(g) for g in grams], axis=0) - np.diag(arrays["gram"])
    np.testing.assert_allclose(extra.mean(), noise**2 / n * means.shape[1], rtol=0.15)


def test_clear_sides_are_certain_and_pure_noise_is_not():
    clear = split_stability(arrays_of(two_sides(), 0.5, 20, 1), by_sign)
    assert clear.mean == 1.0
    assert set(clear.probability) == {f"d{i}" for i in range(8)}
    noise = split_stability(arrays_of(np.zeros((8, 200)), 1.0, 20, 1), by_sign)
    assert noise.mean < 0.95
    assert noise.mean >= 0.5, "matching groups keeps it at chance or above"


def test_undecided_datasets_are_the_uncertain_ones():
    means = two_sides()
    means[[2, 3]] *= 0.02
    found = split_stability(arrays_of(means, 1.0, 10, 2), by_sign, replicates=200)
    assert min(found.probability["d2"], found.probability["d3"]) < 0.9
    assert min(p for name, p in found.probability.items() if name not in ("d2", "d3")) > 0.99
    assert np.array_equal(np.diag(found.together), np.ones(8))


def test_a_sample_of_all_rows_does_not_vary():
    arrays = arrays_of(two_sides(), 1.0, 10, 3, q_all=0.1)
    for gram in resampled_grams(arrays, 3, seed=0):
        np.testing.assert_allclose(gram, arrays["gram"], rtol=1e-12)


def test_results_are_seeded():
    arrays = arrays_of(np.zeros((6, 50)), 1.0, 20, 1)
    one, two, other = (split_stability(arrays, by_sign, seed=s) for s in (0, 0, 1))
    assert one.probability == two.probability
    assert one.probability != other.probability


def test_a_lone_example_is_refused():
    arrays = arrays_of(two_sides(), 1.0, 10, 3)
    arrays["share_even"][2] = 1.0
    with pytest.raises(ConflictError, match="d2 has a single calibration example"):
        split_stability(arrays, by_sign)
