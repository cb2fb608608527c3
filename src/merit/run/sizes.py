"""What is known of a mixture's size before it is read: which listed datasets are meant, rows, optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from merit.progress import count
from merit.recipe.schema import DatasetSettings, MixtureSettings, Recipe

__all__ = ["meant", "notes_on_sizes", "stated_steps", "steps_of"]

_FEW_STEPS = 10
"""Optimizer steps of a branch below which nothing much can be learned at the usual rates."""


def meant(mixture: MixtureSettings) -> list[DatasetSettings]:
    """The listed datasets that ``include`` and ``exclude`` leave; those split further by a column are all kept."""

    def wanted(name: str) -> bool:
        return any(fnmatchcase(name, p) for p in mixture.include) and not any(
            fnmatchcase(name, p) for p in mixture.exclude
        )

    return [item for item in mixture.datasets or [] if item.split_by or wanted(item.name)]


def stated_steps(recipe: Recipe) -> int | None:
    """Maximum optimizer steps of joint training, if every dataset has a row budget."""
    items = meant(recipe.mixture)
    budgets = [item.samples or recipe.mixture.samples for item in items]
    rows = [budget for budget in budgets if budget is not None]
    cut = any(item.split_by for item in items)  # into an unknown number
    if not rows or cut or len(rows) < len(budgets):
        return None
    return steps_of(recipe, sum(rows))


def steps_of(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of joint training on so many rows per epoch."""
    return math.ceil(recipe.train.epochs * math.ceil(rows / recipe.train.batch_size))


def notes_on_sizes(recipe: Recipe, rows: Mapping[str, int]) -> Iterator[str]:
    """Whether a dataset (``rows`` by name) is much larger than a group should be, a branch too short, a group too small."""
    steps = steps_of(recipe, sum(rows.values())) // max(1, recipe.group_count)
    if rows and steps < _FEW_STEPS:
        yield (
            f"about {count(steps, 'optimizer step')} per branch: with so few, the learning rate is hardly warm and the "
            "models stay close to the base. More rows, more train.epochs or a smaller train.batch_size give more steps."
        )
    largest, total = max(rows, key=rows.__getitem__, default=""), sum(rows.values())
    if recipe.group_count > 1 and total and (share := rows[largest] / total) > 1.5 / recipe.group_count:
        yield (
            f"{largest} holds {share:.0%} of the rows, and datasets are never cut: its group is at least that large (an "
            f"equal one has {1 / recipe.group_count:.0%}). mixture.samples or mixture.temperature evens them out."
        )
    if recipe.group_count > 1 and rows and len(rows) < 2 * recipe.group_count:
        yield (
            f"{len(rows)} datasets in {recipe.group_count} groups: some groups are one dataset, so the split separates "
            "datasets whether they conflict or not. A smaller split.axes gives fewer groups."
        )
