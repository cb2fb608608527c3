"""Conclusions from the differences: whether merged learned and kept more, did better on unseen tasks, and which to use.

Typed, without text. A comparison within one run is about its models. A conclusion about the methods needs several
runs with different seeds (:func:`across_seeds`): another seed alone changes a model by more than chance over datasets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from merit.evaluation.figures import Difference, Part, Summary

__all__ = ["MIN_SEEDS", "Advice", "Comparison", "Recommendation", "Side", "across_seeds", "comparisons", "recommend"]

MIN_SEEDS = 3
"""Minimum training seeds for a conclusion about methods."""


class Side(Enum):
    """One column's measures together, as seen from the merged model."""

    MORE = "more"
    """Better in one measure, worse in none."""
    LESS = "less"
    """Worse in one measure, better in none."""
    SAME = "same"
    """No clear difference."""
    MIXED = "mixed"
    """Better in one measure, worse in another."""
    UNKNOWN = "unknown"
    """Not measured, or on too little data."""


@dataclass(frozen=True)
class Comparison:
    """The merged model against one other.

    Attributes:
        other: Its name.
        differences: Every measure.
        budgets: Target tokens that merged and the other were trained on, if they are known and differ.
        remark: How the other was made, if not in the standard way.
    """

    other: str
    differences: tuple[Difference, ...]
    budgets: tuple[int, int] | None = None
    remark: str | None = None

    def of(self, part: Part) -> tuple[Difference, ...]:
        """The measures of one column; drift belongs to kept."""
        return tuple(item for item in self.differences if item.part == part)

    @property
    def learned(self) -> Side:
        """Whether merged learned more of the mixture."""
        return _side(self.of("mixture"))

    @property
    def kept(self) -> Side:
        """Whether merged kept more of the base."""
        return _side(self.of("kept"))

    @property
    def unseen(self) -> Side:
        """Whether merged did better on the unseen tasks."""
        return _side(self.of("unseen"))

    @property
    def columns(self) -> dict[Part, Side]:
        """Every column; the unseen tasks only where they were measured."""
        sides: dict[Part, Side] = {"mixture": self.learned, "kept": self.kept}
        return sides | ({"unseen": self.unseen} if self.unseen is not Side.UNKNOWN else {})

    @property
    def kept_by_drift_alone(self) -> bool:
        """Whether drift is the only measure that says that merged kept more, or less."""
        called = {item.metric for item in self.of("kept") if item.outcome in ("better", "worse")}
        return self.kept in (Side.MORE, Side.LESS) and called == {"drift"}


def comparisons(summary: Summary) -> tuple[Comparison, ...]:
    """The merged model against every other one, in the order of ``summary.paired``."""
    return tuple(
        Comparison(
            other,
            tuple(item for item in summary.paired if item.other == other),
            _budgets(summary, other) if other != "base" else None,
            summary.about.get(other),
        )
        for other in dict.fromkeys(item.other for item in summary.paired)
    )


def _budgets(summary: Summary, other: str) -> tuple[int, int] | None:
    ours, theirs = (summary.macro[name].trained_target_tokens for name in ("merged", other))
    return None if ours is None or theirs is None or ours == theirs else (ours, theirs)


def _side(items: Iterable[Difference]) -> Side:
    outcomes = {item.outcome for item in items}
    if {"better", "worse"} <= outcomes:
        return Side.MIXED
    if "better" in outcomes:
        return Side.MORE
    if "worse" in outcomes:
        return Side.LESS
    return Side.SAME if "unclear" in outcomes else Side.UNKNOWN


class Advice(Enum):
    """The reason for a recommendation."""

    BETTER = "better"
    """The model did better in one column and no worse in the others."""
    TRADE = "trade"
    """Each of the two models did better in some column."""
    EQUAL = "equal"
    """No clear difference in any column."""
    ONE_COLUMN = "one column"
    """The model did better in what could be compared, and what was kept could not be."""
    MIXED = "mixed"
    """The measures of a column disagree."""
    UNKNOWN = "unknown"
    """Too little was measured."""
    NOTHING_LEARNED = "nothing learned"
    """No clear sign that the merged model learned the mixture."""


@dataclass(frozen=True)
class Recommendation:
    """Which model to use.

    Attributes:
        use: Its name; None if the figures do not decide.
        advice: Why.
        against: The comparison that it is based on: with joint training if there is one, else with the base.
    """

    use: str | None
    advice: Advice
    against: Comparison | None = None


def recommend(found: Sequence[Comparison]) -> Recommendation:
    """Which model to use, from the comparisons of one run."""
    by_name = {item.other: item for item in found}
    base = by_name.get("base")
    if base is not None and base.learned in (Side.SAME, Side.LESS):
        return Recommendation("base", Advice.NOTHING_LEARNED, base)
    rival = by_name.get("joint", base)
    if rival is None:
        return Recommendation(None, Advice.UNKNOWN)
    sides = set(rival.columns.values())
    if Side.MIXED in sides:
        return Recommendation(None, Advice.MIXED, rival)
    if rival.learned is Side.UNKNOWN or (Side.UNKNOWN in sides and not sides & {Side.MORE, Side.LESS}):
        return Recommendation(
            None, Advice.UNKNOWN, rival
        )  # what hardly trained keeps more, which is no reason to use it
    if {Side.MORE, Side.LESS} <= sides:
        return Recommendation(None, Advice.TRADE, rival)
    if sides == {Side.SAME}:
        return Recommendation(None, Advice.EQUAL, rival)
    better = "merged" if Side.MORE in sides else rival.other
    return Recommendation(better, Advice.ONE_COLUMN if Side.UNKNOWN in sides else Advice.BETTER, rival)


def across_seeds(runs: Sequence[Comparison]) -> tuple[Side, Side, Side]:
    """Conclusions about two methods, learned, kept and unseen, from runs with different seeds.

    A method learned (kept) more only if at least :data:`MIN_SEEDS` seeds were run and all of them agree.

    Args:
        runs: The comparison of each seed's run.
    """
    if len(runs) < MIN_SEEDS:
        return Side.UNKNOWN, Side.UNKNOWN, Side.UNKNOWN

    def together(sides: set[Side]) -> Side:
        if len(sides) == 1:
            return next(iter(sides))
        return Side.MIXED if {Side.MORE, Side.LESS} <= sides else Side.SAME

    return (
        together({item.learned for item in runs}),
        together({item.kept for item in runs}),
        together({item.unseen for item in runs}),
    )
