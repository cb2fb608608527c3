"""Linear mode connectivity: does the loss rise on the straight path between two models? Source: §3, Appendix B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np

from merit.diagnostics.lab import BASE, MERGED, Lab, Point
from merit.diagnostics.resampling import resampled
from merit.diagnostics.result import Diagnosis, graded

__all__ = ["Connectivity", "Path", "barrier", "measure"]

READY, DOUBTFUL = 0.01, 0.05
"""Largest barrier as a share of the mean loss at the path's ends."""


@dataclass(frozen=True)
class Path:
    """The straight path between two models.

    Attributes:
        start: Model at α = 0.
        end: Model at α = 1.
        losses: At every α, on training rows (nats per target token).
        barrier: max_α [L(θ(α)) − ((1−α)L(0) + αL(1))] (nats per target token).
        barrier_ci95: Its bootstrap interval over rows.
        relative: The barrier over the mean of the two ends' losses.
    """

    start: str
    end: str
    losses: tuple[float, ...]
    barrier: float
    barrier_ci95: tuple[float, float]
    relative: float


@dataclass(frozen=True)
class Connectivity(Diagnosis):
    """All paths.

    Attributes:
        alphas: Places on a path.
        paths: Branch to branch, branch to merged, base to branch.
        rows: Training rows that the loss is the mean of.
    """

    name: ClassVar[str] = "connectivity"
    title: ClassVar[str] = "linear mode connectivity"
    rule: ClassVar[str] = (
        f"largest barrier over all paths, as a share of the ends' mean loss: ready up to {READY:.0%}, "
        f"doubtful up to {DOUBTFUL:.0%}"
    )
    units: ClassVar[dict[str, str]] = {
        "paths.losses": "nats per target token",
        "paths.barrier": "nats per target token",
        "paths.relative": "share of the ends' mean loss",
    }

    alphas: tuple[float, ...]
    paths: tuple[Path, ...]
    rows: int


def barrier(losses: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """max_α [L(α) − ((1−α)L(0) + αL(1))], which is at least 0 (at the ends).

    Args:
        losses: (..., P) along a path.
        alphas: (P,) from 0 to 1.

    Source: Appendix B; Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, arXiv:1912.05671.
    """
    chord = losses[..., :1] * (1 - alphas) + losses[..., -1:] * alphas
    highest: np.ndarray = (losses - chord).max(axis=-1)
    height: np.ndarray = np.maximum(highest, 0.0)
    return height


def between(start: Point, end: Point, alpha: float) -> Point:
    """The point (1−α)·start + α·end."""
    return [*((c * (1 - alpha), d) for c, d in start), *((c * alpha, d) for c, d in end)]


def pairs_of(branches: Sequence[str]) -> list[tuple[str, str]]:
    """Every path: branch to branch, branch to merged, base to branch."""
    merged = [(name, MERGED) for name in branches] if len(branches) > 1 else []
    return [*combinations(branches, 2), *merged, *((BASE, name) for name in branches)]


def measure(lab: Lab) -> Connectivity:
    """Losses on all paths; the ends are measured once."""
    alphas = np.linspace(0.0, 1.0, lab.settings.points)
    pairs = pairs_of(lab.branches)
    ends = [name for name in lab.points if any(name in pair for pair in pairs)]
    inner = [between(lab.points[a], lab.points[b], float(alpha)) for a, b in pairs for alpha in alphas[1:-1]]
    found = lab.losses([*(lab.points[name] for name in ends), *inner], lab.train)
    counts = found[0].counts
    at = {name: losses.sums for name, losses in zip(ends, found, strict=False)}
    between_ends = np.array([losses.sums for losses in found[len(ends) :]]).reshape(len(pairs), len(alphas) - 2, -1)
    paths = []
    for (a, b), middle in zip(pairs, between_ends, strict=True):
        sums = np.stack([at[a], *middle, at[b]])
        losses = sums.sum(axis=1) / counts.sum()
        height = float(barrier(losses, alphas))
        ci = resampled(lambda values: barrier(values, alphas), sums, counts, lab.subject.seed)
        paths.append(Path(a, b, tuple(map(float, losses)), height, ci, height / float(losses[[0, -1]].mean())))
    worst = max(paths, key=lambda path: path.relative)
    count = f"{len(paths)} path{'s' if len(paths) > 1 else ''}"
    reason = (
        f"largest barrier of {count}: {worst.barrier:.4f} nats per token ({worst.relative:.1%} of the ends' loss), "
        f"{worst.start} to {worst.end}"
    )
    verdict = graded(worst.relative, READY, DOUBTFUL)
    return Connectivity(verdict, reason, tuple(map(float, alphas)), tuple(paths), len(counts))
