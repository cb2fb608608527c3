"""What a study costs, told before anything is trained: steps, tokens, time and disk. Counts in, figures out.

Steps and tokens follow from the recipe and the encoded mixture, with groups of equal size. Time is the tokens' at the
measured rate, for training and gradients only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from merit.recipe.schema import Recipe
from merit.study.figures import Surgery
from merit.train import balancing

__all__ = ["Cost", "Item", "item_of", "surgery_of"]


@dataclass(frozen=True)
class Item:
    """One source of branches, over all seeds.

    Attributes:
        source: ``pca-2d``.
        branches: How many.
        steps: Optimizer steps of all of them.
        tokens: Tokens of the rows that they are trained on.
        left: Tokens not trained yet.
    """

    source: str
    branches: int
    steps: int
    tokens: int
    left: int


@dataclass(frozen=True)
class Cost:
    """All of a study.

    Attributes:
        items: By source.
        seeds: How many.
        gradient_tokens: Tokens of the calibration samples that are still to be measured.
        seconds_per_token: Of training, measured here.
        jobs: Branches trained in parallel.
        disk_bytes: Of branches, merges and the checkpoints that exist at once.
        models: To be measured on held-out rows.
        points: λ on every line.
        note: How the rate was measured.
        surgery: What gradient surgery takes at a step, if the study has any.
        searches: Merges whose weights or λ are searched.
    """

    items: tuple[Item, ...]
    seeds: int
    gradient_tokens: int
    seconds_per_token: float
    jobs: int
    disk_bytes: int
    models: int
    points: int
    note: str
    surgery: Surgery | None = None
    searches: int = 0

    @property
    def steps(self) -> int:
        """Of all branches."""
        return sum(item.steps for item in self.items)

    @property
    def tokens(self) -> int:
        """Of all branches."""
        return sum(item.tokens for item in self.items)

    @property
    def seconds(self) -> float:
        """Time that training and gradients still need."""
        left = sum(item.left for item in self.items)
        return self.seconds_per_token * (left / max(1, self.jobs) + self.gradient_tokens)

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "steps": self.steps, "tokens": self.tokens, "seconds": self.seconds}


def item_of(source: str, recipes: Sequence[Recipe], counts: Mapping[str, tuple[int, int]], done: int) -> Item:
    """The cost of one source.

    Args:
        source: Its name.
        recipes: Its recipe for each seed.
        counts: Rows and tokens of each dataset.
        done: Tokens trained already.
    """
    rows, tokens = (sum(pair[place] for pair in counts.values()) for place in (0, 1))
    branches = steps = trained = 0
    for recipe in recipes:
        groups, train = recipe.group_count, recipe.train
        branches += groups
        steps += groups * math.ceil(train.epochs * math.ceil(rows / groups / train.batch_size))
        trained += round(train.epochs * tokens)
    return Item(source, branches, steps, trained, max(0, trained - done))


def surgery_of(recipes: Iterable[Recipe], datasets: int, parameters: int) -> Surgery | None:
    """What gradient surgery takes; None where no recipe asks for it, and for adapters, whose weights are not made yet.

    Args:
        recipes: Of all sources.
        datasets: Of the mixture.
        parameters: Trained weights.
    """
    if not any(r.train.balancing != "none" and r.model.trainable != "lora" for r in recipes):
        return None
    return Surgery(datasets, parameters, **vars(balancing.cost(datasets, parameters)))
