"""A later dataset is placed on the first split's axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merit.errors import RecipeError
from merit.split.balance import bisect
from merit.split.components import cosine_matrix, principal_components
from merit.split.given import given_split
from merit.split.placing import FirstSplit, read_first


def first_split(vectors: np.ndarray, axes: int) -> tuple[FirstSplit, list[list[str]], np.ndarray, list[str]]:
    names = [f"d{i:02d}" for i in range(len(vectors))]
    matrix = cosine_matrix(vectors @ vectors.T)
    places = bisect(principal_components(matrix, axes).scores, np.ones(len(names)), names)
    groups = [[names[i] for i in group] for group in places]
    return FirstSplit.of(names, matrix, groups), groups, matrix, names


@given(st.integers(0, 200), st.integers(1, 3), st.integers(8, 15))
def test_the_first_splits_own_datasets_are_placed_where_they_are(seed: int, axes: int, count: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(count, 6))
    first, groups, matrix, names = first_split(vectors, axes)
    scores = principal_components(matrix, axes).scores
    for i, name in enumerate(names):
        found = first.scores(dict(zip(names, matrix[i], strict=True)))
        np.testing.assert_allclose(np.abs(found), np.abs(scores[i]), atol=1e-9)
        assert name in groups[first.place(found)]


def test_a_later_dataset_like_an_earlier_one_joins_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(10, 50))
    first, groups, _, names = first_split(vectors, 2)
    first.save(tmp_path)
    kept = read_first(tmp_path)
    assert kept == first
    assert read_first(tmp_path / "nothing") is None
    for i, name in enumerate(names):
        later = vectors[i] + 1e-3 * rng.normal(size=50)
        cosines = vectors @ later / np.linalg.norm(vectors, axis=1) / np.linalg.norm(later)
        assert name in groups[kept.place(kept.scores(dict(zip(names, cosines, strict=True))))]


def test_given_groups_are_the_split() -> None:
    split = given_split("pca", [["b", "a"], ["c"]], {"a": 2.0, "b": 3.0, "c": 4.0, "d": 1.0}, "samples")
    assert split.groups == [["a", "b"], ["c"]]
    assert split.weights == [5.0, 4.0]
    assert split.left_out == ["d"]
    assert "d is in none" in split.warnings[0]


@pytest.mark.parametrize("groups", [[["a"], ["a"]], [["a"], ["x"]], [["a"], []]])
def test_groups_that_do_not_fit_are_refused(groups: list[list[str]]) -> None:
    with pytest.raises(RecipeError, match=r"split\.groups"):
        given_split("pca", groups, {"a": 1.0, "b": 1.0}, "samples")
