"""Whether groups lie together, against groupings drawn at random."""

import numpy as np
import pytest

from merit.diagnostics.embedding import silhouette


def test_tight_groups_are_told_from_random_ones() -> None:
    rng = np.random.default_rng(0)
    places = np.concatenate([rng.normal(0, 0.1, (6, 2)), rng.normal(3, 0.1, (6, 2))])
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    apart = silhouette(distances, np.repeat([0, 1], 6), 0)
    assert apart is not None
    assert apart[0] > 0.9
    assert apart[1] < 0.02
    mixed = silhouette(distances, np.tile([0, 1], 6), 0)
    assert mixed is not None
    assert mixed[1] > 0.2
    assert silhouette(distances, np.zeros(12, dtype=int), 0) is None


def test_a_silhouette_is_the_mean_of_its_definition() -> None:
    distances = np.array([[0, 1, 4, 5], [1, 0, 3, 4], [4, 3, 0, 2], [5, 4, 2, 0.0]])
    found = silhouette(distances, np.array([0, 0, 1, 1]), 0)
    assert found is not None
    each = [(4.5 - 1) / 4.5, (3.5 - 1) / 3.5, (3.5 - 2) / 3.5, (4.5 - 2) / 4.5]
    assert found[0] == pytest.approx(np.mean(each))
