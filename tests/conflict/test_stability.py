"""Resampled geometries vary as real resamples do, and split probabilities follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from merit.conflict.reliability import HalfSamples
from merit.conflict.resampling import resampled_grams
from merit.errors import ConflictError
from merit.split.components import cosine_matrix, principal_components
from merit.split.stability import split_stability


@dataclass(frozen=True)
class Measured:
    """The part of a geometry that stability reads."""

    halves: HalfSamples

    @property
    def names(self) -> list[str]:
        return [f"d{i}" for i in range(len(self.halves.q))]

    @property
    def gram(self) -> np.ndarray:
        return self.halves.gram()

    @property
    def cosine(self) -> np.ndarray:
        return cosine_matrix(self.gram)

    def resampled(self, replicates: int, seed: int) -> Iterator[np.ndarray]:
        return resampled_grams(self.halves, self.names, replicates, seed)


def measured(means: np.ndarray, noise: float, n: int, seed: int, q_all: float = 0.0) -> Measured:
    rng = np.random.default_rng(seed)
    count = len(means)
    samples = [mean + noise * rng.normal(size=(n, len(mean))) for mean in means]
    even, odd = (np.array([s[k::2].sum(axis=0) / n for s in samples]) for k in (0, 1))
    share = np.full(count, len(samples[0][0::2]) / n)
    return Measured(
        HalfSamples(
            even_even=even @ even.T,
            odd_odd=odd @ odd.T,
            even_odd=even @ odd.T,
            share_even=share,
            q_even=1 / (share * n),
            q_odd=1 / ((1 - share) * n),
            q=np.full(count, 1 / n),
            q_all=np.full(count, q_all),
        )
    )


def by_sign(cosine, gram):
    score = principal_components(cosine, 1).scores[:, 0]
    return [np.flatnonzero(score > 0).tolist(), np.flatnonzero(score <= 0).tolist()]


def two_sides(count: int = 8, width: int = 200) -> np.ndarray:
    rng = np.random.default_rng(0)
    axis = rng.normal(size=width)
    return np.array([(1 if i % 2 else -1) * axis for i in range(count)]) + 0.2 * rng.normal(size=(count, width))


def test_replicate_noise_equals_sampling_noise():
    n, noise = 20, 1.5
    means = two_sides()
    geometry = measured(means, noise, n, seed=1)
    grams = geometry.resampled(400, seed=0)
    extra = np.mean([np.diag(g) for g in grams], axis=0) - np.diag(geometry.gram)
    np.testing.assert_allclose(extra.mean(), noise**2 / n * means.shape[1], rtol=0.15)


def test_clear_sides_are_certain_and_pure_noise_is_not():
    clear = split_stability(measured(two_sides(), 0.5, 20, 1), by_sign)
    assert clear.mean == 1.0
    assert clear.probability.shape == (8,)
    noise = split_stability(measured(np.zeros((8, 200)), 1.0, 20, 1), by_sign)
    assert noise.mean < 0.95
    assert noise.mean >= 0.5, "matching groups keeps it at chance or above"


def test_undecided_datasets_are_the_uncertain_ones():
    means = two_sides()
    means[[2, 3]] *= 0.02
    found = split_stability(measured(means, 1.0, 10, 2), by_sign, replicates=200)
    assert found.probability[[2, 3]].min() < 0.9
    assert np.delete(found.probability, [2, 3]).min() > 0.99
    assert np.array_equal(np.diag(found.together), np.ones(8))


def test_a_sample_of_all_rows_does_not_vary():
    geometry = measured(two_sides(), 1.0, 10, 3, q_all=0.1)
    for gram in geometry.resampled(3, seed=0):
        np.testing.assert_allclose(gram, geometry.gram, rtol=1e-12)


def test_results_are_seeded():
    geometry = measured(np.zeros((6, 50)), 1.0, 20, 1)
    one, two, other = (split_stability(geometry, by_sign, seed=s) for s in (0, 0, 1))
    assert np.array_equal(one.probability, two.probability)
    assert not np.array_equal(one.probability, other.probability)


def test_a_lone_example_is_refused():
    geometry = measured(two_sides(), 1.0, 10, 3)
    geometry.halves.share_even[2] = 1.0
    with pytest.raises(ConflictError, match="d2 has a single calibration example"):
        split_stability(geometry, by_sign)
