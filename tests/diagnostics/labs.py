"""Laboratories for tests: an exactly quadratic loss behind the same interface, and tiny real models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from merit.conflict.reliability import PARTS
from merit.diagnostics.lab import Lab, Subject
from merit.evaluation.fixed import FixedLosses
from merit.hf.base import open_base
from merit.hf.inplace import Held, InPlace
from merit.recipe.diagnose import DiagnoseSettings
from merit.recipe.schema import ModelSettings
from merit.split.components import cosine_matrix, principal_components

NAMES = {"model.layers.0.weight": (3, 2), "model.norm.weight": (4,)}
WIDTH = 10
SETTINGS = DiagnoseSettings(
    points=5, surface_points=5, noise_seeds=3, lanczos_steps=10, eigenvectors=3, hessian_examples=8, task_examples=4
)


class Weights(torch.nn.Module):
    """Ten numbers in two tensors."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="quadratic")
        self.parts = torch.nn.ParameterList(
            torch.nn.Parameter(t, requires_grad=False) for t in tensors(values).values()
        )

    def state_dict(self, **_: Any) -> Any:
        return dict(zip(NAMES, self.parts, strict=True))

    def named_parameters(self, **_: Any) -> Any:
        return zip(NAMES, self.parts, strict=True)

    def flat(self) -> torch.Tensor:
        return torch.cat([p.reshape(-1) for p in self.parts])


def tensors(values: np.ndarray) -> dict[str, torch.Tensor]:
    """Ten numbers as tensors by name."""
    flat = torch.as_tensor(values, dtype=torch.float32)
    return {"model.layers.0.weight": flat[:6].reshape(3, 2), "model.norm.weight": flat[6:].clone()}


class QuadraticBatches:
    """Row i costs floor + ½(θ−θ_i)ᵀH(θ−θ_i) nats on one target token."""

    def __init__(
        self,
        hessian: np.ndarray,
        optima: np.ndarray,
        floor: float,
        owners: Any = None,
        names: tuple[str, ...] = ("rows",),
    ) -> None:
        self.hessian, self.optima = torch.as_tensor(hessian, dtype=torch.float32), torch.as_tensor(optima).float()
        self.floor, self.target_tokens, self.rows = floor, len(optima), list(optima)
        self.owners, self.names = np.zeros(len(optima), dtype=np.int64) if owners is None else owners, names

    def terms(self, model: Weights) -> Any:
        away = model.flat() - self.optima
        losses = self.floor + 0.5 * ((away @ self.hessian) * away).sum(dim=1)
        yield np.arange(len(away)), losses, torch.ones(len(away), dtype=torch.int64)

    def losses(self, model: Weights) -> FixedLosses:
        with torch.no_grad():
            [(_, losses, counts)] = self.terms(model)
        return FixedLosses(losses.double().numpy(), counts.numpy(), self.owners, self.names)


class QuadraticRows:
    """A dataset of rows that are their optima (n, d)."""

    def __init__(self, optima: np.ndarray) -> None:
        self.optima = optima
        self.target_counts = self.lengths = np.ones(len(optima), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.optima)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.optima[index]


class QuadraticMeter:
    """Sums of gradients H(θ0−θ_i) of rows at places 0, 4, 8 ..., 1, 5 ..., as the real one gives them."""

    width = WIDTH

    def __init__(self, hessian: np.ndarray, start: np.ndarray) -> None:
        self.hessian, self.start = hessian, start

    def measure(self, name: str, rows: Any, out: np.ndarray, sums: Any) -> None:
        for place in range(PARTS):
            out[place] = sum((self.hessian @ (self.start - row) for row in rows[place::PARTS]), np.zeros(WIDTH))


class QuadraticLab(Lab):
    """A laboratory whose loss is exactly quadratic.

    Args:
        hessian: H of every row.
        changes: δ_k of the branches.
        weights: w_k.
        seed: Of θ0 and of the rows' optima.
        gradients: Of datasets at θ0 (T, d), which then have two rows each, and a geometry; by default there is one dataset
            of six random rows.
        groups: Of the datasets ``0``, ``1`` ...
        joint: δ of a joint model.
    """

    def __init__(
        self,
        hessian: np.ndarray,
        changes: np.ndarray,
        weights: list[float],
        *,
        seed: int = 0,
        gradients: np.ndarray | None = None,
        groups: Any = (),
        joint: np.ndarray | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.hessian, self.changes, self.start = hessian, changes, rng.standard_normal(WIDTH)
        rows = {"rows": self.start + 0.3 * rng.standard_normal((6, WIDTH))}
        if gradients is not None:
            apart = 0.3 * rng.standard_normal(gradients.shape)
            middle = self.start - np.linalg.solve(hessian, gradients.T).T
            rows = {str(t): np.stack([m + a, m - a]) for t, (m, a) in enumerate(zip(middle, apart, strict=True))}
        self.optima = np.concatenate(list(rows.values()))
        branches = {f"branch-{k}": Path(str(k)) for k in range(len(changes))}
        base: Any = SimpleNamespace(batcher=None, settings=ModelSettings(base="none", dtype="float32"), family=None)
        train: Any = {name: QuadraticRows(optima) for name, optima in rows.items()}
        super().__init__(Subject(base, branches, weights, train, groups=groups, seed=seed), SETTINGS)
        ways = {f"branch-{k}": change for k, change in enumerate(changes)} | ({} if joint is None else {"joint": joint})
        self.__dict__ |= {
            "model": Weights(self.start),
            "folder": Held(tensors(self.start)),
            "directions": {name: Held(tensors(change)) for name, change in ways.items()},
            "meter": QuadraticMeter(hessian, self.start),
        }
        self.__dict__["place"] = InPlace(self.model, self.folder)
        if gradients is not None:
            self.__dict__["geometry"] = geometry_of(gradients)

    def fixed(self, rows: Any) -> Any:
        optima = np.array([row for part in rows.values() for row in part])
        owners = np.repeat(np.arange(len(rows)), [len(part) for part in rows.values()])
        return QuadraticBatches(self.hessian, optima, 20.0, owners, tuple(rows))

    def loss(self, change: np.ndarray) -> float:
        """The loss at θ0 + change, in float64."""
        away = self.start + change - self.optima
        return float(20.0 + 0.5 * ((away @ self.hessian) * away).sum(axis=1).mean())


def geometry_of(gradients: np.ndarray) -> Any:
    """What the diagnostics read of a geometry, from exact gradients."""
    gram = gradients @ gradients.T
    cosine = cosine_matrix(gram)
    columns, double = (principal_components(cosine, 3, way) for way in ("columns", "double"))
    arrays = SimpleNamespace(
        gram=gram,
        cosine=cosine,
        norm=np.linalg.norm(gradients, axis=1),
        scores=columns.scores,
        explained_variance=columns.explained_variance,
        scores_doubly_centred=double.scores,
    )
    return SimpleNamespace(names=tuple(map(str, range(len(gradients)))), arrays=arrays)


def random_hessian(seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((WIDTH, WIDTH))
    return root @ root.T / 4


def open_lab(base: Path, branches: dict[str, Path], train: Any, test: Any = None, **more: Any) -> Lab:
    """A laboratory of real models on a CPU."""
    settings = {"base": str(base), "dtype": "float32", **more.pop("model", {})}
    opened = open_base(ModelSettings.model_validate(settings))
    subject = Subject(opened, branches, [1.0] * len(branches), train, test or {}, **more)
    return Lab(subject, SETTINGS)
