"""Groups from a recipe, a mixture and measured gradients: what every split of a run has in common."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from merit.conflict.result import Geometry
from merit.mixture import Mixture
from merit.recipe.schema import Recipe
from merit.split.given import given_split
from merit.split.result import Split
from merit.split.stage import split_mixture


def make_split(recipe: Recipe, mixture: Mixture, geometry: Geometry | None, folder: Path) -> Split:
    """Cut the mixture, or take the groups that the recipe lists, and write ``split.json``.

    Raises:
        UserError: The mixture cannot be cut, or the listed groups do not fit it.
    """
    settings = recipe.split
    weights = mixture.rows if settings.balance == "samples" else mixture.target_tokens
    if settings.groups is not None:
        result = given_split(settings.method, settings.groups, weights, settings.balance)
    else:
        result = split_mixture(
            settings.method,
            settings.axes,
            weights=weights,
            geometry=geometry,
            balance=settings.balance,
            cosine=settings.cosine,
            seed=recipe.seed,
        )
    if settings.method == "pca" and geometry is not None and (other := geometry.judged_otherwise(settings)):
        result = replace(result, warnings=[*result.warnings, other])
    result.save(folder)
    return result
