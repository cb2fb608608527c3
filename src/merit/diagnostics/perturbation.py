"""How flat the loss is around a model: Gaussian weight noise of growing size, several draws of it. Source: Appendix B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from merit.diagnostics.lab import BASE, MERGED, Lab
from merit.diagnostics.result import Diagnosis, graded
from merit.hf.inplace import Noise

__all__ = ["Curve", "Perturbation", "flatness_auc", "measure"]

READY, DOUBTFUL = 0.1, 0.5
"""Mean rise of the base's loss (nats per target token) under relative noise of σ = ``JUDGED``."""
JUDGED = 0.05


@dataclass(frozen=True)
class Curve:
    """One model under one kind of noise.

    Attributes:
        model: base or merged.
        noise: ``absolute``: σ is the standard deviation of every weight's noise (the paper's); ``relative``: σ times
            the root mean square of the weights around it.
        sigmas: σ, in increasing order.
        rises: Mean over draws of L(θ + noise) − L(θ), by σ.
        errors: Standard error of that mean over draws, by σ.
        auc: Area under the mean rise from σ = 0 to the largest, over that σ: smaller is flatter.
        auc_error: Its standard error over draws.
    """

    model: str
    noise: str
    sigmas: tuple[float, ...]
    rises: tuple[float, ...]
    errors: tuple[float, ...]
    auc: float
    auc_error: float


@dataclass(frozen=True)
class Perturbation(Diagnosis):
    """Flatness of base and merged model.

    Attributes:
        curves: By model and kind of noise.
        draws: Noise seeds per σ.
        losses: Loss without noise, by model.
    """

    name: ClassVar[str] = "perturbation"
    title: ClassVar[str] = "loss under Gaussian weight noise"
    rule: ClassVar[str] = (
        f"mean rise of the base's loss under relative noise of σ = {JUDGED}: ready up to {READY} nats per token, doubtful "
        f"up to {DOUBTFUL}"
    )
    units: ClassVar[dict[str, str]] = {
        "curves.rises": "nats per target token",
        "curves.errors": "nats per target token",
        "curves.auc": "nats per target token",
        "losses": "nats per target token",
    }

    curves: tuple[Curve, ...]
    draws: int
    losses: dict[str, float]


def flatness_auc(sigmas: Sequence[float], rises: np.ndarray) -> np.ndarray:
    """Area under ΔL(σ) from 0, where ΔL is 0, to the largest σ, by trapezoids, divided by that σ.

    Args:
        sigmas: (S,) increasing, above 0.
        rises: (..., S).
    """
    places = np.array([0.0, *sigmas])
    values = np.concatenate([np.zeros((*rises.shape[:-1], 1)), rises], axis=-1)
    area: np.ndarray = np.trapezoid(values, places, axis=-1) / places[-1]
    return area


def curve_of(model: str, noise: str, sigmas: Sequence[float], rises: np.ndarray) -> Curve:
    """The curve of measured rises (draws, S)."""
    areas, root = flatness_auc(sigmas, rises), float(np.sqrt(len(rises)))
    return Curve(
        model,
        noise,
        tuple(sigmas),
        tuple(map(float, rises.mean(axis=0))),
        tuple(map(float, rises.std(axis=0, ddof=1) / root)),
        float(areas.mean()),
        float(areas.std(ddof=1) / root),
    )


def measure(lab: Lab) -> Perturbation:
    """Losses of base and merged model under every draw of every size of noise."""
    models = [name for name in (BASE, MERGED) if name in lab.points]
    sigmas = sorted(set(lab.settings.sigmas) | {JUDGED})
    seeds = [lab.subject.seed * 1000 + draw for draw in range(lab.settings.noise_seeds)]
    kinds = {"absolute": False, "relative": True}
    points = [list(lab.points[name]) for name in models]
    for name in models:
        for relative in kinds.values():
            points += [[*lab.points[name], (s, Noise(seed, relative))] for seed in seeds for s in sigmas]
    found = [losses.mean for losses in lab.losses(points, lab.train)]
    still = dict(zip(models, found, strict=False))
    noisy = np.array(found[len(models) :]).reshape(len(models), len(kinds), len(seeds), len(sigmas))
    curves = tuple(
        curve_of(name, kind, sigmas, noisy[i, j] - still[name])
        for i, name in enumerate(models)
        for j, kind in enumerate(kinds)
    )
    rise = curves[1].rises[sigmas.index(JUDGED)]
    error = curves[1].errors[sigmas.index(JUDGED)]
    reason = (
        f"noise of {JUDGED:.0%} of the weights' size raises the base's loss by {rise:.3f} ± {error:.3f} nats per token"
    )
    return Perturbation(graded(rise, READY, DOUBTFUL), reason, curves, len(seeds), still)
