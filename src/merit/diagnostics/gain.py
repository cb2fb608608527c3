"""What merging gains, measured, against what the curvature predicts from the branches' spread. Source: Theorem 3.1.

On an exactly quadratic loss the two are equal. Measured: Σ w_k L(θ_k) − L(θ̄). Predicted: ½ Σ w_k (δ_k−δ̄)ᵀH(δ_k−δ̄), by one
Hessian-vector product per branch, with H at the average and at the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from merit.diagnostics.hessian import Hessian
from merit.diagnostics.lab import Lab
from merit.diagnostics.resampling import resampled
from merit.diagnostics.result import Diagnosis, Verdict

__all__ = ["Gain", "measure"]

AGREES = (0.5, 2.0)
"""Predicted over measured gain within which the quadratic picture is said to hold."""


@dataclass(frozen=True)
class Gain(Diagnosis):
    """Both sides of Theorem 3.1, on the same training rows.

    Attributes:
        measured: Σ w_k L(θ_k) − L(θ̄).
        measured_ci95: Its bootstrap interval over rows.
        predicted: The right side with H at the average θ̄.
        predicted_at_base: The right side with H at θ0.
        ratio: predicted / measured; None where the measured gain is not above 0.
        branch_losses: L(θ_k), in the branches' order.
        merged_loss: L(θ̄).
        quadratic_forms: (δ_k−δ̄)ᵀH(δ_k−δ̄) at θ̄, in the branches' order.
        rows: Training rows.
        method: exact or difference.
    """

    name: ClassVar[str] = "gain"
    title: ClassVar[str] = "merging gain, predicted and measured"
    rule: ClassVar[str] = (
        "ready: the measured gain's interval is above 0 and the prediction is within "
        f"{AGREES[0]} and {AGREES[1]} times of it; doubtful: the gain is above 0"
    )
    units: ClassVar[dict[str, str]] = dict.fromkeys(
        ("measured", "predicted", "predicted_at_base", "branch_losses", "merged_loss", "quadratic_forms"),
        "nats per target token",
    )

    measured: float
    measured_ci95: tuple[float, float]
    predicted: float
    predicted_at_base: float
    ratio: float | None
    branch_losses: tuple[float, ...]
    merged_loss: float
    quadratic_forms: tuple[float, ...]
    rows: int
    method: str


def measure(lab: Lab) -> Gain:
    """Losses of branches and their average, and quadratic forms of the spread."""
    points = [*(lab.points[name] for name in lab.branches), lab.average]
    found = lab.losses(points, lab.hessian_rows)
    sums, counts = np.stack([losses.sums for losses in found]), found[0].counts
    losses = sums.sum(axis=1) / counts.sum()
    factors = np.append(lab.weights, -1.0)
    measured = float(losses @ factors)
    ci = resampled(lambda values: values @ factors, sums, counts, lab.subject.seed)
    forms, method = _forms(lab, at_base=False)
    at_base, method_at_base = _forms(lab, at_base=True)
    predicted, predicted_at_base = (float(0.5 * lab.weights @ values) for values in (forms, at_base))
    ratio = predicted / measured if measured > 0 else None
    verdict: Verdict = "not ready"
    if ci[0] > 0 and ratio is not None and AGREES[0] <= ratio <= AGREES[1]:
        verdict = "ready"
    elif measured > 0:
        verdict = "doubtful"
    reason = (
        f"measured {measured:+.4f} nats per token ({ci[0]:+.4f} to {ci[1]:+.4f}), predicted {predicted:+.4f} with the "
        f"curvature at the average, {predicted_at_base:+.4f} with the base's"
    )
    return Gain(
        verdict,
        reason,
        measured,
        ci,
        predicted,
        predicted_at_base,
        ratio,
        tuple(map(float, losses[:-1])),
        float(losses[-1]),
        tuple(map(float, forms)),
        len(counts),
        "difference" if "difference" in (method, method_at_base) else method,
    )


def _forms(lab: Lab, *, at_base: bool) -> tuple[np.ndarray, str]:
    """(δ_k−δ̄)ᵀH(δ_k−δ̄) of every branch (K,)."""
    hessian = Hessian(lab, lab.hessian_rows, () if at_base else lab.average, lab.settings.products)
    forms = []
    for number, name in enumerate(lab.branches):
        away = hessian.displacement([*lab.points[name], *((-c, d) for c, d in lab.average)])
        forms.append(float(away.astype(np.float64) @ hessian.product(away)))
        lab.progress(number + 1, len(lab.branches))
    return np.array(forms), hessian.method
