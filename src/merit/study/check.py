"""What is found out before a study's first expensive step: methods that this mixture or this machine cannot do."""

from __future__ import annotations

from merit.errors import RecipeError, UserError
from merit.recipe.load import changed
from merit.recipe.methods import methods_of
from merit.recipe.schema import Recipe
from merit.run.check import check_groups
from merit.run.merge_check import check_merge
from merit.train.requirements import check_requirements

__all__ = ["check_study"]


def check_study(recipe: Recipe, datasets: int) -> None:
    """Refuse what a study's methods cannot do, before any branch is trained for them.

    Raises:
        RecipeError: The message names the method.
    """
    for method in methods_of(recipe):
        for source in method.sources:
            try:
                one = changed(recipe, (("baselines", []), *source.changes))
                check_groups(one, datasets)
                check_requirements(one.train, one.model)
                check_merge(changed(one, method.merge or ()))
            except UserError as error:
                raise RecipeError(f"study.methods: {method.name}: {error.message}", *error.ways_out) from None
