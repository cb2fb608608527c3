"""A plane through weight space around the base, with the models on it: do they lie in one basin? Source: §3, Figure 2.

The plane is that of the two leading principal directions of the branches' displacements; of random directions, relative to
the size of the weights, where there are fewer than two branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from merit.diagnostics.displacement import add_up
from merit.diagnostics.lab import BASE, Lab, Point
from merit.diagnostics.result import Diagnosis, graded
from merit.hf.inplace import Noise

__all__ = ["AVERAGE", "Place", "Surface", "measure", "plane"]

AVERAGE = "average"
"""The weighted average of the branches, which need not be the merged model (``merge.scale``, other operators)."""
READY, DOUBTFUL = 0.01, 0.05
"""Share of the loss by which the base's surroundings may rise above the highest model before they count as a ridge."""
MARGIN = 0.35
"""How far the grid reaches beyond the outermost model, as a share of the models' extent."""
RANDOM_REACH = 0.1
"""Reach of the grid where the directions are random, in units of the weights' size."""


@dataclass(frozen=True)
class Place:
    """A model's place on the plane, and how far it lies off it (L2 norms of weights)."""

    model: str
    x: float
    y: float
    off: float


@dataclass(frozen=True)
class Surface(Diagnosis):
    """Losses on a grid.

    Attributes:
        directions: What the axes are.
        xs: Places on the first axis (L2 norm of weights; relative size where the directions are random).
        ys: Places on the second axis.
        losses: (ys, xs) on training rows.
        places: Where base, branches and their weighted average lie.
        model_losses: Loss of every model itself, in the order of ``places``.
        ridge: Highest loss inside the hull of the models over the highest loss of a model, less 1; 0 if it is below.
    """

    name: ClassVar[str] = "surface"
    title: ClassVar[str] = "loss surface around the base"
    rule: ClassVar[str] = (
        "rise of the loss inside the hull of base and branches above the highest model's: ready up to "
        f"{READY:.0%}, doubtful up to {DOUBTFUL:.0%}"
    )
    units: ClassVar[dict[str, str]] = {
        "losses": "nats per target token",
        "model_losses": "nats per target token",
        "xs": "L2 norm of weights",
        "ys": "L2 norm of weights",
        "ridge": "share of the highest model's loss",
    }

    directions: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    places: tuple[Place, ...]
    model_losses: tuple[float, ...]
    ridge: float


def plane(gram: np.ndarray) -> np.ndarray:
    """Coefficients (2, K) of the two leading orthonormal directions of K displacements with inner products ``gram``.

    Row a holds c with Σ_k c_k δ_k of unit length, along the a-th leading direction through the base.
    """
    values, vectors = np.linalg.eigh(gram)
    largest = values[::-1][:2]
    coefficients: np.ndarray = vectors[:, ::-1][:, :2].T / np.sqrt(np.maximum(largest, 1e-300))[:, None]
    kept: np.ndarray = coefficients * (largest > 1e-12 * largest[0])[:, None]
    return kept


def measure(lab: Lab) -> Surface:
    """Losses on the grid, and of the models."""
    size = lab.settings.surface_points
    if len(lab.branches) < 2:
        axes: list[Point] = [[(1.0, Noise(lab.subject.seed + a, relative=True))] for a in range(2)]
        xs = ys = np.linspace(-RANDOM_REACH, RANDOM_REACH, size)
        places = [Place(BASE, 0.0, 0.0, 0.0)]
        text = "two random directions, relative to the size of the weights"
    else:
        gram = add_up(lab, [lab.directions[name] for name in lab.branches])[0].gram
        coefficients = plane(gram[:-1, :-1])
        axes = [
            [(float(c), lab.directions[name]) for c, name in zip(row, lab.branches, strict=True)]
            for row in coefficients
        ]
        spots = gram[:, :-1] @ coefficients.T  # branches, then their average
        off = np.sqrt(np.maximum(np.diag(gram) - (spots**2).sum(axis=1), 0.0))
        names = [*lab.branches, AVERAGE]
        places = [Place(BASE, 0.0, 0.0, 0.0)]
        places += [Place(n, *map(float, (*spot, o))) for n, spot, o in zip(names, spots, off, strict=True)]
        xs, ys = (_reach(np.array([getattr(place, axis) for place in places]), size) for axis in "xy")
        text = "the two leading principal directions of the branches' displacements"
    grid: list[Point] = [
        [*((float(x) * c, d) for c, d in axes[0]), *((float(y) * c, d) for c, d in axes[1])] for y in ys for x in xs
    ]
    models = [lab.average if place.model == AVERAGE else lab.points[place.model] for place in places]
    found = [losses.mean for losses in lab.losses([*models, *grid], lab.train)]
    own, losses = found[: len(models)], np.array(found[len(models) :]).reshape(size, size)
    ridge = ridge_of(losses, xs, ys, places, max(own))
    reason = (
        f"inside the hull of {len(places)} models the loss rises at most {ridge:.1%} above the highest model"
        if len(places) > 1
        else f"fewer than two branches; around the base the loss is {losses.min():.3f} to {losses.max():.3f} nats per token"
    )
    return Surface(
        graded(ridge, READY, DOUBTFUL) if len(places) > 1 else "doubtful",
        reason,
        text,
        tuple(map(float, xs)),
        tuple(map(float, ys)),
        tuple(tuple(map(float, row)) for row in losses),
        tuple(places),
        tuple(own),
        ridge,
    )


def ridge_of(losses: np.ndarray, xs: np.ndarray, ys: np.ndarray, places: list[Place], highest: float) -> float:
    """Highest loss at grid points inside the convex hull of the models, over the highest model's, less 1; at least 0."""
    points = np.array([(place.x, place.y) for place in places])
    inside = [(i, j) for i, y in enumerate(ys) for j, x in enumerate(xs) if in_hull(np.array([x, y]), points)]
    return max([0.0, *(float(losses[i, j]) / highest - 1 for i, j in inside)])


def in_hull(point: np.ndarray, points: np.ndarray) -> bool:
    """Whether no line through ``point`` (2,) has all ``points`` (n, 2) strictly on one side: it lies in their hull."""
    away = points - point
    angles = np.sort(np.arctan2(away[:, 1], away[:, 0]))
    if (np.abs(away).max(axis=1) < 1e-12).any():
        return True
    gaps = np.diff(np.append(angles, angles[0] + 2 * np.pi))
    return bool(gaps.max() <= np.pi + 1e-9)  # a point between two others sees them half a turn apart


def _reach(places: np.ndarray, size: int) -> np.ndarray:
    extent = float(places.max() - places.min()) or 1.0
    return np.linspace(places.min() - MARGIN * extent, places.max() + MARGIN * extent, size)
