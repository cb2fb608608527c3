"""The mean gradient of a sample of rows at the base, compressed while it is computed.

Model-facing: it is handed a model, rows and an array to fill; it chooses no rows, no folders, and compares nothing.

Two ways to the same vectors, up to float rounding. *held*: gradients add up in ``parameter.grad`` over all micro-batches
of a quarter-sample and are folded once; needs memory for one gradient. *streamed*: a hook folds every parameter's gradient
the moment it is complete and frees it, so that memory is model + activations + the largest single parameter's gradient.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from merit.conflict.reliability import PARTS
from merit.conflict.sketch import Sketch
from merit.conflict.store import Sums
from merit.errors import ConflictError, ResourceError
from merit.hf.batches import Batcher, iterate_batches, length_sorted_batches, target_losses
from merit.hf.models import trainable_parameters
from merit.hf.rows import EncodedRow
from merit.recipe.schema import ConflictSettings

Memory = Literal["auto", "held", "streamed"]


class Representation(Protocol):
    """Takes a gradient parameter by parameter; fills a float32 row with what is kept of it."""

    def begin(self, row: np.ndarray) -> None:
        """Start at zero; ``row`` (D,) float32 is where the result goes."""

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Add one parameter's gradient (or a further micro-batch's share of it)."""

    def end(self) -> None:
        """Everything is added: ``row`` is the result."""


class SketchRepresentation:
    """Count sketch, filled in float64 and rounded once."""

    def __init__(self, size: int, seed: int, device: torch.device) -> None:
        self._sketch = Sketch(size, seed, device)

    def begin(self, row: np.ndarray) -> None:
        """Start at zero."""
        self._row = row
        self._sketch.reset()

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Add one parameter's gradient."""
        self._sketch.add(name, gradient)

    def end(self) -> None:
        """Round to float32."""
        self._row[:] = self._sketch.vector().numpy()


class StrideRepresentation:
    """Every s-th entry of the whole gradient (s = 1: all of it), in the model's parameter order. Source: paper §4."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], stride: int) -> None:
        self._stride = stride
        self._places: dict[str, tuple[int, int]] = {}
        seen = 0
        for name, parameter in parameters.items():
            skip = -seen % stride
            self._places[name] = (skip, (seen + skip) // stride)
            seen += parameter.numel()

    def begin(self, row: np.ndarray) -> None:
        """Start at zero."""
        self._row = row
        row[:] = 0

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Add one parameter's kept entries."""
        skip, place = self._places[name]
        kept = gradient.detach().reshape(-1)[skip :: self._stride].float().cpu().numpy()
        self._row[place : place + len(kept)] += kept

    def end(self) -> None:
        """The row is complete."""


