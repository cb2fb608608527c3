"""Whose split, branches and merge a step reads and writes: the run's own, or those of one of its baselines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merit.recipe.schema import Recipe


@dataclass(frozen=True)
class Scope:
    """Whose split, branches and merge: the run's (``method`` is None), or those of a baseline.

    Attributes:
        run: The run folder.
        method: The baseline's split method.
    """

    run: Path
    method: str | None = None

    @property
    def root(self) -> Path:
        """Folder of ``split``, ``branches`` and ``merged``."""
        return self.run / "baselines" / self.method if self.method else self.run

    def name(self, stage: str) -> str:
        """A stage's display name: ``split``, ``random split``."""
        return f"{self.method} {stage}" if self.method else stage


def scopes_of(recipe: Recipe, run: Path) -> list[Scope]:
    """The run's own scope, then its baselines'."""
    return [Scope(run), *(Scope(run, method) for method in recipe.baselines)]


def recipe_of(recipe: Recipe, scope: Scope) -> Recipe:
    """The recipe with a scope's split method; a baseline has no baselines."""
    if scope.method is None:
        return recipe
    split = recipe.split.model_copy(update={"method": scope.method})
    return recipe.model_copy(update={"split": split, "baselines": []})
