"""Laboratories for tests: an exactly quadratic loss behind the same interface, and tiny real models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from merit.diagnostics.lab import Lab, Subject
from merit.evaluation.fixed import FixedLosses
from merit.hf.base import open_base
from merit.hf.inplace import Held, InPlace
from merit.recipe.diagnose import DiagnoseSettings
from merit.recipe.schema import ModelSettings

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

    def __init__(self, hessian: np.ndarray, optima: np.ndarray, floor: float) -> None:
        self.hessian, self.optima = torch.as_tensor(hessian, dtype=torch.float32), torch.as_tensor(optima).float()
        self.floor, self.target_tokens, self.rows = floor, len(optima), list(optima)

    def terms(self, model: Weights) -> Any:
        away = model.flat() - self.optima
        losses = self.floor + 0.5 * ((away @ self.hessian) * away).sum(dim=1)
        yield np.arange(len(away)), losses, torch.ones(len(away), dtype=torch.int64)

    def losses(self, model: Weights) -> FixedLosses:
        with torch.no_grad():
            [(_, losses, counts)] = self.terms(model)
        return FixedLosses(losses.double().numpy(), counts.numpy(), np.zeros(len(losses), dtype=np.int64), ("rows",))


class QuadraticLab(Lab):
    """A laboratory whose loss is exactly quadratic."""

    def __init__(self, hessian: np.ndarray, changes: np.ndarray, weights: list[float], *, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.hessian, self.changes, self.start = hessian, changes, rng.standard_normal(WIDTH)
        self.optima = self.start + 0.3 * rng.standard_normal((6, WIDTH))
        branches = {f"branch-{k}": Path(str(k)) for k in range(len(changes))}
        base: Any = SimpleNamespace(batcher=None, settings=ModelSettings(base="none", dtype="float32"), family=None)
        super().__init__(Subject(base, branches, weights, {}, {}, seed=seed), SETTINGS)
        self.__dict__ |= {
            "model": Weights(self.start),
            "folder": Held(tensors(self.start)),
            "directions": {f"branch-{k}": Held(tensors(change)) for k, change in enumerate(changes)},
            **dict.fromkeys(("train", "test", "hessian_rows"), QuadraticBatches(hessian, self.optima, 20.0)),
        }
        self.__dict__["place"] = InPlace(self.model, self.folder)

    def loss(self, change: np.ndarray) -> float:
        """The loss at θ0 + change, in float64."""
        away = self.start + change - self.optima
        return float(20.0 + 0.5 * ((away @ self.hessian) * away).sum(axis=1).mean())


def random_hessian(seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((WIDTH, WIDTH))
    return root @ root.T / 4


def open_lab(base: Path, branches: dict[str, Path], train: Any, test: Any = None, **more: Any) -> Lab:
    """A laboratory of real models on a CPU."""
    settings = {"base": str(base), "dtype": "float32", **more.pop("model", {})}
    opened = open_base(ModelSettings.model_validate(settings))
    subject = Subject(opened, branches, [1.0] * len(branches), train, test or {}, **more)
    return Lab(subject, SETTINGS)
