"""How far the models moved from the base, how alike their ways are, and what averaging cancels. Source: §3, Appendix B."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from merit.diagnostics.lab import JOINT, MERGED, Lab
from merit.diagnostics.result import Diagnosis, graded
from merit.hf.inplace import Direction, blocks_of

__all__ = ["Displacement", "Layer", "Sums", "add_up", "layer_of", "measure"]

READY, DOUBTFUL = 0.1, 0.3
"""Largest ‖δ‖/‖θ0‖ of a branch: the quadratic picture is local."""


@dataclass(frozen=True)
class Layer:
    """One layer's share.

    Attributes:
        layer: ``layer 0`` ..., or the module outside of the layers.
        norms: ‖δ‖ of every model in it, in the order of ``models``.
        relative: The same over ‖θ0‖ in it.
    """

    layer: str
    norms: tuple[float, ...]
    relative: tuple[float, ...]


@dataclass(frozen=True)
class Displacement(Diagnosis):
    """Displacements δ = θ − θ0 in the trainable subset.

    Attributes:
        models: Branches, then the average of the branches (``average``), the merged model on disk and joint, if there.
        norms: ‖δ‖₂ by model.
        relative: ‖δ‖/‖θ0‖ by model.
        base_norm: ‖θ0‖₂.
        cosines: Between displacements (models × models).
        weighted_square: Σ w_k‖δ_k‖².
        average_square: ‖δ̄‖².
        spread: Σ w_k‖δ_k − δ̄‖²: what averaging cancels.
        identity_error: |weighted_square − average_square − spread| / weighted_square; 0 but for rounding.
        contraction: √(weighted_square / average_square): root mean square of the branches over the average.
        joint_ratio: ‖δ_joint‖/‖δ̄‖; None without a joint model. Paper: 2.43 ... 2.92, rising with the epochs.
        layers: Profile over the layers.
    """

    name: ClassVar[str] = "displacement"
    title: ClassVar[str] = "displacement from the base"
    rule: ClassVar[str] = f"largest ‖δ‖/‖θ0‖ of a branch: ready up to {READY:.0%}, doubtful up to {DOUBTFUL:.0%}"
    units: ClassVar[dict[str, str]] = {
        "norms": "L2 norm of weights",
        "base_norm": "L2 norm of weights",
        "relative": "share of ‖θ0‖",
        "contraction": "ratio",
        "joint_ratio": "ratio",
    }

    models: tuple[str, ...]
    norms: tuple[float, ...]
    relative: tuple[float, ...]
    base_norm: float
    cosines: tuple[tuple[float, ...], ...]
    weighted_square: float
    average_square: float
    spread: float
    identity_error: float
    contraction: float | None
    joint_ratio: float | None
    layers: tuple[Layer, ...]


@dataclass
class Sums:
    """Inner products of displacements, added up block by block in float64.

    Attributes:
        weights: w_k (K,), adding up to one.
        models: Number of displacements, the K branches first.
        gram: (models + 1, models + 1) inner products; the last is the average of the branches.
        base: ‖θ0‖².
        spread: Σ w_k‖δ_k − δ̄‖², from the differences themselves.
    """

    weights: np.ndarray
    models: int
    gram: np.ndarray = field(init=False)
    base: float = 0.0
    spread: float = 0.0

    def __post_init__(self) -> None:
        self.gram = np.zeros((self.models + 1, self.models + 1))

    def add(self, changes: np.ndarray, base: np.ndarray) -> None:
        """Add a block.

        Args:
            changes: (models, n) float64, the branches first.
            base: (n,) float64, θ0.
        """
        branches = changes[: len(self.weights)]
        average = self.weights @ branches
        every = np.vstack([changes, average])
        self.gram += every @ every.T
        self.base += float(base @ base)
        self.spread += float(self.weights @ ((branches - average) ** 2).sum(axis=1))

    @property
    def norms(self) -> np.ndarray:
        """‖δ‖ (models + 1,)."""
        return np.sqrt(np.diag(self.gram))

    @property
    def cosines(self) -> np.ndarray:
        """Cosines (models + 1, models + 1); 0 for a model that did not move."""
        lengths = np.outer(self.norms, self.norms)
        cosines: np.ndarray = np.zeros_like(self.gram)
        np.divide(self.gram, lengths, out=cosines, where=lengths > 0)
        return cosines


def layer_of(name: str) -> str:
    """``layer 3`` for a tensor of a numbered layer (``vision layer 3`` in an encoder), else the module it belongs to."""
    found = re.search(r"(?:^|\.)(layers|blocks|h)\.(\d+)\.", name)
    if found:
        inside = "vision " if re.search(r"visual|vision", name) else ""
        return f"{inside}layer {found[2]}"
    parts = [part for part in name.split(".") if part not in ("model", "language_model", "weight", "bias")]
    return parts[0] if parts else name


def measure(lab: Lab) -> Displacement:
    """Read every displacement once, block by block."""
    found = dict(lab.directions)
    if lab.subject.merged is not None:
        found[MERGED] = lab.points[MERGED][0][1]
    names = [*lab.branches, *(name for name in (MERGED, JOINT) if name in found)]
    return judged(names, *add_up(lab, [found[name] for name in names]))


def add_up(lab: Lab, directions: Sequence[Direction]) -> tuple[Sums, dict[str, Sums]]:
    """Inner products of displacements, the branches' first: of all weights, and by layer."""
    layers: dict[str, Sums] = {}
    total = Sums(lab.weights, len(directions))
    for done, (name, tensor) in enumerate(lab.place.tensors.items()):
        layer = layers.setdefault(layer_of(name), Sums(lab.weights, len(directions)))
        for block in blocks_of(name, tensor.shape):
            base = lab.folder.read(block).float()
            found = [direction.change(block, base) for direction in directions]
            changes = [np.zeros(base.numel()) if c is None else c.double().numpy().ravel() for c in found]
            for sums in (layer, total):
                sums.add(np.stack(changes), base.double().numpy().ravel())
        lab.progress(done + 1, len(lab.place.tensors))
    return total, layers


