"""The loss' curvature at the base: leading eigenvalues of its Hessian, and how negative it gets. Source: Appendix F.3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import psutil

from merit.diagnostics.hessian import Hessian
from merit.diagnostics.lab import Lab
from merit.diagnostics.lanczos import Spectrum, lanczos
from merit.diagnostics.result import Diagnosis, graded
from merit.errors import ResourceError
from merit.progress import size as shown_size

__all__ = ["Curvature", "measure", "spectrum_at_base"]

READY, DOUBTFUL = 0.1, 0.5
"""Most negative Ritz value over the largest: the theory takes H ⪰ 0."""


@dataclass(frozen=True)
class Curvature(Diagnosis):
    """The Hessian's extreme eigenvalues.

    Attributes:
        leading: Largest Ritz values, descending.
        residuals: ‖Hv − λv‖ of each.
        smallest: Smallest Ritz value.
        ratio: |smallest| / largest if it is negative, else 0.
        ritz_values: All of them.
        steps: Lanczos steps taken.
        parameters: d.
        rows: Training rows.
        method: exact or difference.
        disagreement: Largest relative difference between products at the two step sizes; 0 for exact ones.
        gradient_norm: ‖∇L(θ0)‖ on these rows.
    """

    name: ClassVar[str] = "curvature"
    title: ClassVar[str] = "curvature at the base"
    rule: ClassVar[str] = (
        f"size of the most negative Ritz value over the largest: ready up to {READY}, doubtful up to {DOUBTFUL}"
    )
    units: ClassVar[dict[str, str]] = dict.fromkeys(
        ("leading", "residuals", "smallest", "ritz_values"), "nats per target token per squared weight"
    ) | {"gradient_norm": "nats per target token per weight"}

    leading: tuple[float, ...]
    residuals: tuple[float, ...]
    smallest: float
    ratio: float
    ritz_values: tuple[float, ...]
    steps: int
    parameters: int
    rows: int
    method: str
    disagreement: float
    gradient_norm: float


def spectrum_at_base(lab: Lab) -> tuple[Hessian, Spectrum]:
    """Leading eigenpairs of the Hessian at the base, computed once for all diagnostics.

    Raises:
        ResourceError: The Lanczos vectors do not fit in memory.
    """
    return lab.once("spectrum", lambda: _spectrum(lab))


def _spectrum(lab: Lab) -> tuple[Hessian, Spectrum]:
    settings = lab.settings
    hessian = Hessian(lab, lab.hessian_rows, method=settings.products)
    needed = 4 * hessian.size * (min(settings.lanczos_steps, hessian.size) + settings.eigenvectors)
    free = psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            f"diagnose: {settings.lanczos_steps} Lanczos vectors of {hessian.size:,} weights need "
            f"{shown_size(needed)} of memory, {shown_size(free)} are free.",
            "Lower diagnose.lanczos_steps, or train fewer weights (model.trainable).",
        )
    done = 0

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal done
        done += 1
        lab.progress(done, settings.lanczos_steps)
        return hessian.product(vector)

    found = lanczos(
        product,
        hessian.size,
        steps=settings.lanczos_steps,
        vectors=settings.eigenvectors,
        seed=lab.subject.seed,
        dtype=np.float32,
    )
    return hessian, found


def measure(lab: Lab) -> Curvature:
    """Lanczos on the mixture's loss at the base."""
    hessian, spectrum = spectrum_at_base(lab)
    count = lab.settings.eigenvectors
    largest, smallest = float(spectrum.values[0]), float(spectrum.values[-1])
    ratio = float("inf") if largest <= 0 else max(0.0, -smallest / largest)
    reason = f"eigenvalues from {smallest:.3g} to {largest:.3g}: the most negative is {ratio:.0%} of the largest"
    return Curvature(
        graded(ratio, READY, DOUBTFUL),
        reason,
        leading=tuple(map(float, spectrum.values[:count])),
        residuals=tuple(map(float, spectrum.residuals[:count])),
        smallest=smallest,
        ratio=min(ratio, 1e6),
        ritz_values=tuple(map(float, spectrum.values)),
        steps=len(spectrum.values),
        parameters=hessian.size,
        rows=len(lab.hessian_rows.rows),
        method=hessian.method,
        disagreement=hessian.disagreement,
        gradient_norm=float(np.linalg.norm(hessian.gradient())),
    )
