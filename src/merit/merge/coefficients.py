"""Exact coefficients (c_0, c_1 ... c_K) of θ0 and the θ_k, for every tensor of a linear merge. Pure, no files.

A tensor's coefficients follow from the branches' weights: the same for all tensors, or those of the first pattern that
matches its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from merit.errors import MergeError
from merit.merge.arithmetic import exact_weights
from merit.merge.operators import Operator, Options, uses_weights
from merit.merge.patterns import assign_patterns
from merit.merge.weights import Branch, Weight, Weights

__all__ = ["Coefficients", "check_branches", "exact_coefficients", "exact_scale", "refuse_unused_weights"]


@dataclass(frozen=True)
class Coefficients:
    """How much of θ0 and of each branch is in each tensor.

    Attributes:
        default: (c_0, c_1 ... c_K) of every tensor that no pattern matches.
        weights: By pattern: the branches' exact weights before normalisation.
    """

    default: tuple[Fraction, ...]
    weights: Mapping[str, tuple[Fraction, ...]] = field(default_factory=dict)
    _by_pattern: Mapping[str, tuple[Fraction, ...]] = field(default_factory=dict)
    _pattern_of: Mapping[str, str] = field(default_factory=dict)

    def of(self, name: str) -> tuple[Fraction, ...]:
        """(c_0, c_1 ... c_K) of a tensor; the same object for all tensors with the same weights."""
        pattern = self._pattern_of.get(name)
        return self.default if pattern is None else self._by_pattern[pattern]


def exact_coefficients(
    operator: Operator, options: Options, branches: Sequence[Branch], scale: Fraction, names: Sequence[str]
) -> Coefficients:
    """Coefficients of every tensor; of tensors that a non-linear operator leaves to the average, for such an operator.

    Args:
        operator, options: The merge's.
        branches: At least one, checked.
        scale: λ.
        names: The tensors that are merged.

    Raises:
        MergeError: A pattern matches nothing, the weights of one sum to 0, or the operator takes no patterns.
    """
    patterns = [pattern for pattern, _ in branches[0].by_pattern]
    if patterns:
        refuse_unused_weights(operator, options, {pattern: () for pattern in patterns})
    taken = assign_patterns(patterns, names)
    weights = {
        pattern: _exact(pattern, [branch.by_pattern[place][1] for branch in branches])
        for place, pattern in enumerate(patterns)
    }

    def linear(counts: Sequence[Fraction]) -> tuple[Fraction, ...]:
        if operator.kind == "linear":
            first, rest = operator.function(counts, scale, **options)
            return (first, *rest)
        shares = counts if uses_weights(operator, options) else [Fraction(1)] * len(counts)
        return (1 - scale, *(scale * share / sum(shares, Fraction(0)) for share in shares))

    return Coefficients(
        linear(exact_weights([branch.weight for branch in branches])),
        weights,
        {pattern: linear(counts) for pattern, counts in weights.items()},
        taken,
    )


def _exact(pattern: str, weights: Sequence[Weight]) -> tuple[Fraction, ...]:
    exact = tuple(exact_weights(weights))
    if min(exact) < 0 or not sum(exact):
        raise MergeError(
            f"merge.weights: the weights of {pattern!r} for the branches that are merged are {list(map(float, exact))}; "
            "expected numbers of at least 0 with a sum above 0."
        )
    return exact


def refuse_unused_weights(operator: Operator, options: Options, weights: Weights) -> None:
    """Refuse weights that the user chose for an operator that would ignore them.

    Raises:
        MergeError: The operator takes no weights, or none by pattern.
    """
    chosen = not isinstance(weights, str) or weights == "auto"
    if chosen and not uses_weights(operator, options):
        raise MergeError(
            f"merge.weights: operator {operator.name} ignores weights, so a choice of weights would have no effect.",
            "Use average or task_arithmetic (normalize: true), or leave merge.weights at tokens.",
        )
    if operator.kind != "linear" and (isinstance(weights, Mapping) or weights == "auto"):
        what = "are searched" if weights == "auto" else "can differ by tensor name"
        raise MergeError(
            f"merge.weights {what} only for linear operators; {operator.name} is not one.",
            "Use average or task_arithmetic, or give one list of weights.",
        )


def exact_scale(scale: float | str) -> Fraction:
    """λ as an exact number; MergeError for ``auto``, which must have been searched by now."""
    if isinstance(scale, str):
        raise MergeError("scale: auto needs held-out data to measure.", "Give a number.")
    return exact_weights([scale])[0]


def check_branches(branches: Sequence[Branch]) -> list[Fraction]:
    """Exact weights before normalisation; MergeError for none, a repeated name or folder, a weight ≤ 0.

    A weight that a search found may be 0, as long as not all are.
    """
    if not branches:
        raise MergeError("There is nothing to merge: no branches are left.")
    names = [b.name for b in branches]
    if len(set(names)) != len(names):
        raise MergeError(f"Two branches have the same name: {', '.join(names)}.")
    seen: dict[Path, str] = {}
    for b in branches:
        other = seen.setdefault(b.path.resolve(), b.name)
        if other != b.name:
            raise MergeError(
                f"{other} and {b.name} are the same checkpoint: {b.path.resolve()}.",
                "List each checkpoint once; its weight says how much it counts.",
            )
        if not _positive(b.weight) and not (b.counted == "auto" and b.weight == 0):
            raise MergeError(
                f"{b.name} has weight {b.weight!r}; expected a positive number.",
                "Leave it out, or give it a weight above 0.",
            )
    counts = exact_weights([b.weight for b in branches])
    if not sum(counts):
        raise MergeError("All branches have weight 0.")
    return counts


def _positive(weight: Weight) -> bool:
    try:
        return math.isfinite(float(weight)) and exact_weights([weight])[0] > 0
    except (ValueError, TypeError, OverflowError):
        return False
