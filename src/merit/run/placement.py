"""Where a dataset that comes later belongs: encoded and measured alone, and placed on the axes of the run's first split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from merit.conflict.later import geometry_with
from merit.conflict.result import Geometry
from merit.conflict.sample import Probe
from merit.errors import RecipeError
from merit.mixture import EncodedDataset, Mixture, find_datasets, load_split, read_counts
from merit.mixture.stage import encode_mixture
from merit.recipe.schema import DatasetSettings, MixtureSettings, Recipe
from merit.run.session import Session
from merit.split.placing import FirstSplit, read_first
from merit.split.view import needs_conflict


def encode_alone(session: Session, item: DatasetSettings) -> Mixture:
    """The new dataset alone, encoded as the mixture's are: it finds what is wrong with it. Its files go with the result."""
    block = session.recipe.mixture.model_dump(mode="json")
    own: dict[str, Any] = {
        "folder": None,
        "path": None,
        "split_by": None,
        "test": None,
        "datasets": None,
        "columns": {},
        "added": [],
    }
    own |= {"include": ["*"], "exclude": [], "datasets": [item.model_dump(mode="json")]}
    found = find_datasets(MixtureSettings.model_validate(block | own))
    found.check()
    recipe = session.recipe
    return encode_mixture(found, session.base, max_length=recipe.train.max_length, seed=recipe.seed)


def place_by_scores(
    session: Session, name: str, rows: EncodedDataset, groups: Sequence[Sequence[str]]
) -> tuple[FirstSplit | None, list[float] | None, int]:
    """By its scores; where the split has no axes, the lightest group of a random or joint split.

    Raises:
        RecipeError: The split's method has neither.
    """
    recipe = session.recipe
    counts = {item.name: item for item in read_counts(session.run / "mixture")}
    if not needs_conflict(recipe.split.method):
        samples = recipe.split.balance == "samples"
        weights = [sum(counts[t].rows if samples else counts[t].target_tokens for t in group) for group in groups]
        return None, None, weights.index(min(weights))
    if recipe.split.method not in ("pca", "raw_pca"):
        raise RecipeError(
            f"split.method {recipe.split.method} has no axes to place a dataset on.",
            "Say where it belongs: --branch K, or --own-branch.",
        )
    encoded = dict(load_split(session.run / "mixture", "train"))
    probe = Probe(session.base, recipe.conflict, recipe.seed, session.device)
    with session.reporter.progress("gradient") as tick:
        geometry = geometry_with({**encoded, name: rows}, name, probe, session.run / "conflict", tick)
    first = first_split(session, groups, geometry)
    if first is None:
        raise RecipeError(
            f"{session.run}: the split was given (split.groups), so there are no axes to place a dataset on.",
            "Say where it belongs: --branch K, or --own-branch.",
        )
    matrix = _matrix(recipe, geometry)
    row = dict(zip(geometry.names, matrix[geometry.names.index(name)].tolist(), strict=True))
    scores = first.scores(row)
    return first, scores, first.place(scores)


def _matrix(recipe: Recipe, geometry: Geometry) -> np.ndarray:
    """What the split's method projects: (T, T)."""
    if recipe.split.method == "raw_pca":
        return geometry.gram
    if recipe.split.cosine == "corrected":
        matrix: np.ndarray = geometry.cosine * np.outer(geometry.inflation, geometry.inflation)
        np.fill_diagonal(matrix, 1.0)
        return matrix
    return geometry.cosine


def first_split(session: Session, groups: Sequence[Sequence[str]], geometry: Geometry | None) -> FirstSplit | None:
    """What is kept of the first split; taken from the measured gradients at the first change."""
    recipe = session.recipe
    kept = read_first(session.run / "split")
    if kept is not None or recipe.split.method not in ("pca", "raw_pca") or recipe.split.groups is not None:
        return kept
    geometry = geometry or Geometry.load(session.run / "conflict")
    members = {name for group in groups for name in group}
    twins = {name for same in geometry.duplicates for name in same[1:]}
    names = [name for name in geometry.names if name in members and name not in twins]
    if len(names) < len(groups):
        names = [name for name in geometry.names if name in members]
    places = [geometry.names.index(name) for name in names]
    return FirstSplit.of(names, _matrix(recipe, geometry)[places][:, places], groups)
