"""Whose split, branches and merge a step reads and writes: the run's own, a baseline's, or those of a study's method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from merit.recipe.load import changed
from merit.recipe.methods import Changes, Method, Source, methods_of
from merit.recipe.schema import Recipe


@dataclass(frozen=True)
class Scope:
    """Whose split, branches and merge: the run's (``method`` is None), a baseline's, or a study's.

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

    @property
    def shared(self) -> Path:
        """Folder of the gradients that its split is made from."""
        return self.run

    @property
    def sources(self) -> tuple[Scope, ...]:
        """Whose branches are merged: its own."""
        return (self,)

    def name(self, stage: str) -> str:
        """A stage's display name: ``split``, ``random split``."""
        return f"{self.method} {stage}" if self.method else stage

    def reports_half(self, recipe: Recipe) -> bool:
        """Whether its models are measured on the reporting half alone: the other half chose weights."""
        return recipe.merge.weights == "auto"

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe with the scope's split method; a baseline has no baselines."""
        if self.method is None:
            return recipe
        split = recipe.split.model_copy(update={"method": self.method, "groups": None})
        return recipe.model_copy(update={"split": split, "baselines": []})


@dataclass(frozen=True)
class StudyScope(Scope):
    """One method of a study with one seed; ``method`` is ``s0/pca-2d``: it names the folder and, with a number, a branch.

    Attributes:
        seed: Of every random choice but those of the mixture and of what is measured.
        changes: Of the recipe.
        members: Whose branches are merged; empty: its own.
        own_gradients: Its seed has gradients of its own.
        halved: Some method of the study searches its weights.
    """

    seed: int = 0
    changes: Changes = ()
    members: tuple[StudyScope, ...] = ()
    own_gradients: bool = True
    halved: bool = False

    @property
    def root(self) -> Path:
        """Folder of ``split`` and ``branches``, or of ``merged``."""
        return self.run / "study" / (self.method or "")

    @property
    def shared(self) -> Path:
        """The seed's folder."""
        return self.run / "study" / f"s{self.seed}" if self.own_gradients else self.run

    @property
    def sources(self) -> tuple[Scope, ...]:
        """Whose branches are merged."""
        return self.members or (self,)

    def reports_half(self, recipe: Recipe) -> bool:
        """Whether all models of the study are."""
        return self.halved

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe with the method's changes and the seed."""
        cut = [("split.groups", None)] if any(key.startswith("split.") for key, _ in self.changes) else []
        return changed(recipe, (("baselines", []), ("seed", self.seed), *cut, *self.changes))


def scopes_of(recipe: Recipe, run: Path) -> list[Scope]:
    """The run's own scope, then its baselines'."""
    return [Scope(run), *(Scope(run, method) for method in recipe.baselines)]


def recipe_of(recipe: Recipe, scope: Scope) -> Recipe:
    """The recipe as a scope uses it."""
    return scope.recipe(recipe)


def source_scope(recipe: Recipe, run: Path, source: Source, seed: int) -> StudyScope:
    """Where a study's branches of one seed are."""
    changes = source.changes
    if source.order:
        first = recipe.train.data_seed if recipe.train.data_seed is not None else seed
        changes = (*changes, ("train.data_seed", source.data_seed(first)))
    own = recipe.study.gradients == "per_seed"
    return StudyScope(run, f"s{seed}/{source.name}", seed, changes, own_gradients=own)


def merge_scope(recipe: Recipe, run: Path, method: Method, seed: int, extra: Changes = ()) -> StudyScope:
    """Where a study's merge of one seed is; its branches are those of its members.

    Args:
        recipe: The run's recipe.
        run: The run folder.
        method: A method with a merge.
        seed: Its seed.
        extra: Changes found out during the study: a scale.
    """
    members = tuple(source_scope(recipe, run, source, seed) for source in method.sources)
    changes = (*members[0].changes, *(method.merge or ()), *extra)
    return StudyScope(run, f"s{seed}/merges/{method.name}", seed, changes, members, halved=searches_weights(recipe))


def searches_weights(recipe: Recipe) -> bool:
    """Whether a method of the run's study searches its weights on held-out rows (``weights: auto``)."""
    rules = [dict(method.merge or ()).get("merge.weights") for method in methods_of(recipe)]
    return "auto" in (*rules, recipe.merge.weights)


def study_scopes(recipe: Recipe, run: Path) -> Iterator[StudyScope]:
    """Every scope of a study that has branches, each once: seed by seed, in the order of the methods."""
    seen = set()
    for seed in recipe.study.seeds_from(recipe.seed):
        for method in methods_of(recipe):
            for source in method.sources:
                scope = source_scope(recipe, run, source, seed)
                if scope.method not in seen:
                    seen.add(scope.method)
                    yield scope
