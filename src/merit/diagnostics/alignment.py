"""Do the axes that a split cuts along lie along the loss' curvature? Source: Appendix F.3.

Four datasets, the farthest one from the origin in each quadrant of the first two axes of the doubly centred cosines; the
three leading eigenvectors of their gradients' Gram matrix, lifted to weight space; their angles with the leading
eigenvectors of the Hessian, and how far above chance these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from merit.diagnostics.curvature import spectrum_at_base
from merit.diagnostics.hessian import Hessian
from merit.diagnostics.lab import Lab
from merit.diagnostics.result import Diagnosis, Verdict
from merit.evaluation.fixed import choose_rows
from merit.split.components import doubly_centred

__all__ = ["Alignment", "Cosines", "corner_datasets", "lifted", "measure"]

READY, DOUBTFUL = (0.1, 5.0), (0.0, 3.0)
"""Least largest |cos|, and least z of it against random directions."""
AXES = 3
DRAWS = 2000
"""Random directions drawn for the null distribution."""


@dataclass(frozen=True)
class Cosines:
    """One variant of the conflict axes.

    Attributes:
        variant: ``raw``: Gram matrix of the gradients; ``centred``: of the gradients less their mean.
        cosines: |cos| of every conflict axis with every eigenvector (axes × eigenvectors).
        angles: Principal angles between the two spaces, in degrees, smallest first.
        largest: Largest |cos|. Paper: 0.30 (3B), 0.48 (256M).
        z: Of the largest, against the largest of as many Gaussian random directions.
    """

    variant: str
    cosines: tuple[tuple[float, ...], ...]
    angles: tuple[float, ...]
    largest: float
    z: float


@dataclass(frozen=True)
class Alignment(Diagnosis):
    """Conflict axes against the Hessian's leading eigenvectors.

    Attributes:
        datasets: The four, by quadrant of the first two axes: (+,+), (+,−), (−,+), (−,−); fewer where one is empty.
        variants: Raw and centred.
        null_mean: Mean over random directions of the largest |cos|.
        null_sd: Its standard deviation.
        eigenvectors: Number of the Hessian's leading eigenvectors.
        examples: Training rows per dataset's gradient.
    """

    name: ClassVar[str] = "alignment"
    title: ClassVar[str] = "conflict axes along the Hessian's eigenvectors"
    rule: ClassVar[str] = (
        f"largest |cos|: ready from {READY[0]} at z ≥ {READY[1]:g} above random directions, doubtful at z ≥ {DOUBTFUL[1]:g}"
    )
    units: ClassVar[dict[str, str]] = {"variants.angles": "degrees", "variants.z": "standard deviations"}

    datasets: tuple[str, ...]
    variants: tuple[Cosines, ...]
    null_mean: float
    null_sd: float
    eigenvectors: int
    examples: int


def corner_datasets(names: Sequence[str], scores: np.ndarray) -> list[str]:
    """In every sign quadrant of the first two axes the dataset farthest from the origin; empty quadrants are left out.

    Args:
        names: (T,).
        scores: (T, ≥2): PCA of the doubly centred cosines.
    """
    plane = scores[:, :2]
    found = []
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        inside = np.flatnonzero((np.where(plane >= 0, 1, -1) == signs).all(axis=1))
        if len(inside):
            found.append(names[int(inside[np.argmax((plane[inside] ** 2).sum(axis=1))])])
    return found


def lifted(gradients: np.ndarray, *, centred: bool, count: int = AXES) -> np.ndarray:
    """Leading eigenvectors of the gradients' Gram matrix, lifted to weight space as unit vectors (≤ count, d).

    There are fewer where the gradients span fewer dimensions, and none where all of them are alike and ``centred`` is set.

    Args:
        gradients: (n, d).
        centred: Use the doubly centred Gram matrix: the gradients less their mean.
        count: How many.
    """
    gram = gradients.astype(np.float64) @ gradients.T
    matrix = doubly_centred(gram) if centred else gram
    values, vectors = np.linalg.eigh(matrix)
    keep = [i for i in reversed(range(len(values))) if values[i] > 1e-10 * np.trace(gram)][:count]
    up = gradients - gradients.mean(axis=0) if centred else gradients
    axes = vectors[:, keep].T @ up
    unit: np.ndarray = axes / np.linalg.norm(axes, axis=1, keepdims=True)
    return unit


def compared(variant: str, axes: np.ndarray, eigenvectors: np.ndarray, null: tuple[float, float]) -> Cosines:
    """|cos| and angles of conflict axes (a, d) with eigenvectors (k, d), both of unit rows."""
    cosines = np.abs(axes.astype(np.float64) @ eigenvectors.T.astype(np.float64))
    one, two = np.linalg.qr(axes.T)[0], np.linalg.qr(eigenvectors.T)[0]
    singular = np.clip(np.linalg.svd(one.T @ two, compute_uv=False), 0, 1)
    largest = float(cosines.max())
    return Cosines(
        variant,
        tuple(tuple(map(float, row)) for row in cosines),
        tuple(map(float, np.degrees(np.arccos(singular)))),
        largest,
        (largest - null[0]) / null[1],
    )


def null_of(axes: int, eigenvectors: int, size: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation of the largest |cos| of Gaussian random directions in d dimensions.

    The cosines of one random direction with orthonormal vectors are z/√(Σz² + χ²) with d − k more squares: drawn exactly.
    """
    rng = np.random.default_rng([seed, size])
    normal = rng.standard_normal((DRAWS, axes, eigenvectors))
    rest = rng.chisquare(max(1, size - eigenvectors), (DRAWS, axes, 1))
    largest = (np.abs(normal) / np.sqrt((normal**2).sum(axis=2, keepdims=True) + rest)).max(axis=(1, 2))
    return float(largest.mean()), float(largest.std(ddof=1))


def measure(lab: Lab) -> Alignment:
    """Gradients of the corner datasets against the spectrum at the base."""
    geometry = lab.geometry
    names = corner_datasets(geometry.names, geometry.arrays.scores_doubly_centred)
    rows = choose_rows(lab.subject.train, lab.settings.task_examples, lab.subject.seed, "diagnose tasks")
    gradients = []
    for name in names:
        gradients.append(Hessian(lab, lab.fixed({name: rows[name]})).gradient())
    _, spectrum = spectrum_at_base(lab)
    stack = np.stack(gradients)
    null = null_of(min(AXES, len(names)), len(spectrum.vectors), stack.shape[1], lab.subject.seed)
    axes = {variant: lifted(stack, centred=variant == "centred") for variant in ("raw", "centred")}
    variants = tuple(compared(name, found, spectrum.vectors, null) for name, found in axes.items() if len(found))
    best = max(variants, key=lambda item: item.largest)
    verdict: Verdict = "not ready"
    if best.largest >= READY[0] and best.z >= READY[1]:
        verdict = "ready"
    elif best.z >= DOUBTFUL[1]:
        verdict = "doubtful"
    reason = (
        f"largest |cos| {best.largest:.3f} ({best.variant}), {best.z:.0f} standard deviations above random directions"
    )
    return Alignment(verdict, reason, tuple(names), variants, *null, len(spectrum.vectors), lab.settings.task_examples)
