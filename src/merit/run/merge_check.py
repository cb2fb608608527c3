"""What can be refused of a recipe's ``merge`` block before any branch is trained for it. No files are read."""

from __future__ import annotations

from collections.abc import Collection

from merit.errors import MergeError, RecipeError
from merit.merge.coefficients import refuse_unused_weights
from merit.merge.operators import MOMENTS, operator_and_options
from merit.merge.patterns import assign_patterns
from merit.recipe.merge import DEFAULT_PATTERN
from merit.recipe.schema import Recipe

__all__ = ["check_merge", "check_patterns"]

_FULL_ONLY = ("block", "entry", "tensor")
"""Kinds of operators that work on full checkpoints alone."""


def check_merge(recipe: Recipe) -> None:
    """Operator, options and weights.

    Raises:
        RecipeError: An option is unknown or invalid, or the operator cannot be combined with what the recipe trains.
        MergeError: The operator would ignore the weights.
    """
    merge = recipe.merge
    try:
        operator, options = operator_and_options(merge.operator, merge.options)
    except MergeError as error:
        raise RecipeError(f"merge.options: {error.message}", *error.ways_out) from None
    refuse_unused_weights(operator, options, merge.weights)
    kept = recipe.evaluate.kept or recipe.evaluate.kept_folder
    if merge.weights == "auto" and merge.search.objective == "learned_under_kept" and not kept:
        raise RecipeError(
            "merge.search.objective: learned_under_kept needs kept sets, and the recipe names none.",
            "Set evaluate.kept_folder, or use objective: learned_under_drift, which needs no data.",
        )
    if recipe.model.trainable == "lora" and operator.kind in _FULL_ONLY:
        raise RecipeError(
            f"merge.operator {operator.name} needs whole weights and cannot work on LoRA adapters.",
            "Use average, task_arithmetic, star, tsv or iso_cts, or train full weights.",
        )
    if operator.name in MOMENTS and not recipe.train.save_second_moments:
        raise RecipeError(
            f"merge.operator {operator.name} needs the branches' second moments, which they save only when asked to.",
            "Set train.save_second_moments: true.",
        )


def check_patterns(recipe: Recipe, names: Collection[str]) -> None:
    """Patterns of merge.weights against the names in the base's files; nothing if these are not known.

    Raises:
        MergeError: A pattern matches nothing, or nothing that an earlier one leaves.
    """
    weights = recipe.merge.weights
    if isinstance(weights, dict) and names:
        assign_patterns([name for name in weights if name != DEFAULT_PATTERN], list(names))
