"""How alike the norms of the datasets' gradients are: then cosines lead to raw gradients' axes. Source: Theorem F.4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from merit.conflict.geometry import norm_concentration
from merit.diagnostics.lab import Lab
from merit.diagnostics.result import Diagnosis, graded
from merit.split.components import doubly_centred
from merit.theory import space_sine

__all__ = ["Concentration", "measure"]

READY, DOUBTFUL = 0.25, 0.5
"""Coefficient of variation of the norms, 10 % trimmed (paper: 0.17)."""


@dataclass(frozen=True)
class Concentration(Diagnosis):
    """Norms of the gradients.

    Attributes:
        datasets: Names.
        norms: ‖g_t‖.
        mean: Of the norms.
        sd: Of the norms.
        max_over_min: Largest norm over the smallest.
        cv: sd / mean.
        cv_trimmed_5: The same without 5 % of the datasets at each end.
        cv_trimmed_10: The same without 10 % at each end.
        axis_angle: Angle between the leading axis of the (doubly centred) cosines and that of the inner products.
    """

    name: ClassVar[str] = "concentration"
    title: ClassVar[str] = "concentration of gradient norms"
    rule: ClassVar[str] = (
        f"coefficient of variation, 10 % trimmed at each end: ready up to {READY}, doubtful up to {DOUBTFUL}"
    )
    units: ClassVar[dict[str, str]] = {"norms": "nats per example per weight", "axis_angle": "degrees"}

    datasets: tuple[str, ...]
    norms: tuple[float, ...]
    mean: float
    sd: float
    max_over_min: float
    cv: float
    cv_trimmed_5: float
    cv_trimmed_10: float
    axis_angle: float


def measure(lab: Lab) -> Concentration:
    """From the geometry of the gradients."""
    arrays = lab.geometry.arrays
    figures = norm_concentration(arrays.norm)
    sine = space_sine(doubly_centred(arrays.cosine), doubly_centred(arrays.gram), 1)
    angle = float(np.degrees(np.arcsin(min(1.0, sine))))
    reason = (
        f"coefficient of variation {figures['cv']:.2f}, {figures['cv_trimmed_5']:.2f} and {figures['cv_trimmed_10']:.2f} "
        f"(raw, 5 % and 10 % trimmed); leading axes of cosines and of raw gradients are {angle:.0f}° apart"
    )
    return Concentration(
        graded(figures["cv_trimmed_10"], READY, DOUBTFUL),
        reason,
        datasets=lab.geometry.names,
        norms=tuple(map(float, arrays.norm)),
        axis_angle=angle,
        **figures,
    )
