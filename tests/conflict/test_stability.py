"""Resampled geometries vary as real resamples do, and split probabilities follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from merit.conflict.reliability import SubSamples
from merit.conflict.resampling import resampled_grams
from merit.split.components import cosine_matrix, principal_components
from merit.split.stability import split_stability


@dataclass(frozen=True)
class Measured:
    """The part of a geometry that stability reads."""

    parts: SubSamples
    sketch_size: int = 0

    @property
    def names(self) -> list[str]:
        return [f"d{i}" for i in range(len(self.parts.q))]

    @property
    def gram(self) -> np.ndarray:
        return self.parts.products().sum(axis=(0, 1))

    @property
    def cosine(self) -> np.ndarray:
        return cosine_matrix(self.gram)

    def resampled(self, replicates: int, seed: int) -> Iterator[np.ndarray]:
        return resampled_grams(self.parts, replicates, seed, self.sketch_size)


def measured(means: np.ndarray, noise: float, n: int, seed: int, q_all: float = 0.0) -> Measured:
    rng = np.random.default_rng(seed)
    count = len(means)
    samples = [mean + noise * rng.normal(size=(n, len(mean))) for mean in means]
    sums = np.array([s[p::4].sum(axis=0) / n for p in range(4) for s in samples])
    sizes = np.array([len(samples[0][p::4]) for p in range(4)])
    return Measured(
        SubSamples(
            gram=sums @ sums.T,
            shares=np.tile(sizes / n, (count, 1)),
            q_parts=np.tile(1 / sizes, (count, 1)),
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


def test_the_sketchs_own_error_is_in_the_error_bars():
    """Fails on commit f5727a1: what a sketch does to cosines was in no error bar."""
    geometry = measured(two_sides(), 0.0, 12, 3)
    assert split_stability(geometry, by_sign).mean == 1.0
    spread = np.array([cosine_matrix(gram) for gram in replace(geometry, sketch_size=4096).resampled(300, 0)])
    rng, rows = np.random.default_rng(1), two_sides()
    sketched = []
    for _ in range(300):  # random projections of the gradients themselves
        kept = rows @ rng.normal(size=(rows.shape[1], 4096)) / 64
        sketched.append(cosine_matrix(kept @ kept.T))
    off = np.triu_indices(8, 1)
    real = np.std(sketched, axis=0)[off]
    np.testing.assert_allclose(spread.std(axis=0)[off].mean(), real.mean(), rtol=0.1)
    np.testing.assert_allclose(spread.mean(axis=0), geometry.cosine, atol=0.005)


def test_three_directions_of_noise_not_one():
    """Fails on commit f5727a1: every dataset moved along one half-sample difference, so that 1.0 was said too often."""
    geometry = measured(two_sides(), 1.5, 20, 1)
    moved = np.array([gram - geometry.gram for gram in geometry.resampled(50, 0)])[:, 0, :]
    assert np.linalg.matrix_rank(moved, tol=1e-6 * np.abs(moved).max()) > 2
