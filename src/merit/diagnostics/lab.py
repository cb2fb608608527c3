"""What the diagnostics share: one loaded model that moves in weight space, the models as points there, and fixed rows.

Everything is made when it is first asked for, and once. Model-facing: it is handed folders and rows and chooses neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from merit.conflict.gradients import GradientMeter
from merit.conflict.result import Geometry
from merit.errors import CheckpointError
from merit.evaluation.fixed import FixedBatches, FixedLosses, choose_rows
from merit.evaluation.forward import Forward
from merit.hf.base import Base
from merit.hf.inplace import Direction, Folder, InPlace, Move
from merit.hf.models import autocast, load_model, trainable_names
from merit.hf.rows import EncodedRow
from merit.merge.direction import branch_direction
from merit.mixture.dataset import EncodedDataset
from merit.progress import Progress, silent
from merit.recipe.diagnose import DiagnoseSettings
from merit.recipe.schema import ConflictSettings

__all__ = ["BASE", "MERGED", "Lab", "Point", "Subject"]

BASE, MERGED, JOINT = "base", "merged", "joint"
SKETCH = 2**18
"""Entries kept of a gradient that is only compared with others."""
T = TypeVar("T")
Point = Sequence[tuple[float, Direction]]
"""A model as θ0 + Σ c_i d_i."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is diagnosed.

    Attributes:
        base: θ0; its settings name the trainable subset.
        branches: Checkpoint or adapter folders by name, in order.
        weights: w_k of the merge, any scale.
        train: The mixture's training rows.
        test: Its held-out rows; may be empty.
        merged: Folder of the merged model; None: the weighted average of the branches, made in memory.
        joint: Folder of the model trained on everything, if there is one.
        groups: The split's groups of datasets, if there is one.
        balance: What the split balances: samples or tokens.
        geometry: Measures or reads the datasets' gradients; None where there are none.
        seed: Of every draw.
        device: Where to compute.
    """

    base: Base
    branches: Mapping[str, Path]
    weights: Sequence[float]
    train: Mapping[str, EncodedDataset]
    test: Mapping[str, EncodedDataset] = field(default_factory=dict)
    merged: Path | None = None
    joint: Path | None = None
    groups: Sequence[Sequence[str]] = ()
    balance: str = "samples"
    geometry: Callable[[], Geometry] | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Lab:
    """One subject under examination.

    Args:
        subject: What is diagnosed.
        settings: The recipe's ``diagnose`` block.
        progress: Called as evaluations are made, with the current diagnostic's count.
    """

    def __init__(self, subject: Subject, settings: DiagnoseSettings | None = None, progress: Progress = silent) -> None:
        self.subject, self.settings, self.progress = subject, settings or DiagnoseSettings(), progress
        self._made: dict[str, object] = {}

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What several diagnostics need and only one of them should compute."""
        if name not in self._made:
            self._made[name] = make()
        return cast(T, self._made[name])

    # ---- weight space ------------------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base, loaded."""
        return load_model(self.subject.base, self.subject.device)

    @cached_property
    def folder(self) -> Folder:
        """θ0's values on disk."""
        return Folder(self.subject.base.folder)

    @cached_property
    def place(self) -> InPlace:
        """The model, ready to move in the trainable subset (adapters: in the weights that they may change)."""
        settings, family = self.subject.base.settings, self.subject.base.family
        names = trainable_names(list(self.folder.shapes), settings.trainable, family)
        return InPlace(self.model, self.folder, names)

    @cached_property
    def directions(self) -> dict[str, Direction]:
        """δ_k = θ_k − θ0 of every branch, and of the joint model."""
        found = {name: branch_direction(self.folder, path, name) for name, path in self.subject.branches.items()}
        if self.subject.joint is not None:
            found[JOINT] = branch_direction(self.folder, self.subject.joint, JOINT)
        return found

    @cached_property
    def weights(self) -> np.ndarray:
        """w_k (K,), adding up to one."""
        weights: np.ndarray = np.asarray(self.subject.weights, dtype=np.float64)
        shares: np.ndarray = weights / weights.sum()
        return shares

    @property
    def branches(self) -> list[str]:
        """Names of the branches."""
        return list(self.subject.branches)

    @cached_property
    def average(self) -> Point:
        """θ̄ as the weighted average of the branches, not rounded to a file's dtype."""
        return [(float(w), self.directions[name]) for w, name in zip(self.weights, self.branches, strict=True)]

    @cached_property
    def points(self) -> dict[str, Point]:
        """Every model: base, branches, merged, and joint if there is one."""
        named: dict[str, Point] = {BASE: [], **{name: [(1.0, self.directions[name])] for name in self.branches}}
        if self.subject.merged is not None:
            named[MERGED] = [(1.0, branch_direction(self.folder, self.subject.merged, MERGED))]
        elif self.branches:
            named[MERGED] = self.average
        if JOINT in self.directions:
            named[JOINT] = [(1.0, self.directions[JOINT])]
        return named

    # ---- rows --------------------------------------------------------------------------------------------------------

    @cached_property
    def forward(self) -> Forward:
        """How rows go through the model."""
        return Forward(self.subject.base.batcher, self.subject.device, self.settings.batch_tokens)

    def fixed(self, rows: Mapping[str, Sequence[EncodedRow]]) -> FixedBatches:
        """Rows by dataset, batched once."""
        return FixedBatches(rows, self.forward, self.model)

    @cached_property
    def train(self) -> FixedBatches:
        """Rows of the training mixture."""
        return self.fixed(choose_rows(self.subject.train, self.settings.examples, self.subject.seed, "diagnose train"))

    @cached_property
    def test(self) -> FixedBatches:
        """Held-out rows of the same datasets."""
        return self.fixed(choose_rows(self.subject.test, self.settings.examples, self.subject.seed, "diagnose test"))

    @cached_property
    def hessian_rows(self) -> FixedBatches:
        """Rows for products with the Hessian: as many of every dataset."""
        each = max(1, self.settings.hessian_examples // max(1, len(self.subject.train)))
        return self.fixed(choose_rows(self.subject.train, each, self.subject.seed, "diagnose hessian"))

    @cached_property
    def geometry(self) -> Geometry:
        """The datasets' gradients compared."""
        assert self.subject.geometry is not None
        return self.subject.geometry()

    @cached_property
    def meter(self) -> GradientMeter:
        """Measures gradients of rows at the base as the conflict stage does, on a model of its own."""
        subject = self.subject
        return GradientMeter(
            load_model(subject.base, subject.device, trainable=True, seed=subject.seed),
            ConflictSettings(sketch_size=SKETCH),
            seed=subject.seed,
            batcher=subject.base.batcher,
            device=subject.device,
            autocast=partial(autocast, subject.base.settings, subject.device),
        )

    # ---- measuring ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def moving(self) -> Iterator[Move]:
        """The model may be moved; at the end it is the base again."""
        with self.place.moving() as move:
            yield move

    def measure(self, batches: FixedBatches) -> FixedLosses:
        """Losses of the model where it stands.

        Raises:
            CheckpointError: One is not finite.
        """
        with autocast(self.subject.base.settings, self.subject.device):
            found = batches.losses(self.model)
        if not np.isfinite(found.sums).all():
            raise CheckpointError(
                "diagnose: a loss is not finite.",
                "A model has diverged, or weight noise overflows its dtype: use model.dtype: float32, or smaller "
                "diagnose.sigmas.",
            )
        return found

    def losses(self, points: Sequence[Point], batches: FixedBatches) -> list[FixedLosses]:
        """Losses at several points, one after another."""
        found = []
        with self.moving() as move:
            for done, point in enumerate(points):
                move(point)
                found.append(self.measure(batches))
                self.progress(done + 1, len(points))
        return found
