"""The diagnostics by name, and what each needs of its subject. A new one is one file, one line here, one test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from merit.diagnostics import (
    alignment,
    concentration,
    connectivity,
    curvature,
    displacement,
    embedding,
    gain,
    gap,
    perturbation,
    sensitivity,
    surface,
)
from merit.diagnostics.lab import Lab, Subject
from merit.diagnostics.result import Diagnosis
from merit.errors import RecipeError, nearest

__all__ = ["DIAGNOSTICS", "Entry", "chosen", "lacks"]


@dataclass(frozen=True)
class Entry:
    """One diagnostic.

    Attributes:
        measure: Looks at a subject.
        result: What it returns.
        branches: Fewest branches that it makes sense for.
        datasets: Fewest datasets.
        test: Whether it needs held-out rows.
        gradients: Whether it needs the datasets' gradients.
    """

    measure: Callable[[Lab], Diagnosis]
    result: type[Diagnosis]
    branches: int = 0
    datasets: int = 1
    test: bool = False
    gradients: bool = False


DIAGNOSTICS: Mapping[str, Entry] = {
    "connectivity": Entry(connectivity.measure, connectivity.Connectivity, branches=1),
    "displacement": Entry(displacement.measure, displacement.Displacement, branches=1),
    "gap": Entry(gap.measure, gap.Gap, branches=1, test=True),
    "perturbation": Entry(perturbation.measure, perturbation.Perturbation),
    "surface": Entry(surface.measure, surface.Surface),
    "curvature": Entry(curvature.measure, curvature.Curvature),
    "gain": Entry(gain.measure, gain.Gain, branches=2),
    "alignment": Entry(alignment.measure, alignment.Alignment, datasets=4, gradients=True),
    "concentration": Entry(concentration.measure, concentration.Concentration, datasets=3, gradients=True),
    "sensitivity": Entry(sensitivity.measure, sensitivity.Sensitivity),
    "embedding": Entry(embedding.measure, embedding.Embedding, datasets=4, gradients=True),
}


def chosen(names: Sequence[str]) -> list[str]:
    """The named diagnostics in the registry's order; all if none is named.

    Raises:
        RecipeError: There is no such diagnostic.
    """
    for name in names:
        if name not in DIAGNOSTICS:
            raise RecipeError(
                f"--only {name}: no such diagnostic.{nearest(name, tuple(DIAGNOSTICS))}",
                f"Diagnostics: {', '.join(DIAGNOSTICS)}.",
            )
    return [name for name in DIAGNOSTICS if not names or name in names]


def lacks(name: str, subject: Subject) -> str:
    """What a diagnostic needs and the subject does not have, in words; empty if it can be made."""
    entry = DIAGNOSTICS[name]
    if len(subject.branches) < entry.branches:
        few = "a branch" if entry.branches == 1 else f"{entry.branches} branches or more"
        return f"it needs {few}, there are {len(subject.branches)}"
    if len(subject.train) < entry.datasets:
        return f"it needs {entry.datasets} datasets or more, there are {len(subject.train)}"
    if entry.test and not any(len(dataset) for dataset in subject.test.values()):
        return "it needs held-out rows (test.jsonl), there are none"
    if entry.gradients and subject.geometry is None:
        return "it needs the datasets' gradients (`merit gradients`)"
    return ""
