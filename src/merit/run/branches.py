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
    """One branch of the run (``root`` is None) or of a baseline (``root`` is its split method)."""

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
    """The branches of a scope, as requested now."""
    rows = {item.name: item.fingerprint for item in read_counts(session.run / "mixture")}
    recipe, base = session.recipe_of(scope), session.base.fingerprint
    groups = split_of(scope.root).groups
    return {k: key.branch_stage(recipe, scope, k, group, base=base, rows=rows) for k, group in enumerate(groups)}


def scope_of(session: Session, branch: BranchId) -> Scope:
    """The scope that a branch belongs to.

    Raises:
        RecipeError: There is no such branch.
    """
    baselines = session.recipe.baselines
    if branch.root is not None and branch.root not in baselines:
        raise RecipeError(
            f"--branch {branch}: the recipe has no baseline {branch.root!r}; it has {', '.join(baselines) or 'none'}."
        )
    scope = Scope(session.run, branch.root)
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
