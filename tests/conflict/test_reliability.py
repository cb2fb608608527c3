"""Quarter-sample algebra on synthetic per-example gradients whose truth is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merit.conflict.reliability import (
    SubSamples,
    calibration_steps,
    noise_corrected_cosine,
    reliability,
)


def parts_of(samples: list[np.ndarray], populations: list[int], weights: list[np.ndarray] | None = None) -> SubSamples:
    """From per-example gradients (n_t, D) of every dataset."""
    weights = weights or [np.ones(len(s)) for s in samples]
    sums = [w[p::4] @ s[p::4] / w.sum() for p in range(4) for s, w in zip(samples, weights, strict=True)]

    def q(w):
        return (w**2).sum() / w.sum() ** 2 if len(w) else np.inf

    return SubSamples(
        gram=np.array(sums) @ np.array(sums).T,
        shares=np.array([[w[p::4].sum() / w.sum() for p in range(4)] for w in weights]),
        q_parts=np.array([[q(w[p::4]) for p in range(4)] for w in weights]),
        q=np.array([q(w) for w in weights]),
        q_all=np.array([1 / n for n in populations]),
    )


def total(parts: SubSamples) -> np.ndarray:
    return parts.products().sum(axis=(0, 1))


def test_gram_is_that_of_the_sums():
    rng = np.random.default_rng(0)
    samples = [rng.normal(size=(n, 30)) for n in (5, 8, 11)]
    means = np.array([s.mean(axis=0) for s in samples])
    np.testing.assert_allclose(total(parts_of(samples, [50] * 3)), means @ means.T, atol=1e-12)


@pytest.mark.parametrize("n", [20, 21])
def test_squared_norm_is_unbiased_for_the_whole_finite_dataset(n):
    """Over many draws without replacement, for even and odd sample sizes, plain norms are inflated, corrected ones not."""
    rng = np.random.default_rng(0)
    population = rng.normal(size=(60, 40)) + 0.3
    true = float((population.mean(axis=0) ** 2).sum())
    plain, corrected = [], []
    for _ in range(3000):
        sample = population[rng.permutation(60)[:n]]
        found = reliability(parts_of([sample], [60]))
        plain.append(found.squared_norm[0])
        corrected.append(found.unbiased_squared_norm[0])
    error = np.std(corrected) / np.sqrt(3000)
    assert abs(np.mean(corrected) - true) < 4 * error
    assert np.mean(plain) - true > 20 * error, "without correction the bias would show"


def test_expected_cosine_matches_real_cosines_to_the_whole_dataset():
    rng = np.random.default_rng(1)
    population = rng.normal(size=(400, 500)) * 1.0 + rng.normal(size=500) * 0.15
    whole = population.mean(axis=0)
    for n in (50, 100, 200, 400):
        real, expected = [], []
        for _ in range(40):
            sample = population[rng.permutation(400)[:n]]
            g = sample.mean(axis=0)
            real.append(g @ whole / np.linalg.norm(g) / np.linalg.norm(whole))
            expected.append(reliability(parts_of([sample], [400])).expected_cosine[0])
        assert abs(np.mean(real) - np.mean(expected)) < 0.02
    assert expected[-1] == 1.0, "a sample of all rows is the whole dataset"


def test_unbiased_norm_is_the_mean_product_of_different_quarters():
    rng = np.random.default_rng(2)
    sample = rng.normal(size=(32, 200)) + 0.2
    quarters = np.array([sample[p::4].mean(axis=0) for p in range(4)])
    products = [a @ b for a, b in itertools.combinations(quarters, 2)]
    found = reliability(parts_of([sample], [10**9]))
    np.testing.assert_allclose(found.unbiased_squared_norm[0], np.mean(products), rtol=1e-6)
    g = sample.mean(axis=0)
    np.testing.assert_allclose(found.reliability[0], np.mean(products) / (g @ g), rtol=1e-6)


def test_noise_correction_recovers_known_cosines():
    rng = np.random.default_rng(3)
    width, count = 4000, 5
    shared = rng.normal(size=width)
    truth = np.array([k * 0.35 * shared + rng.normal(size=width) for k in (-1, 0, 1, 2, 3)]) * 0.3
    true_cosine = truth @ truth.T / np.outer(np.linalg.norm(truth, axis=1), np.linalg.norm(truth, axis=1))
    plain, corrected = [], []
    for _ in range(20):
        halves = parts_of([mean + 2.0 * rng.normal(size=(40, width)) for mean in truth], [10**9] * count)
        gram = total(halves)
        norms = np.sqrt(np.diag(gram))
        plain.append(gram / np.outer(norms, norms))
        corrected.append(noise_corrected_cosine(gram, reliability(halves)))
    off = np.triu_indices(count, 1)
    assert np.abs(np.mean(corrected, axis=0) - true_cosine)[off].max() < 0.03
    assert np.abs(np.mean(plain, axis=0) - true_cosine)[off].max() > 0.1, "plain cosines are attenuated here"


def test_token_weights_use_effective_numbers():
    rng = np.random.default_rng(4)
    tokens = rng.integers(1, 40, size=100).astype(float)
    gradients = rng.normal(size=(100, 300)) + 0.2
    true_gradient = tokens @ gradients / tokens.sum()
    real, expected = [], []
    for _ in range(300):
        pick = rng.permutation(100)[:40]
        sample, w = gradients[pick], tokens[pick]
        g = w @ sample / w.sum()
        real.append(g @ true_gradient / np.linalg.norm(g) / np.linalg.norm(true_gradient))
        halves = parts_of([sample], [100], [w])
        halves.q_all[0] = (tokens**2).sum() / tokens.sum() ** 2
        expected.append(reliability(halves).expected_cosine[0])
    assert abs(np.mean(real) - np.mean(expected)) < 0.03


def test_a_single_example_has_no_error_bar():
    one = reliability(parts_of([np.ones((1, 5))], [10]))
    assert np.isnan(one.reliability[0])
    assert np.isnan(one.expected_cosine[0])
    assert reliability(parts_of([np.ones((1, 5))], [1])).expected_cosine[0] == 1.0, "the only row there is"


def test_drowned_datasets_are_flagged_not_invented():
    rng = np.random.default_rng(5)
    halves = parts_of([np.concatenate([[a], [-a]]) for a in rng.normal(size=(1, 50))] + [np.ones((4, 50))], [100, 100])
    halves.gram[0, 0] += 1e-9
    corrected = noise_corrected_cosine(total(halves), reliability(halves))
    assert np.isnan(corrected[0]).all()
    assert corrected[1, 1] == 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(2, 2000))
def test_steps_rise_to_what_there_is_and_stay_multiples_of_four_inside(rows, limit):
    steps = calibration_steps(rows, limit)
    assert steps[-1] == min(rows, limit)
    assert all(a < b for a, b in itertools.pairwise(steps))
    assert all(step % 4 == 0 for step in steps[:-1])
    longer = calibration_steps(rows + 500, limit)
    assert steps[:-1] == longer[: len(steps) - 1], "more rows must not move earlier steps"
