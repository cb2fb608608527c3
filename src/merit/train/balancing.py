"""Joint training that weighs the datasets of every step by their gradients: PCGrad and GradNorm.

Both are baselines that the paper only counts (§5, A.1.3): they need the gradient of every dataset at every step, so they run
where these fit in memory; :func:`cost` says what they would take. A dataset's loss is its part of the step's loss, so that
with all weights 1 the step is that of plain joint training.

Source: Yu et al., Gradient Surgery for Multi-Task Learning, arXiv 2001.06782, Algorithm 1; Chen et al., GradNorm, arXiv
1711.02257, Algorithm 1. Here GradNorm looks at all trained parameters (there is no last shared layer) and updates its
weights with Adam at 0.025; a step's datasets are those with rows in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from merit.errors import RecipeError
from merit.recipe.schema import TrainSettings

__all__ = ["Balancer", "Balancing", "Cost", "GradNorm", "PCGrad", "balancing_of", "cost", "refuse_large"]

ROOM = 8 * 2**30
"""Bytes that the gradients of one step's datasets may take."""
ALPHA, RATE = 1.5, 0.025


@dataclass(frozen=True)
class Cost:
    """What every optimizer step of gradient surgery takes.

    Attributes:
        backward: Backward passes, one per dataset.
        projections: Pairs of gradients, C(T, 2).
        bytes: Of the gradients of all datasets in half precision.
    """

    backward: int
    projections: int
    bytes: int


