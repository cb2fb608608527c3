"""Lanczos against NumPy's eigenvalues, and against hessian-eigenthings."""

import hessian_eigenthings
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merit.diagnostics.lanczos import lanczos


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
@settings(max_examples=40)
def test_all_steps_give_all_eigenvalues(seed: int, size: int) -> None:
    root = np.random.default_rng(seed).standard_normal((size, size))
    matrix = root + root.T
    found = lanczos(lambda v: matrix @ v, size, steps=size, vectors=3, seed=seed)
    assert found.values == pytest.approx(np.linalg.eigvalsh(matrix)[::-1], rel=1e-8, abs=1e-8)
    for value, vector in zip(found.values, found.vectors, strict=False):
        assert np.linalg.norm(matrix @ vector - value * vector) < 1e-7 * max(1, abs(value))


def test_few_steps_give_the_leading_pairs_once_and_residuals_tell() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([[50.0, 30.0, 20.0], rng.uniform(-1, 1, 297)])
    basis = np.linalg.qr(rng.standard_normal((300, 300)))[0]
    matrix = basis * values @ basis.T
    found = lanczos(lambda v: matrix @ v, 300, steps=40, vectors=3, dtype=np.float32)
    assert found.values[:3] == pytest.approx(values[:3], rel=1e-5)
    assert found.values[3] < 1.1
    assert np.abs(found.vectors @ basis[:, :3]) == pytest.approx(np.eye(3), abs=1e-3)
    assert found.residuals[:3].max() < 1e-3
    true = [np.linalg.norm(matrix @ v - lam * v) for v, lam in zip(found.vectors, found.values, strict=False)]
    assert max(true) < 1e-2


def test_it_ends_where_the_space_is_exhausted() -> None:
    matrix = np.diag([2.0, 2.0, 2.0, 2.0, 5.0])
    found = lanczos(lambda v: matrix @ v, 5, steps=5, vectors=2)
    assert found.values == pytest.approx([5.0, 2.0])


def test_it_agrees_with_hessian_eigenthings() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    parameters = list(net.parameters())

    def product(v: np.ndarray) -> np.ndarray:
        loss = torch.nn.functional.cross_entropy(net(x), y)
        first = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        second = torch.autograd.grad(first @ torch.as_tensor(v, dtype=torch.float32), parameters)
        return torch.cat([g.reshape(-1) for g in second]).double().numpy()

    size = sum(p.numel() for p in parameters)
    ours = lanczos(product, size, steps=size, vectors=2).values[:2]
    theirs = peer_eigenvalues(net, x, y)
    assert ours == pytest.approx(theirs, rel=1e-3)


def peer_eigenvalues(net, x, y) -> list[float]:
    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    operator = hessian_eigenthings.HessianOperator(net, [(x, y)], loss)
    result = hessian_eigenthings.lanczos(operator, k=2, max_iter=51, reorthogonalize=True, which="LA", seed=0)
    return sorted(map(float, result.eigenvalues), reverse=True)[:2]
