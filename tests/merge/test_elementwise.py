"""DARE, Fisher and Model Stock against independent float64 implementations of the papers' formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cases import near, random_tensors, write_checkpoint
from safetensors.torch import load_file, save_file

from merit.errors import CheckpointError, MergeError
from merit.merge import Branch, merge_branches
from merit.merge.operators import dare, fisher, model_stock
from merit.merge.operators.entries import Entries
from merit.recipe.schema import MergeSettings


def parts(count, size, seed=0, shared=0.5):
    rng = np.random.default_rng(seed)
    return shared * rng.normal(size=size) + rng.normal(size=(count, size))


def checkpoints(tmp_path, count=3, dtype=torch.float32):
    start = random_tensors(0, dtype) | {"model.wide.weight": torch.randn(300, 400).to(dtype)}  # more than one block
    base = write_checkpoint(tmp_path / "base", start)
    tensors = [near(start, k + 1) for k in range(count)]
    folders = [write_checkpoint(tmp_path / str(k) / "model", part) for k, part in enumerate(tensors)]
    branches = [Branch(folder, k + 1, f"branch {k}") for k, folder in enumerate(folders)]
    return start, base, tensors, branches


def merge(base, branches, out, operator, scale=1.0, **options):
    return merge_branches(base, branches, out, MergeSettings(operator=operator, scale=scale, options=options))


def floats(tensors):
    return {n: t.double().numpy() for n, t in tensors.items() if t.is_floating_point()}


# ---- dare


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.9])
def test_dare_drops_rescales_and_weighs(drop):
    """Every entry is Σ of some subset of w_k δ_k / (1 − p): which subset is read off the result, not asked of the code."""
    deltas, weights = parts(2, 4000), np.array([0.25, 0.75])
    tau = dare.merge_entries(Entries(deltas, weights, "a", 0), drop, 7)
    terms = weights[:, None] * deltas / (1 - drop)
    sums = {(a, b): a * terms[0] + b * terms[1] for a in (0, 1) for b in (0, 1)}
    hits = {key: np.isclose(tau, value, rtol=1e-12, atol=1e-14) for key, value in sums.items()}
    assert np.stack(list(hits.values())).any(axis=0).all()
    kept = 1 - drop
    for (a, b), hit in hits.items():
        want = (kept if a else drop) * (kept if b else drop)  # branches are dropped independently of each other
        assert abs(hit.mean() - want) < 4 * math.sqrt(want * (1 - want) / 4000) + 1e-12


def test_dare_is_unbiased_over_seeds():
    deltas, weights = parts(3, 50), np.array([0.2, 0.3, 0.5])
    draws = np.stack([dare.merge_entries(Entries(deltas, weights, "a", 0), 0.5, seed) for seed in range(600)])
    error = draws.std(axis=0) / math.sqrt(600)
    assert (np.abs(draws.mean(axis=0) - weights @ deltas) < 5 * error).all()


def test_dare_s_draw_depends_on_seed_tensor_and_place_alone(tmp_path, monkeypatch):
    start, base, _, branches = checkpoints(tmp_path)
    merge(base, branches, tmp_path / "one", "dare", drop=0.5, seed=3)
    monkeypatch.setattr("merit.merge.stream.threads", lambda: 1)
    merge(base, branches, tmp_path / "again", "dare", drop=0.5, seed=3)
    merge(base, branches, tmp_path / "other", "dare", drop=0.5, seed=4)
    one, again, other = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "again", "other"))
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)
    name = "model.wide.weight"
    size = np.abs(floats(one)[name] - floats(start)[name])
    first, second = (size.reshape(-1)[i : i + 50_000] == 0 for i in (0, 65_536))  # all three branches dropped
    assert abs(first.mean() - 0.125) < 0.02
    assert not np.array_equal(first, second), "blocks have draws of their own"


# ---- fisher


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_fisher_is_the_formula_entry_by_entry(count, seed):
    rng = np.random.default_rng(seed)
    deltas, weights = parts(count, 40, seed), rng.dirichlet(np.ones(count))
    moments = np.exp(rng.normal(size=(count, 40)) * 20) * (rng.random((count, 40)) < 0.7)
    got = fisher.merge_entries(Entries(deltas, weights, moments=moments))
    for i in range(40):
        total = math.fsum(w * f for w, f in zip(weights, moments[:, i], strict=True))
        shares = [w * f / total for w, f in zip(weights, moments[:, i], strict=True)] if total else weights
        assert got[i] == pytest.approx(math.fsum(s * d for s, d in zip(shares, deltas[:, i], strict=True)), abs=1e-12)


def test_equal_moments_give_the_average_and_scale_does_not_matter():
    deltas, weights = parts(3, 30), np.array([0.2, 0.3, 0.5])
    equal = np.full((3, 30), 1e-300)
    np.testing.assert_allclose(fisher.merge_entries(Entries(deltas, weights, moments=equal)), weights @ deltas)


def test_a_fisher_merge_of_checkpoints(tmp_path):
    start, base, tensors, branches = checkpoints(tmp_path)
    frozen = "model.norm.weight"
    for part, branch in zip(tensors, branches, strict=True):  # a tensor that is not trained has no moments
        part[frozen] = start[frozen].clone()
        write_checkpoint(branch.path, part)
    generator = torch.Generator().manual_seed(0)
    moments = [
        {
            n: torch.rand(t.shape, generator=generator) ** 4
            for n, t in start.items()
            if t.is_floating_point() and n != frozen
        }
        for _ in branches
    ]
    for branch, part in zip(branches, moments, strict=True):
        save_file(part, branch.path.parent / "second_moments.safetensors")
    result = merge(base, branches, tmp_path / "out", "fisher", scale=0.5)
    got, zero = floats(load_file(tmp_path / "out" / "model.safetensors")), floats(start)
    weights = np.array([1, 2, 3]) / 6
    for name, value in zero.items():
        if name == frozen:
            assert np.array_equal(got[name], value)
            continue
        f = np.stack([w * part[name].double().numpy() for w, part in zip(weights, moments, strict=True)])
        d = np.stack([floats(part)[name] - value for part in tensors])
        np.testing.assert_allclose(got[name], value + 0.5 * (f * d).sum(0) / f.sum(0), rtol=3e-7, atol=1e-9)
    assert result.weights == pytest.approx(weights)


def test_moments_that_are_missing_or_do_not_fit_are_refused(tmp_path):
    start, base, _, branches = checkpoints(tmp_path, 2)
    moments = {n: torch.ones(t.shape) for n, t in start.items() if t.is_floating_point()}
    save_file(moments, tmp_path / "0" / "second_moments.safetensors")
    with pytest.raises(MergeError, match=r"branch 1 has no second moments.*") as refused:
        merge(base, branches, tmp_path / "out", "fisher")
    assert "train.save_second_moments" in str(refused.value)
    save_file({"model.norm.weight": moments["model.norm.weight"]}, tmp_path / "1" / "second_moments.safetensors")
    with pytest.raises(MergeError, match="different tensors"):
        merge(base, branches, tmp_path / "out", "fisher")
    save_file(moments | {"model.norm.weight": torch.ones(3)}, tmp_path / "1" / "second_moments.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        merge(base, branches, tmp_path / "out", "fisher")
    save_file(moments | {"model.norm.weight": -torch.ones(16)}, tmp_path / "1" / "second_moments.safetensors")
    with pytest.raises(MergeError, match="negative"):
        merge(base, branches, tmp_path / "out", "fisher")
    save_file(
        moments | {"model.norm.weight": torch.full((16,), math.nan)}, tmp_path / "1" / "second_moments.safetensors"
    )
    with pytest.raises(MergeError, match="second moments of branch 1 contain NaN"):
        merge(base, branches, tmp_path / "out", "fisher")
    assert not (tmp_path / "out").exists()


# ---- model stock


def reference_stock(deltas):
    """Jang et al.: t = K c / (1 + (K − 1) c), c the mean cosine of all pairs; τ = t · mean."""
    count = len(deltas)
    flat = [d.ravel() for d in deltas]
    pairs = [
        float(flat[i] @ flat[j] / (np.linalg.norm(flat[i]) * np.linalg.norm(flat[j])))
        for i in range(count)
        for j in range(i)
    ]
    cosine = sum(pairs) / len(pairs)
    t = max(0.0, count * cosine / (1 + (count - 1) * cosine)) if cosine > 0 else 0.0
    return t * sum(deltas) / count


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("shape", [(7,), (6, 5), (2, 3, 4)])
def test_model_stock_is_the_formula(count, shape):
    deltas = [part.reshape(shape) for part in parts(count, math.prod(shape), count)]
    tau, numbers = model_stock.merge_tensor(deltas)
    np.testing.assert_allclose(tau, reference_stock(deltas), atol=1e-12)
    np.testing.assert_allclose(model_stock.merge_tensor([1e-200 * d for d in deltas])[0], 1e-200 * tau, rtol=1e-9)
    assert 0 <= numbers["t"] <= 1


def test_model_stock_at_its_ends():
    one = np.arange(6.0)
    assert np.allclose(model_stock.merge_tensor([one, one])[0], one), "branches that agree: their average"
    assert not model_stock.merge_tensor([one, -one])[0].any(), "branches that disagree: the base"
    assert not model_stock.merge_tensor([0 * one, 0 * one])[0].any()
    assert np.allclose(model_stock.merge_tensor([one])[0], one)


def test_a_model_stock_merge_takes_every_tensor_whole(tmp_path):
    start = random_tensors(0, torch.float32) | {"model.experts.weight": torch.randn(3, 6, 5)}
    base = write_checkpoint(tmp_path / "base", start)
    pull = near(start, 99, step=0.01)
    tensors = [near(pull, k, step=0.01) for k in range(3)]
    branches = [Branch(write_checkpoint(tmp_path / str(k), part), k + 1, f"b{k}") for k, part in enumerate(tensors)]
    result = merge(base, branches, tmp_path / "out", "model_stock", scale=0.8)
    got, zero = floats(load_file(tmp_path / "out" / "model.safetensors")), floats(start)
    for name, value in zero.items():
        if value.size:
            deltas = [floats(part)[name] - value for part in tensors]
            np.testing.assert_allclose(got[name], value + 0.8 * reference_stock(deltas), rtol=3e-7, atol=1e-9)
    assert 0 < result.statistics["t"]["model.experts.weight"] < 1
