"""How many examples a dataset's gradient needs: samples of growing size against the largest one. Source: Appendix B.

The largest sample contains the smaller ones, as in the paper's table, so cosines near its size are high by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from merit.conflict.reliability import PARTS
from merit.conflict.store import Sums
from merit.diagnostics.lab import Lab
from merit.diagnostics.result import Diagnosis, Verdict, graded
from merit.mixture.calibration import draw

__all__ = ["Sensitivity", "Sized", "measure"]

SIZES = (10, 25, 50, 100, 200, 300, 500, 700, 1000)
DATASETS = 8
"""Datasets that are measured, those with the most rows."""
READY, DOUBTFUL = 0.8, 0.6
"""Least mean cosine at ``JUDGED`` examples."""
JUDGED = 200
"""Examples at which the verdict is made (paper: cosine 0.847), or half of the largest sample where it is smaller."""


@dataclass(frozen=True)
class Sized:
    """One sample size: its mean cosine over datasets with the largest sample's gradient, and the datasets' own."""

    examples: int
    mean: float
    cosines: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity(Diagnosis):
    """Cosines by sample size.

    Attributes:
        datasets: Measured ones.
        largest: Size of their largest samples (examples).
        sizes: By size; a dataset takes part in those below its largest.
        judged: Size at which the verdict was made (examples).
    """

    name: ClassVar[str] = "sensitivity"
    title: ClassVar[str] = "calibration sensitivity"
    rule: ClassVar[str] = (
        f"mean cosine of the gradient of {JUDGED} examples (or half of the largest sample) with that of the largest "
        f"sample: ready from {READY}, doubtful from {DOUBTFUL}"
    )
    units: ClassVar[dict[str, str]] = {"sizes.examples": "examples", "largest": "examples", "judged": "examples"}

    datasets: tuple[str, ...]
    largest: tuple[int, ...]
    sizes: tuple[Sized, ...]
    judged: int


def measure(lab: Lab) -> Sensitivity:
    """Nested samples of the largest datasets."""
    subject = lab.subject
    names = sorted(subject.train, key=lambda name: (-len(subject.train[name]), name))[:DATASETS]
    meter = lab.meter
    largest, by_size = [], dict[int, list[float]]()
    for done, name in enumerate(names):
        dataset = subject.train[name]
        order = [int(i) for i in draw(len(dataset), SIZES[-1], subject.seed, name, purpose="diagnose sensitivity")]
        order = [i for i in order if dataset.target_counts[i] > 0]
        stops = [size for size in SIZES if size < len(order)] + [len(order)]
        vectors, total, begin = [], np.zeros(meter.width), 0
        for stop in stops:
            part = np.zeros((PARTS, meter.width), dtype=np.float32)
            meter.measure(name, [dataset[i] for i in order[begin:stop]], part, Sums())
            total = total + part.sum(axis=0, dtype=np.float64)
            vectors.append(total)
            begin = stop
        largest.append(len(order))
        for size, vector in zip(stops[:-1], vectors[:-1], strict=True):
            lengths = float(np.linalg.norm(vector) * np.linalg.norm(total))
            if lengths:  # rows without an image do not move a projector
                by_size.setdefault(size, []).append(float(vector @ total) / lengths)
        lab.progress(done + 1, len(names))
    sizes = tuple(Sized(size, float(np.mean(found)), tuple(found)) for size, found in sorted(by_size.items()))
    return _judged(tuple(names), tuple(largest), sizes)


def _judged(names: tuple[str, ...], largest: tuple[int, ...], sizes: tuple[Sized, ...]) -> Sensitivity:
    limit = min(JUDGED, max(largest) // 2)
    below = [item for item in sizes if item.examples <= limit]
    if not below:
        reason = f"the datasets have at most {max(largest)} examples: too few to compare samples"
        return Sensitivity("doubtful", reason, names, largest, sizes, 0)
    item = below[-1]
    verdict: Verdict = graded(-item.mean, -READY, -DOUBTFUL)
    reason = f"gradients of {item.examples} examples: mean cosine {item.mean:.3f} with those of up to {max(largest):,}"
    return Sensitivity(verdict, reason, names, largest, sizes, item.examples)
