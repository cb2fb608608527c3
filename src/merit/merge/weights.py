"""How much each branch counts (w_k), and how far to go (λ of θ0 + λ τ). Pure: the losses at a λ are measured by the caller.

Source of the line θ0 + λ(θ̄ − θ0): Wortsman et al., Robust fine-tuning of zero-shot models, arXiv:2109.01903, eq. 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal, Protocol

from merit.errors import MergeError
from merit.progress import count
from merit.recipe.merge import DEFAULT_PATTERN, WeightRule

__all__ = [
    "Branch",
    "Judge",
    "Losses",
    "Point",
    "Rule",
    "ScaleSearch",
    "Trained",
    "condense",
    "lopsided",
    "search_scale",
    "weigh",
]

Rule = Literal["balanced", "learned", "keep"]
Weight = int | float | str | Fraction
Weights = WeightRule | Literal["auto"] | Sequence[float] | Mapping[str, WeightRule | Sequence[float]]


@dataclass(frozen=True)
class Branch:
    """One checkpoint that takes part in a merge.

    Attributes:
        path: Its folder.
        weight: Its weight before normalisation: a count, or any positive number. Floats are read as the decimals that they
            print as (0.3 is 3/10), so weights are exact rationals throughout.
        name: Its name in messages, card and record.
        fingerprint: Its recorded ``checkpoint.fingerprint``, if known: it is checked while the data streams by.
        counted: What ``weight`` counts (tokens ...), or ``auto``: found by a search; empty for a weight given by the user.
        by_pattern: (pattern, weight) for tensors whose names it matches (:mod:`merit.merge.patterns`); the others have
            ``weight``. All branches of a merge have the same patterns.
    """

    path: Path
    weight: Weight
    name: str
    fingerprint: str | None = None
    counted: str = ""
    by_pattern: tuple[tuple[str, Weight], ...] = ()


class Trained(Protocol):
    """What a merge needs from a trained branch."""

    @property
    def model(self) -> Path:
        """Its checkpoint folder."""
        ...

    @property
    def tokens(self) -> int:
        """Every token that it was trained on (prompt, image, answer), over all epochs: N_k."""
        ...

    @property
    def target_tokens(self) -> int:
        """Of these, the ones in the loss."""
        ...

    @property
    def samples(self) -> int:
        """Rows that it was trained on, over all epochs."""
        ...


def weigh(rule: Weights, trained: Mapping[int, Trained], total: int) -> list[Branch]:
    """Trained branches with their weights before normalisation.

    Args:
        rule: What is counted, one weight for each of the ``total`` branches, or one of these by pattern of tensor names.
            ``auto`` counts tokens: that is where the search begins.
        trained: By number.
        total: How many branches there are, including those left out.

    Raises:
        MergeError: The number of listed weights is not the number of branches.
    """
    if isinstance(rule, Mapping):
        named = {name: weigh(value, trained, total) for name, value in rule.items() if name != DEFAULT_PATTERN}
        return [
            replace(branch, by_pattern=tuple((name, parts[place].weight) for name, parts in named.items()))
            for place, branch in enumerate(weigh(rule.get(DEFAULT_PATTERN, "tokens"), trained, total))
        ]
    if not isinstance(rule, str):
        if len(rule) != total:
            raise MergeError(
                f"merge.weights lists {count(len(rule), 'weight')} for {count(total, 'branch')}.",
                "Give one for each branch, in the order of split/split.json.",
            )
        return [Branch(part.model, rule[k], f"branch {k}") for k, part in trained.items()]
    counts: dict[str, Callable[[Trained], int]] = {
        "tokens": lambda part: part.tokens,
        "auto": lambda part: part.tokens,
        "target_tokens": lambda part: part.target_tokens,
        "samples": lambda part: part.samples,
        "uniform": lambda part: 1,
    }
    counted = "tokens" if rule == "auto" else rule
    return [Branch(part.model, counts[rule](part), f"branch {k}", counted=counted) for k, part in trained.items()]


def lopsided(branches: Sequence[Branch], shares: Sequence[float]) -> list[str]:
    """A warning for every branch whose counted weight is far from an equal share: above 1.5/K or below 0.5/K."""
    equal = 1 / len(branches)
    return [
        f"{branch.name} has {share:.0%} of the weight (by {branch.counted}); an equal share is {equal:.0%}: the merged "
        + ("model is mostly this branch." if share > equal else "model contains little of this branch.")
        for branch, share in zip(branches, shares, strict=True)
        if branch.counted not in ("", "auto") and not 0.5 * equal <= share <= 1.5 * equal
    ]


def condense(warnings: Sequence[str], branches: int) -> list[str]:
    """Combine warnings that are the same for all branches."""
    said: dict[str, list[str]] = {}
    for warning in warnings:
        said.setdefault(re.sub(r"branch \d+", "every branch", warning), []).append(warning)
    return [line for general, lines in said.items() for line in ([general] if len(lines) == branches > 1 else lines)]


# ---- scale: auto -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """Two held-out losses, lower is better: on the mixture (learned), and on what the base could already do (kept)."""

    learned: float
    kept: float


@dataclass(frozen=True)
class Judge:
    """What the caller of a search provides.

    Attributes:
        losses: λ → its losses.
        kept: What ``Losses.kept`` is, in words.
        shared: Datasets whose rows are read here and in the evaluation.
    """

    losses: Callable[[float], Losses]
    kept: str = ""
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point(Losses):
    """One point on the line, at λ = ``scale``."""

    scale: float


@dataclass(frozen=True)
class ScaleSearch:
    """A searched λ.

    Attributes:
        rule: How it was picked.
        chosen: λ.
        points: The measured grid, in increasing order.
        kept: What the points' ``kept`` is, in words.
        rows_shared_with_evaluation: Datasets whose rows the evaluation also reads.
    """

    rule: Rule
    chosen: float
    points: tuple[Point, ...]
    kept: str = ""
    rows_shared_with_evaluation: tuple[str, ...] = field(default=())


def search_scale(losses: Callable[[float], Losses], grid: Sequence[float], rule: Rule) -> ScaleSearch:
    """Measure every λ of the grid, plus 0 (the base) and 1 (the plain merge), in increasing order, and pick one.

    Raises:
        MergeError: A loss is not finite.
    """
    points = []
    for scale in sorted({0.0, 1.0, *map(float, grid)}):
        found = losses(scale)
        points.append(Point(found.learned, found.kept, scale))
    return ScaleSearch(rule, pick_scale(points, rule).scale, tuple(points))


def pick_scale(points: Sequence[Point], rule: Rule = "balanced", tolerance: float = 0.05) -> Point:
    """Choose a point.

    Args:
        points: Measured points, at least one.
        rule: ``balanced``: the smallest of max(regret learned, regret kept), each regret scaled to 0 (best of the grid) … 1
            (worst). ``learned``: the smallest loss on the mixture. ``keep``: the smallest loss on the mixture among points
            whose kept loss is at most ``tolerance`` above that of the smallest λ.
        tolerance: For ``keep``, in nats per token: absolute, since a divergence from the base is 0 at the base.

    Returns:
        The point; among ties the one nearest to λ = 1, the plain merge.

    Raises:
        MergeError: A loss is not finite.
    """
    for p in points:
        if not (math.isfinite(p.learned) and math.isfinite(p.kept)):
            raise MergeError(f"The loss at scale {p.scale:g} is not finite ({p.learned}, {p.kept}).")

    def regret(values: list[float], value: float) -> float:
        low, high = min(values), max(values)
        return (value - low) / (high - low) if high > low else 0.0

    learned, kept = [p.learned for p in points], [p.kept for p in points]
    if rule == "balanced":
        return min(points, key=lambda p: (max(regret(learned, p.learned), regret(kept, p.kept)), abs(p.scale - 1)))
    allowed = list(points)
    if rule == "keep":
        limit = min(points, key=lambda p: abs(p.scale)).kept + tolerance
        allowed = [p for p in points if p.kept <= limit]
    return min(allowed, key=lambda p: (p.learned, abs(p.scale - 1)))
