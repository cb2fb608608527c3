"""Gradients of a fixed set's mean loss, and products of its Hessian with vectors, on a model that stays as it is.

Exact products differentiate twice, which the memory-saving attention kernels cannot, so attention is computed by plain
matrix products meanwhile. Where that does not fit in memory: central differences of gradients at two step sizes; their
disagreement shows the error. Vectors are flat, in the order of the model's parameters. Model-facing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from merit.diagnostics.lab import Lab, Point
from merit.errors import CheckpointError, ResourceError
from merit.evaluation.fixed import FixedBatches
from merit.hf.inplace import Held
from merit.hf.models import file_names

__all__ = ["Hessian", "Method"]

Method = Literal["exact", "difference"]
STEP = 0.1
"""Length of the larger of the two difference steps, for a vector of unit length (the paper's ε)."""


class Hessian:
    """Derivatives of the mean loss per target token over fixed rows, with respect to the tensors that move.

    Args:
        lab: The model.
        batches: The rows.
        at: Where in weight space; default: the base.
        method: ``auto`` takes exact products if about six times the model fits in the device's free memory, and differences
            from the first product on that does not fit after all.
    """

    def __init__(
        self,
        lab: Lab,
        batches: FixedBatches,
        at: Point = (),
        method: Literal["auto", "exact", "difference"] = "auto",
    ) -> None:
        self._lab, self._batches, self._at = lab, batches, at
        names = file_names(lab.model)
        chosen = {names[name]: p for name, p in lab.model.named_parameters() if names[name] in lab.place.tensors}
        known = {p.data_ptr() for p in chosen.values()}
        chosen |= {
            names[name]: p  # a tied tensor whose other name is the one in the files
            for name, p in lab.model.named_parameters(remove_duplicate=False)
            if names[name] in lab.place.tensors and p.data_ptr() not in known
        }
        self.parameters: Mapping[str, torch.nn.Parameter] = chosen
        self.size = sum(p.numel() for p in chosen.values())
        self.method: Method = _fitting(self.size, lab.subject.device) if method == "auto" else method
        self._may_fall_back = method == "auto"
        self.disagreement = 0.0
        """Largest relative difference of products at the two step sizes; 0 for exact products."""

    # ---- flat vectors ------------------------------------------------------------------------------------------------

    def split(self, vector: np.ndarray | torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat vector (d,) as tensors by name, in the parameters' dtype, on their device."""
        flat, found, start = torch.as_tensor(vector), {}, 0
        for name, p in self.parameters.items():
            part = flat[start : start + p.numel()].view(p.shape)
            found[name] = part.to(p.device, p.dtype)
            start += p.numel()
        return found

    def displacement(self, point: Point) -> np.ndarray:
        """Σ c_i d_i of a point as a flat vector (d,) float32."""
        before = self._flat([p.detach() for p in self.parameters.values()]).astype(np.float64)
        with self._lab.moving() as move:
            move(point)
            after = self._flat([p.detach() for p in self.parameters.values()])
        moved: np.ndarray = (after - before).astype(np.float32)
        return moved

    @staticmethod
    def _flat(tensors: list[torch.Tensor]) -> np.ndarray:
        parts: np.ndarray = torch.cat([t.reshape(-1) for t in tensors]).float().cpu().numpy()
        return parts

    # ---- derivatives -------------------------------------------------------------------------------------------------

    def gradient(self) -> np.ndarray:
        """∇L (d,) float32."""
        with self._standing():
            return self._gradient()

    def product(self, vector: np.ndarray) -> np.ndarray:
        """Hv (d,) float32.

        Raises:
            ResourceError: Exact products were asked for and do not fit in the device's memory.
        """
        length = float(np.linalg.norm(vector.astype(np.float64)))
        if not length:
            return np.zeros(self.size, dtype=np.float32)
        if self.method == "exact":
            try:
                with self._standing():
                    return self._exact(vector)
            except torch.OutOfMemoryError as error:
                if not self._may_fall_back:
                    raise ResourceError(
                        "diagnose: an exact Hessian product does not fit in the device's memory.",
                        "Use diagnose.products: auto or difference, or a smaller diagnose.batch_tokens.",
                    ) from error
            self.method = "difference"
            if self._lab.subject.device.type == "cuda":
                torch.cuda.empty_cache()
        return self._difference(vector / length) * np.float32(length)

    @contextlib.contextmanager
    def _standing(self, offset: Point = ()) -> Iterator[None]:
        """The model at its point, plus an offset, ready to be differentiated."""
        parameters = list(self.parameters.values())
        with self._lab.moving() as move:
            if self._at or offset:
                move([*self._at, *offset])
            for p in parameters:
                p.requires_grad_(True)
            try:
                yield
            finally:
                for p in parameters:
                    p.requires_grad_(False)
                    p.grad = None

    def _losses(self) -> Iterator[torch.Tensor]:
        """The loss of every batch, adding up to the mean over target tokens."""
        for _, losses, _ in self._batches.terms(self._lab.model):
            yield losses.sum() / self._batches.target_tokens

    def _gradient(self) -> np.ndarray:
        parameters = list(self.parameters.values())
        total = [torch.zeros_like(p) for p in parameters]
        for loss in self._losses():
            for sum_, part in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if part is not None:
                    sum_ += part
        return _finite(self._flat(total))

    def _exact(self, vector: np.ndarray) -> np.ndarray:
        parameters, along = list(self.parameters.values()), list(self.split(vector).values())
        total = [torch.zeros_like(p) for p in parameters]
        with sdpa_kernel(SDPBackend.MATH):
            for loss in self._losses():
                first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                slope = sum((g * v).sum() for g, v in zip(first, along, strict=True) if g is not None)
                if not isinstance(slope, torch.Tensor) or not slope.requires_grad:
                    continue
                second = torch.autograd.grad(slope, parameters, allow_unused=True)
                for sum_, part in zip(total, second, strict=True):
                    if part is not None:
                        sum_ += part
        return _finite(self._flat(total))

    def _difference(self, unit: np.ndarray) -> np.ndarray:
        """(∇L(θ+εv) − ∇L(θ−εv)) / 2ε at ε and ε/2, joined so that the error of order ε² cancels."""
        direction = Held(self.split(unit))
        found = []
        for step in (STEP, STEP / 2):
            sides = []
            for sign in (step, -step):
                with self._standing([(sign, direction)]):
                    sides.append(self._gradient().astype(np.float64))
            found.append((sides[0] - sides[1]) / (2 * step))
        coarse, fine = found
        apart = float(np.linalg.norm(coarse - fine) / max(float(np.linalg.norm(fine)), 1e-300))
        self.disagreement = max(self.disagreement, apart)
        joined: np.ndarray = ((4 * fine - coarse) / 3).astype(np.float32)
        return joined


def _finite(vector: np.ndarray) -> np.ndarray:
    if not np.isfinite(vector).all():
        raise CheckpointError(
            "diagnose: a gradient is not finite.", "The model has diverged, or a row of the mixture is damaged."
        )
    return vector


def _fitting(size: int, device: torch.device) -> Method:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return "exact" if 6 * 4 * size < free else "difference"
