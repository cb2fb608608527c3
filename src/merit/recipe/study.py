"""The ``study`` block: which methods are compared, over which seeds. :mod:`merit.recipe.methods` reads the names."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from merit.recipe.base import Settings


class StudySettings(Settings):
    """Methods × seeds on one mixture and base (`merit study`); docs/study.md describes the methods."""

    methods: list[str] = ["base", "joint", "wise_ft", "one_budget", "random", "own"]
    """What is compared: base, joint, own (the recipe's split), pca-2d, raw_pca-1d, random-4, kmeans-8, conflict_induced,
    soup-3, wise_ft, finch, one_budget, joint_matched, pcgrad, gradnorm; with changes of training (joint@budget=0.5,
    own@learning_rate=1e-4) and of the merge (own+ties, own+weights=uniform); or the sets paper, operators, sceptics,
    searched, surgery."""
    seeds: (
        Annotated[int, Field(ge=1, le=1000)]
        | Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
    ) = 5
    """How many seeds from the recipe's ``seed`` on, or which. Five are the fewest with which a one-sided Wilcoxon test can
    reach p = 0.03."""
    baseline: str = "joint"
    """The method that all others are paired with, seed by seed."""
    gradients: Literal["per_seed", "once"] = "per_seed"
    """per_seed: every seed draws its own calibration sample and sketch; once: all use the recipe's ``seed``."""
    batch_sizes: list[Annotated[int, Field(ge=1)]] = []
    """Adds joint training at each of these batch sizes."""
    learning_rates: list[Annotated[float, Field(gt=0, lt=10)]] = []
    """Adds joint training and the recipe's own method at each of these learning rates."""
    sgd_learning_rates: list[Annotated[float, Field(gt=0, lt=10)]] = []
    """Adds joint training and pca-1d, -2d and -3d with plain SGD at each of these learning rates."""
    rounds: list[Annotated[int, Field(ge=1)]] = []
    """Adds the recipe's own method trained in each of these numbers of rounds."""
    weights: list[str] = []
    """Adds merges of the recipe's own branches with each of these ``merge.weights``."""
    scales: list[Annotated[float, Field(ge=0, le=10)]] = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    """Points λ of every method's line θ0 + λ(θ̄ − θ0); 0 and 1 are always among them."""

    @model_validator(mode="after")
    def _each_seed_once(self) -> Self:
        chosen = [self.seeds] if isinstance(self.seeds, int) else self.seeds
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"seeds repeats one: {chosen}")
        return self

    def seeds_from(self, first: int) -> tuple[int, ...]:
        """The seeds; ``first`` is the recipe's."""
        return tuple(range(first, first + self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)
