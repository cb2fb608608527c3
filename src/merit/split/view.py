"""The input of a split method: names, weights and geometry of the mixture, sorted by dataset name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from merit.errors import ConflictError, RecipeError

Groups = list[list[int]]
"""Indices into a :class:`MixtureView`, one list per group."""


class GradientGeometry(Protocol):
    """What a split needs from measured gradients (:class:`merit.conflict.result.Geometry` implements it)."""

    @property
    def names(self) -> Sequence[str]:
        """Dataset names (T,); row i of every matrix is dataset i."""

    @property
    def gram(self) -> np.ndarray:
        """Inner products (T, T)."""

    @property
    def cosine(self) -> np.ndarray:
        """Cosines (T, T)."""

    @property
    def inflation(self) -> np.ndarray:
        """Plain over unbiased norms (T,): the factors that remove the noise from cosines."""

    @property
    def unknown(self) -> Sequence[str]:
        """Datasets whose sampling noise is unknown."""

    @property
    def duplicates(self) -> Sequence[Sequence[str]]:
        """Groups of identical datasets."""

    def resampled(self, replicates: int, seed: int) -> Iterator[np.ndarray]:
        """Gram matrices as other calibration samples would give them."""


def needs_conflict(method: str) -> bool:
    """Whether a method uses the gradients' geometry (random and joint do not)."""
    return method not in ("random", "joint")


@dataclass(frozen=True)
class MixtureView:
    """Arrays of one mixture; row i everywhere is the i-th dataset in name order.

    Attributes:
        names: Dataset names (T,), sorted.
        weights: Positive weights (T,) float64: sample counts or target tokens.
        cosine: Cosine matrix (T, T) float64, or None if the method does not need it.
        gram: Inner products (T, T) float64, or None.
    """

    names: tuple[str, ...]
    weights: np.ndarray
    cosine: np.ndarray | None = None
    gram: np.ndarray | None = None

    def check(self, method: str) -> None:
        """Refuse what no method could use: weights that are not positive, missing or non-finite geometry."""
        if not np.all(np.isfinite(self.weights)) or np.any(self.weights <= 0):
            bad = self.names[int(np.argmin(np.where(np.isfinite(self.weights), self.weights, -1)))]
            raise RecipeError(f"split: every dataset needs a positive weight; {bad} has none.")
        if not needs_conflict(method):
            return
        if self.cosine is None:
            raise RecipeError(f"split.method {method} needs the gradients' geometry; run `merit gradients` first.")
        for matrix in (self.cosine, self.gram):
            if matrix is not None and not np.all(np.isfinite(matrix)):
                bad = self.names[int(np.argmin(np.isfinite(matrix).all(axis=1)))]
                raise ConflictError(f"split: the gradient geometry of {bad} is not finite.")
