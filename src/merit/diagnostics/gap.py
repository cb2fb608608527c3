"""Training loss against held-out loss: a merged model may fit the mixture less and carry over better.

Source: §3, Appendix B. Both are shown for every model; the training loss alone would mislead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from merit.diagnostics.lab import BASE, JOINT, MERGED, Lab
from merit.diagnostics.resampling import resampled
from merit.diagnostics.result import Diagnosis, Verdict
from merit.evaluation.fixed import FixedLosses

__all__ = ["Gap", "Line", "measure"]


@dataclass(frozen=True)
class Line:
    """One model.

    Attributes:
        model: Its name.
        train: Loss on the training rows (nats per target token).
        test: Loss on the held-out rows of the same datasets (nats per target token).
        gap: test − train.
    """

    model: str
    train: float
    test: float
    gap: float


@dataclass(frozen=True)
class Gap(Diagnosis):
    """Losses of every model on both sets.

    Attributes:
        lines: By model.
        gain_over_base: Held-out loss of the base − that of the merged model, and its interval over rows.
        gain_over_branches: Weighted mean of the branches' held-out losses − the merged model's, and its interval.
        train_over_joint: Training loss of the merged model − joint's (paper: +0.49 ... +1.27); None without joint.
        test_over_joint: The same on held-out rows.
    """

    name: ClassVar[str] = "gap"
    title: ClassVar[str] = "training loss against held-out loss"
    rule: ClassVar[str] = (
        "ready: the merged model's held-out loss is below the base's and below the branches' mean, both intervals "
        "excluding 0; doubtful: it is below the base's, or not clearly above it"
    )
    units: ClassVar[dict[str, str]] = dict.fromkeys(
        ("lines", "gain_over_base", "gain_over_branches", "train_over_joint", "test_over_joint"),
        "nats per target token",
    )

    lines: tuple[Line, ...]
    gain_over_base: float
    gain_over_base_ci95: tuple[float, float]
    gain_over_branches: float
    gain_over_branches_ci95: tuple[float, float]
    train_over_joint: float | None
    train_over_joint_ci95: tuple[float, float] | None
    test_over_joint: float | None
    test_over_joint_ci95: tuple[float, float] | None


def measure(lab: Lab) -> Gap:
    """Losses of every model on training and held-out rows."""
    names = list(lab.points)
    train = dict(zip(names, lab.losses(list(lab.points.values()), lab.train), strict=True))
    test = dict(zip(names, lab.losses(list(lab.points.values()), lab.test), strict=True))
    lines = tuple(Line(name, train[name].mean, test[name].mean, test[name].mean - train[name].mean) for name in names)

    def difference(found: dict[str, FixedLosses], weights: dict[str, float]) -> tuple[float, tuple[float, float]]:
        """Σ weight · loss over models, and its interval."""
        factors = np.array(list(weights.values()))
        sums = np.stack([found[name].sums for name in weights])
        counts = found[names[0]].counts
        value = float(factors @ sums.sum(axis=1) / counts.sum())
        return value, resampled(lambda losses: losses @ factors, sums, counts, lab.subject.seed)

    base, base_ci = difference(test, {BASE: 1.0, MERGED: -1.0})
    shares = {name: float(w) for name, w in zip(lab.branches, lab.weights, strict=True)}
    branches, branches_ci = difference(test, {**shares, MERGED: -1.0})
    joint = JOINT in names
    against = {MERGED: 1.0, JOINT: -1.0}
    on_train = difference(train, against) if joint else (None, None)
    on_test = difference(test, against) if joint else (None, None)
    verdict: Verdict = "not ready"
    if base_ci[0] > 0 and branches_ci[0] > 0:
        verdict = "ready"
    elif base_ci[1] >= 0:
        verdict = "doubtful"
    reason = (
        f"held out, the merged model gains {base:+.3f} nats per token over the base ({_shown(base_ci)}) and "
        f"{branches:+.3f} over its branches ({_shown(branches_ci)})"
    )
    return Gap(verdict, reason, lines, base, base_ci, branches, branches_ci, *on_train, *on_test)


def _shown(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.3f} to {interval[1]:+.3f}"