def vector_width(settings: ConflictSettings, parameters: int) -> int:
    """D: float32 entries kept of one gradient, by number of trainable parameters."""
    if settings.representation == "sketch":
        return settings.sketch_size
    return -(-parameters // (settings.stride if settings.representation == "stride" else 1))


def make_representation(
    settings: ConflictSettings, parameters: Mapping[str, torch.nn.Parameter], seed: int, device: torch.device
) -> Representation:
    """What ``conflict.representation`` names."""
    if settings.representation == "sketch":
        return SketchRepresentation(settings.sketch_size, seed, device)
    return StrideRepresentation(parameters, settings.stride if settings.representation == "stride" else 1)


def default_batch_tokens(model: PreTrainedModel, device: torch.device) -> int:
    """Padded tokens per micro-batch: on a CPU, float32 logits stay under 135 MB; on CUDA a start that may be halved."""
    if device.type == "cuda":
        return 65536
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 32768))
    return max(256, min(4096, 2**25 // vocabulary))


class GradientMeter:
    """Measures gradients of rows, one model for many datasets.

    Args:
        model: A causal LM with its trainable subset marked; it is put in eval mode (no dropout).
        settings: Representation, weighting, micro-batch size.
        seed: Seed of the sketch.
        batcher: Makes the batches.
        device: Where the model is.
        autocast: Makes the context that forward passes run in. Default: none.
        memory: held, streamed, or auto: held where a whole gradient takes less than a quarter of the free memory and every
            trainable parameter is float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: ConflictSettings,
        *,
        seed: int,
        batcher: Batcher,
        device: torch.device,
        autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        memory: Memory = "auto",
    ) -> None:
        self.model: PreTrainedModel = model
        model.train(False)
        self.parameters = trainable_parameters(model)
        self.width = vector_width(settings, sum(p.numel() for p in self.parameters.values()))
        self.held = _can_hold(self.parameters, device) if memory == "auto" else memory == "held"
        self.batch_tokens = settings.batch_tokens or default_batch_tokens(model, device)
        self._settings, self._batcher, self._device, self._autocast = settings, batcher, device, autocast
        self._representation = make_representation(settings, self.parameters, seed, device)
        self._sums: dict[str, torch.Tensor] = {}

    def measure(self, name: str, rows: Sequence[EncodedRow], out: np.ndarray, sums: Sums) -> None:
        """Fill ``out`` with the weighted gradient *sums* of the rows at places 0, 4, 8 ..., 1, 5 ..., 2, 6 ... and 3, 7 ...

        Args:
            name: The dataset's name, for messages.
            rows: The sample in the order drawn; every row has at least one target.
            out: (4, D) float32. Row p: Σ w_i ∇L_i over i = p, p + 4, p + 8 ..., where L_i is example i's mean
                target-token loss; w_i = 1 with weighting ``examples``, its number of targets with ``tokens``.
            sums: Filled with the same rows' counts, weights and losses.

        Raises:
            ConflictError: A loss or gradient is not finite; the parameter is named.
            ResourceError: Not even one row fits in memory.
        """
        started = time.perf_counter()
        for place in range(PARTS):
            part = rows[place::PARTS]
            weight, squared, example_loss, token_loss, tokens = self._part(name, part, out[place]).tolist()
            sums.examples.append(len(part))
            sums.weight.append(weight)
            sums.weight_squared.append(squared)
            sums.example_loss.append(example_loss)
            sums.token_loss.append(token_loss)
            sums.tokens.append(int(tokens))
        sums.seconds = time.perf_counter() - started

    def _part(self, name: str, rows: Sequence[EncodedRow], row: np.ndarray) -> np.ndarray:
        while True:
            try:
                return self._attempt(name, rows, row)
            except torch.OutOfMemoryError:
                if self.batch_tokens <= max((len(r.input_ids) for r in rows), default=1):
                    raise ResourceError(
                        f"conflict: one example of {name} does not fit in the device's memory.",
                        "Lower train.max_length, or use a device with more memory.",
                    ) from None
                self.batch_tokens //= 2
            torch.cuda.empty_cache()

    def _attempt(self, name: str, rows: Sequence[EncodedRow], row: np.ndarray) -> np.ndarray:
        """Fill one row; Σw, Σw², Σ example-mean loss, Σ token loss, Σ targets."""
        total = np.zeros(5)
        self._sums = {}
        self._representation.begin(row)
        self.model.zero_grad(set_to_none=True)
        hooks = (
            []
            if self.held
            else [
                p.register_post_accumulate_grad_hook(self._hook(n))  # type: ignore[no-untyped-call]
                for n, p in self.parameters.items()
            ]
        )
        try:
            batches = length_sorted_batches([len(r.input_ids) for r in rows], self.batch_tokens)
            for _, batch in iterate_batches(rows, batches, self._batcher, self._device):
                total += self._backward(name, batch)
            for parameter_name, parameter in self.parameters.items() if self.held else ():
                if parameter.grad is not None:
                    self._take(parameter_name, parameter)
        finally:
            for hook in hooks:
                hook.remove()
            self.model.zero_grad(set_to_none=True)
        self._check_finite(name)
        self._representation.end()
        return total

    def _backward(self, name: str, batch: Mapping[str, torch.Tensor]) -> np.ndarray:
        with self._autocast():
            losses, counts = target_losses(self.model, batch)
        means = losses / counts.clamp(min=1)
        total = (means if self._settings.weighting == "examples" else losses).sum()
        if total.requires_grad:  # not so for rows without an image, where the projector alone is trained
            torch.autograd.backward(total)
        weights = torch.ones_like(means) if self._settings.weighting == "examples" else counts.double()
        sums = (
            torch.stack([x.detach().double().sum() for x in (weights, weights**2, means, losses, counts)]).cpu().numpy()
        )
        if not np.isfinite(sums).all():
            raise ConflictError(
                f"conflict: {name} has a non-finite loss at the base.",
                "Look for damaged weights (`merit check`), or leave the dataset out (conflict.skip_bad: true).",
            )
        return sums

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        return lambda parameter: self._take(name, parameter)

    def _take(self, name: str, parameter: torch.Tensor) -> None:
        """Fold a parameter's gradient and free it."""
        gradient = parameter.grad
        assert gradient is not None
        self._representation.add(name, gradient)
        total = gradient.sum(dtype=torch.float32)  # non-finite if any entry is; checked once, at the end
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        parameter.grad = None

    def _check_finite(self, name: str) -> None:
        if not self._sums:
            return
        finite = torch.isfinite(torch.stack(list(self._sums.values()))).tolist()
        if all(finite):
            return
        first = next(parameter for parameter, good in zip(self._sums, finite, strict=True) if not good)
        raise ConflictError(
            f"conflict: the gradient of {name} is not finite; first in {first}.",
            "Look for damaged weights or rows, use model.dtype float32, or leave the dataset out "
            "(conflict.skip_bad: true).",
        )


def _can_hold(parameters: Mapping[str, torch.nn.Parameter], device: torch.device) -> bool:
    if any(parameter.dtype != torch.float32 for parameter in parameters.values()):
        return False  # half-precision sums over many micro-batches would lose digits
    needed = sum(parameter.numel() * 4 for parameter in parameters.values())
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    return needed * 4 < free
