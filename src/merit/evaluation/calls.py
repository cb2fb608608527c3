"""What the differences come to: for each other model, whether merged learned more, and whether it kept more. No words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from merit.evaluation.figures import Difference, Part, Summary

__all__ = ["Comparison", "Side", "comparisons"]


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
        budgets: Target tokens that merged and the other were trained on, where they are known and differ.
        remark: How the other was made, where that is not the plain way.
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
    def kept_by_drift_alone(self) -> bool:
        """Whether no measure but drift says that merged kept more, or less."""
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