def cost(datasets: int, parameters: int) -> Cost:
    """The paper's count for T datasets and P trained parameters."""
    return Cost(datasets, datasets * (datasets - 1) // 2, 2 * datasets * parameters)


def refuse_large(settings: TrainSettings, datasets: int, parameters: int) -> None:
    """Refuse gradient surgery where a step's gradients do not fit, with what it would cost.

    Raises:
        RecipeError: They do not fit, or the branch is trained by several processes.
    """
    if settings.balancing == "none":
        return
    if settings.processes > 1:
        raise RecipeError(
            f"train.balancing: {settings.balancing} works in one process (train.processes is {settings.processes})."
        )
    needed = 4 * min(datasets, settings.batch_size) * parameters
    if needed > ROOM:
        count = cost(datasets, parameters)
        raise RecipeError(
            f"train.balancing: {settings.balancing} would hold {needed / 1e9:,.0f} GB of gradients at every step; at most "
            f"{ROOM / 1e9:,.0f} GB are allowed.",
            f"With {datasets} datasets and {parameters:,} trained parameters, one step over all of them takes "
            f"{count.backward:,} backward passes, {count.projections:,} projections and {count.bytes / 1e9:,.0f} GB of "
            "fp16 gradients.",
            "Leave it out, or use a smaller model, a smaller batch or adapters (model.trainable: lora).",
        )


class Balancer(Protocol):
    """Weighs the gradients of a step's datasets."""

    def weights(self, gram: torch.Tensor, losses: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        """Weight of each gradient in the step.

        Args:
            gram: (t, t) float64, inner products of the gradients of the datasets' parts of the loss.
            losses: (t,) float64, nats per target token.
            which: Their numbers among the group's datasets.
        """

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds."""

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put it back."""


class PCGrad:
    """Every gradient is projected off those that it conflicts with, in random order; then they are added.

    Only inner products are needed: a projected gradient is a combination of the originals.
    """

    def weights(self, gram: torch.Tensor, losses: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        """Draws from torch's global generator, which checkpoints hold."""
        count = len(gram)
        total = torch.zeros(count, dtype=torch.float64)
        for i in range(count):
            mine = torch.zeros(count, dtype=torch.float64)
            mine[i] = 1
            for j in torch.randperm(count).tolist():
                product = mine @ gram[:, j]
                if j != i and product < 0:
                    mine[j] -= product / gram[j, j]
            total += mine
        return total

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing but the generator's."""
        return {}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Nothing."""


class GradNorm:
    """Weights that learn to make every dataset train at a like rate: large gradients and early learners count less.

    Args:
        datasets: How many the group has.
    """

    def __init__(self, datasets: int) -> None:
        self._w = torch.ones(datasets, dtype=torch.float64)
        self._first = torch.full((datasets,), float("nan"), dtype=torch.float64)
        self._moments = torch.zeros(2, datasets, dtype=torch.float64)
        self._steps = torch.zeros(datasets, dtype=torch.float64)

    def weights(self, gram: torch.Tensor, losses: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        """The weights of this step; they are updated for the next one."""
        at = torch.tensor(which)
        used = self._w[at].clone()
        self._first[at] = torch.where(self._first[at].isnan(), losses, self._first[at])
        norms = gram.diagonal().clamp(min=0).sqrt()
        size = used * norms
        ratio = losses / self._first[at]
        target = size.mean() * (ratio / ratio.mean()) ** ALPHA
        self._adam(at, torch.sign(size - target) * norms)
        self._w *= len(self._w) / self._w.sum()
        return used

    def _adam(self, at: torch.Tensor, slope: torch.Tensor) -> None:
        self._steps[at] += 1
        mean, square = self._moments
        mean[at] = 0.9 * mean[at] + 0.1 * slope
        square[at] = 0.999 * square[at] + 0.001 * slope**2
        unbiased = mean[at] / (1 - 0.9 ** self._steps[at])
        spread = (square[at] / (1 - 0.999 ** self._steps[at])).sqrt()
        self._w[at] = (self._w[at] - RATE * unbiased / (spread + 1e-8)).clamp(min=1e-3)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights, first losses and Adam's moments."""
        return {"w": self._w, "first": self._first, "moments": self._moments, "steps": self._steps}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put them back."""
        self._w, self._first = state["w"], state["first"]
        self._moments, self._steps = state["moments"], state["steps"]


class Balancing:
    """The gradients of the datasets of one step, and how they become the step's gradient.

    Args:
        balancer: Weighs them.
        parameters: The trained ones.
    """

    def __init__(self, balancer: Balancer, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.balancer = balancer
        self._parameters = list(parameters)
        self._gradients: dict[int, torch.Tensor] = {}
        self._losses: dict[int, float] = {}

    def add(self, losses: torch.Tensor, owners: torch.Tensor, targets: torch.Tensor) -> None:
        """Take a micro-batch.

        Args:
            losses: (B,) summed loss of each row, with its graph.
            owners: (B,) dataset of each row.
            targets: Target tokens of the whole step.
        """
        present = sorted(set(owners.tolist()))
        for number, dataset in enumerate(present, 1):
            part = losses[(owners == dataset).to(losses.device)].sum()
            found = torch.autograd.grad(
                part / targets, self._parameters, retain_graph=number < len(present), allow_unused=True
            )
            pairs = zip(found, self._parameters, strict=True)
            flat = torch.cat([(torch.zeros_like(p) if g is None else g).float().flatten() for g, p in pairs])
            self._gradients[dataset] = self._gradients[dataset] + flat if dataset in self._gradients else flat
            self._losses[dataset] = self._losses.get(dataset, 0.0) + float(part.detach())

    def finish(self, targets: Mapping[int, int]) -> None:
        """Set the parameters' gradients for the step, and forget its datasets.

        Args:
            targets: Target tokens of the step by dataset.
        """
        which = sorted(self._gradients)
        stacked = torch.stack([self._gradients[dataset] for dataset in which])
        gram = torch.zeros(len(which), len(which), dtype=torch.float64, device=stacked.device)
        for part in torch.split(stacked, 2**20, dim=1):
            gram += part.double() @ part.double().T
        losses = torch.tensor([self._losses[dataset] / max(1, targets[dataset]) for dataset in which]).double()
        weights = self.balancer.weights(gram.cpu(), losses, which)
        whole = weights.to(stacked) @ stacked
        start = 0
        for parameter in self._parameters:
            stop = start + parameter.numel()
            parameter.grad = whole[start:stop].view_as(parameter).to(parameter)
            start = stop
        self._gradients, self._losses = {}, {}


def balancing_of(settings: TrainSettings, datasets: int, parameters: Sequence[torch.nn.Parameter]) -> Balancing | None:
    """What the settings ask for; None for plain training."""
    if settings.balancing == "none":
        return None
    return Balancing(PCGrad() if settings.balancing == "pcgrad" else GradNorm(datasets), parameters)
