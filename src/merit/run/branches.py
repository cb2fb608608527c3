"""The branches of a run and of its baselines: their names, what is requested of each, and its group."""

from __future__ import annotations

from dataclasses import dataclass

from merit.errors import RecipeError, RunFolderError
from merit.mixture import read_counts
from merit.run.round_stages import STATE, RoundStages
from merit.run.scope import Scope
from merit.run.session import Session
from merit.run.store import Stage, split_of
from merit.train.checkpoint import newest
from merit.train.rounds import Round

KEPT = ("checkpoints", "trackers")
"""What an unfinished branch resumes from, and its trackers' files; not part of the stage's outputs."""


@dataclass(frozen=True)
class BranchId:
    """One branch of the run (``root`` is None), of a baseline (its split method) or of a study (``s0/pca-2d``).

    ``round`` is the number of its round; None: the last, or the only one.
    """

    root: str | None
    k: int
    round: int | None = None

    def __str__(self) -> str:
        text = f"{self.root}/{self.k}" if self.root else str(self.k)
        return f"{text}@{self.round}" if self.round else text

    @classmethod
    def parse(cls, text: str, number: int | None = None) -> BranchId:
        """Read ``3`` or ``random/3``, in round ``number``; ``3@2`` is in round 2.

        Raises:
            RecipeError: It is none of these.
        """
        root, _, last = text.rpartition("/")
        k, _, own = last.partition("@")
        if not k.isdigit() or not (own or "1").isdigit():
            raise RecipeError(
                f"--branch {text}: expected a branch number such as 0, or baseline/number such as random/0."
            )
        return cls(root or None, int(k), int(own) if own else number)


def round_stages(session: Session, scope: Scope) -> RoundStages:
    """The stages of a scope's rounds."""
    rows = {item.name: item.fingerprint for item in read_counts(session.run / "mixture")}
    return RoundStages(session.recipe_of(scope), scope, session.base.fingerprint, rows)


def branch_stages(session: Session, scope: Scope) -> dict[int, Stage]:
    """The branches that a scope merges, as requested now: its own, or those of its sources one after another."""
    stages: list[Stage] = []
    for source in scope.sources:
        rounds = round_stages(session, source)
        stages += rounds.branches(rounds.last).values()
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
    rounds = session.recipe_of(scope).rounds
    if branch.round is not None and not 1 <= branch.round <= rounds:
        raise RecipeError(f"--round {branch.round}: train.rounds is {rounds}.")
    return scope


def _rounds(session: Session, branch: BranchId) -> tuple[RoundStages, int]:
    """The stages of a branch's rounds, and the number of the one that is meant."""
    rounds = round_stages(session, scope_of(session, branch))
    return rounds, branch.round or rounds.last


def stage_of(session: Session, branch: BranchId) -> Stage:
    """A branch, as requested now."""
    rounds, number = _rounds(session, branch)
    return rounds.branches(number)[branch.k]


def group_of(session: Session, branch: BranchId) -> list[str]:
    """The datasets of a branch."""
    rounds, number = _rounds(session, branch)
    return rounds.groups(number)[branch.k]


def part_of(session: Session, branch: BranchId) -> Round:
    """Which of a branch's rounds is meant, its start, and what it goes on with from the round before.

    Raises:
        RunFolderError: The round before is not merged, or its files are damaged or gone.
    """
    rounds, number = _rounds(session, branch)
    between = rounds.recipe.train.between
    carrier = rounds.carrier(number, branch.k)
    carried = None if carrier is None else newest(carrier.path / STATE)
    if carrier is not None and carried is None:
        raise RunFolderError(
            f"{carrier.path / STATE} is missing or damaged: an earlier round left there what round {number} goes on from.",
            f"Copy it from where that branch was trained, or remove the folder {rounds.scope.root / 'rounds'} and run the "
            "same command again: the rounds are trained again.",
        )
    return Round(
        number=number,
        of=rounds.last,
        start=rounds.start(number),
        content=rounds.content(number),
        carried=carried,
        keeps_optimizer=between.keeps_optimizer,
        resplit=between.resplit and rounds.last > 1,
    )
