"""The branches of a run and of its baselines: their names, what is requested of each, and its group."""

from __future__ import annotations

from dataclasses import dataclass

from merit.errors import RecipeError
from merit.mixture import read_counts
from merit.run import key
from merit.run.scope import Scope
from merit.run.session import Session
from merit.run.store import Stage, split_of

KEPT = ("checkpoints", "trackers")
"""What an unfinished branch resumes from, and its trackers' files; not part of the stage's outputs."""


@dataclass(frozen=True)
class BranchId:
    """One branch of the run (``root`` is None), of a baseline (its split method) or of a study (``s0/pca-2d``)."""

    root: str | None
    k: int

    def __str__(self) -> str:
        return f"{self.root}/{self.k}" if self.root else str(self.k)

    @classmethod
    def parse(cls, text: str) -> BranchId:
        """Read ``3`` or ``random/3``.

        Raises:
            RecipeError: It is neither.
        """
        root, _, k = text.rpartition("/")
        if not k.isdigit():
            raise RecipeError(
                f"--branch {text}: expected a branch number such as 0, or baseline/number such as random/0."
            )
        return cls(root or None, int(k))


def branch_stages(session: Session, scope: Scope) -> dict[int, Stage]:
    """The branches that a scope merges, as requested now: its own, or those of its sources one after another."""
    rows = {item.name: item.fingerprint for item in read_counts(session.run / "mixture")}
    base, stages = session.base.fingerprint, list[Stage]()
    for source in scope.sources:
        recipe, groups = session.recipe_of(source), split_of(source.root).groups
        stages += [key.branch_stage(recipe, source, k, group, base=base, rows=rows) for k, group in enumerate(groups)]
    return dict(enumerate(stages))


def scope_of(session: Session, branch: BranchId) -> Scope:
    """The scope that a branch belongs to.

    Raises:
        RecipeError: There is no such branch.
    """
    scope = session.scope if branch.root is None else session.scopes_by_name.get(branch.root)
    if scope is None:
        known = ", ".join(session.recipe.baselines) or "none"
        raise RecipeError(f"--branch {branch}: the recipe has no baseline {branch.root!r}; it has {known}.")
    groups = len(split_of(scope.root).groups)
    if branch.k >= groups:
        raise RecipeError(f"--branch {branch}: the split has {groups} groups, numbered from 0.")
    return scope


def stage_of(session: Session, branch: BranchId) -> Stage:
    """A branch, as requested now."""
    return branch_stages(session, scope_of(session, branch))[branch.k]


def group_of(session: Session, branch: BranchId) -> list[str]:
    """The datasets of a branch."""
    return split_of(scope_of(session, branch).root).groups[branch.k]
