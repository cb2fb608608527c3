"""Gradient surgery against the algorithms as their papers write them, on vectors; and inside a branch."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from tests.train import cases
from tests.train.cases import assert_same_bits, train_elsewhere, weights

from merit.errors import RecipeError
from merit.recipe.schema import TrainSettings
from merit.train.balancing import ALPHA, RATE, Balancing, GradNorm, PCGrad, cost, refuse_large


def pcgrad_on_vectors(gradients: torch.Tensor, orders: list[list[int]]) -> torch.Tensor:
    """Algorithm 1 of arXiv 2001.06782, with given orders."""
    total = torch.zeros_like(gradients[0])
    for i, order in enumerate(orders):
        mine = gradients[i].clone()
        for j in order:
            if j != i and mine @ gradients[j] < 0:
                mine -= mine @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
        total += mine
    return total


@pytest.mark.parametrize("seed", range(5))
def test_pcgrad_is_the_papers_algorithm(seed: int) -> None:
    torch.manual_seed(seed)
    gradients = torch.randn(5, 7, dtype=torch.float64)
    torch.manual_seed(seed + 100)
    found = PCGrad().weights(gradients @ gradients.T, torch.ones(5).double(), range(5)) @ gradients
    torch.manual_seed(seed + 100)
    orders = [torch.randperm(5).tolist() for _ in range(5)]
    torch.testing.assert_close(found, pcgrad_on_vectors(gradients, orders), rtol=1e-9, atol=1e-9)


def test_pcgrad_agrees_with_torchjd() -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    gradients = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = gradients @ gradients.T
    ours, theirs = [], []
    for seed in range(200):  # their draws are others: the means over orders agree
        torch.manual_seed(seed)
        ours.append(PCGrad().weights(gram, torch.ones(4).double(), range(4)))
        theirs.append(torchjd.PCGradWeighting()(gram))
    torch.testing.assert_close(torch.stack(ours).mean(0), torch.stack(theirs).mean(0), rtol=0.2, atol=0.05)


def test_without_conflicts_pcgrad_is_the_sum() -> None:
    gradients = torch.rand(4, 6, dtype=torch.float64)
    assert PCGrad().weights(gradients @ gradients.T, torch.ones(4).double(), range(4)).tolist() == [1.0] * 4


def test_gradnorm_follows_the_gradient_of_its_own_loss() -> None:
    """The first update against autograd and torch's Adam: L = sum |w_t |g_t| - target_t|, the target held constant."""
    gradients = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first, later = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([0.9, 1.0, 3.9]).double()
    balancer = GradNorm(3)
    reference = torch.ones(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([reference], lr=RATE)
    norms = gradients.norm(dim=1)
    for losses in (first, later):
        found = balancer.weights(gradients @ gradients.T, losses, range(3))
        torch.testing.assert_close(found, reference.detach(), rtol=1e-6, atol=1e-6)
        sizes = reference * norms
        ratio = losses / first
        target = (sizes.mean() * (ratio / ratio.mean()) ** ALPHA).detach()
        adam.zero_grad()
        (sizes - target).abs().sum().backward()
        adam.step()
        with torch.no_grad():
            reference *= 3 / reference.sum()
    final = balancer.weights(gradients @ gradients.T, later, range(3))
    torch.testing.assert_close(final, reference.detach(), rtol=1e-6, atol=1e-6)
    assert final.sum() == pytest.approx(3)


def test_gradnorm_counts_large_gradients_less() -> None:
    balancer = GradNorm(2)
    gram = torch.diag(torch.tensor([100.0, 1.0]).double())
    for _ in range(20):
        found = balancer.weights(gram, torch.ones(2).double(), range(2))
    assert found[0] < 0.8 < 1.2 < found[1]


def test_weights_of_one_are_the_plain_gradient() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    inputs, owners = torch.randn(6, 4), torch.tensor([0, 1, 0, 2, 2, 1])

    class Ones(PCGrad):
        def weights(self, gram: torch.Tensor, losses: torch.Tensor, which: object) -> torch.Tensor:
            assert losses.tolist() == pytest.approx(means)
            return torch.ones(len(gram), dtype=torch.float64)

    rows = layer(inputs).square().sum(dim=1)
    means = [float(rows[owners == dataset].sum().detach()) / 2 for dataset in range(3)]
    (rows.sum() / 12).backward()
    plain = [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]
    layer.zero_grad()
    work = Balancing(Ones(), list(layer.parameters()))
    for part in (slice(0, 4), slice(4, 6)):
        work.add(layer(inputs[part]).square().sum(dim=1), owners[part], torch.tensor(12))
    work.finish({0: 2, 1: 2, 2: 2})
    for parameter, expected in zip(layer.parameters(), plain, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("kind", ["pcgrad", "gradnorm"])
def test_a_killed_branch_resumes_to_the_same_bits(root: Path, base: Path, tmp_path: Path, kind: str) -> None:
    settings = (f"train.balancing={kind}", "train.checkpoint_steps=2")
    words = [word for item in settings for word in ("--set", item)]
    whole, plain = tmp_path / "whole", tmp_path / "plain"
    for folder in (whole, plain):
        folder.mkdir()
        (folder / "base").symlink_to(base)
    expected = cases.train(whole, *settings)
    assert train_elsewhere(root, *words, "--kill-after-step", "9") == -signal.SIGKILL
    facts = cases.train(root, *settings)
    assert facts.resumed_from == (8,)
    assert_same_bits(weights(whole), weights(root))
    assert facts.target_tokens == expected.target_tokens == cases.train(plain).target_tokens
    moved = max(
        float((a - b).abs().max()) for a, b in zip(weights(whole).values(), weights(plain).values(), strict=True)
    )
    assert moved > 1e-6  # it does something


def test_the_papers_cost_is_counted() -> None:
    found = cost(136, 3_000_000_000)
    assert (found.backward, found.projections) == (136, 9180)
    assert found.bytes / 1e9 == pytest.approx(816)


def test_a_large_model_is_refused_with_its_cost() -> None:
    settings = TrainSettings(balancing="pcgrad", batch_size=16)
    refuse_large(settings, 136, 1_000_000)
    with pytest.raises(RecipeError) as raised:
        refuse_large(settings, 136, 3_000_000_000)
    assert "9,180 projections and 816 GB" in str(raised.value)
    with pytest.raises(RecipeError, match="one process"):
        refuse_large(TrainSettings(balancing="gradnorm", processes=2), 2, 10)
    refuse_large(TrainSettings(), 136, 10**12)
