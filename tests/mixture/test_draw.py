import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from merit.mixture import draw


@given(rows=st.integers(0, 300), n=st.integers(0, 320), more=st.integers(0, 50), seed=st.integers(0, 2**31 - 1))
def test_a_draw_is_without_replacement_and_extends(rows, n, more, seed):
    sample, larger = draw(rows, n, seed, "x"), draw(rows, n + more, seed, "x")
    assert len(sample) == min(rows, n)
    assert len(set(sample.tolist())) == len(sample)
    assert set(sample.tolist()) <= set(range(rows))
    assert larger[: len(sample)].tolist() == sample.tolist()


def test_name_seed_and_purpose_decide():
    draws = {tuple(draw(50, 50, seed, name, purpose)) for seed in (0, 1) for name in "ab" for purpose in ("x", "y")}
    assert len(draws) == 8
    assert draw(5, 5, 0, "arc", "calibration").tolist() == draw(5, 5, 0, "arc").tolist()


def test_every_row_is_as_likely():
    counts = np.zeros(10)
    for seed in range(2000):
        counts[draw(10, 3, seed, "x")] += 1
    assert np.abs(counts / 2000 - 0.3).max() < 0.05  # five standard deviations