def judged(names: Sequence[str], total: Sums, layers: dict[str, Sums]) -> Displacement:
    """The result of finished sums."""
    count = len(total.weights)
    order = [*range(count), total.models, *range(count, total.models)]  # the average after the branches
    models = [*names[:count], "average", *names[count:]]
    norms, base = total.norms[order], float(np.sqrt(total.base))
    weighted = float(total.weights @ np.diag(total.gram)[:count])
    average = float(total.gram[-1, -1])
    contraction = float(np.sqrt(weighted / average)) if average > 0 else None
    joint = models.index(JOINT) if JOINT in models else None
    far = float(norms[:count].max() / base) if base else float("inf")
    reason = f"the farthest branch moved {far:.1%} of the base's norm"
    reason += f"; averaging contracts {contraction:.2f} ×" if contraction is not None else ""
    ratio = None if joint is None or average <= 0 else float(norms[joint] / np.sqrt(average))
    reason += f", joint is {ratio:.2f} × as far as the average" if ratio is not None else ""
    return Displacement(
        graded(far, READY, DOUBTFUL),
        reason,
        models=tuple(models),
        norms=tuple(map(float, norms)),
        relative=tuple(float(norm / base) for norm in norms),
        base_norm=base,
        cosines=tuple(tuple(map(float, row)) for row in total.cosines[np.ix_(order, order)]),
        weighted_square=weighted,
        average_square=average,
        spread=total.spread,
        identity_error=abs(weighted - average - total.spread) / weighted if weighted else 0.0,
        contraction=contraction,
        joint_ratio=ratio,
        layers=tuple(
            Layer(
                layer,
                tuple(map(float, sums.norms[order])),
                tuple(float(norm / np.sqrt(sums.base)) if sums.base else 0.0 for norm in sums.norms[order]),
            )
            for layer, sums in layers.items()
        ),
    )
