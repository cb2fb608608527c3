"""The count sketch: its hash against an independent reference, unbiasedness, variance, linearity, independence."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from merit.conflict import sketch as module
from merit.conflict.sketch import BLOCK, Sketch, buckets, fold, signs

MASK = 2**64 - 1


def reference_hash(counter: int, seed: int, name: str, purpose: str) -> int:
    """SplitMix64 in Python integers."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}\0{name}\0{purpose}".encode(), digest_size=8).digest(), "little")
    z = (counter * 0x9E3779B97F4A7C15 + key) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference_sketch(values: np.ndarray, name: str, seed: int, size: int) -> np.ndarray:
    total, block = np.zeros(size), min(BLOCK, size)
    for i, value in enumerate(values.tolist()):
        sign = -1.0 if reference_hash(i // 64, seed, name, "sign") >> (i % 64) & 1 else 1.0
        place = (reference_hash(i // block, seed, name, "bucket") + i % block) % size
        total[place] += sign * value
    return total


def sketch(values: np.ndarray, *, size: int = 1024, seed: int = 0, name: str = "w") -> np.ndarray:
    made = Sketch(size, seed)
    made.add(name, torch.from_numpy(values.astype(np.float32)))
    return made.vector().numpy()


@pytest.mark.parametrize(("size", "count"), [(64, 1700), (512, 1700), (4096, 1700), (4096, 8192 + 300)])
def test_equals_a_reference_written_with_python_integers(size, count):
    """Short and long parameters take ways of their own."""
    values = np.random.default_rng(0).normal(size=count).astype(np.float32)
    np.testing.assert_allclose(
        sketch(values, size=size, seed=5), reference_sketch(values, "w", 5, size), rtol=0, atol=1e-12
    )


def test_signs_and_buckets_can_be_asked_for_from_any_start():
    whole, places = signs("w", 0, 3000, 7), buckets("w", 0, 3000, 512, 7)
    for start in (1, 63, 64, 255, 256, 1000):
        assert torch.equal(signs("w", start, 900, 7), whole[start : start + 900])
        assert torch.equal(buckets("w", start, 900, 512, 7), places[start : start + 900])


def test_sign_bits_are_fair_and_pairwise_independent():
    count = 2**18
    for name in ("a", "model.layers.0.mlp.up_proj.weight"):
        sign = signs(name, 0, count, 0).numpy()
        assert abs(sign.mean()) < 5 / np.sqrt(count)
        for lag in (1, 2, 31, 32, 63, 64, 256, 4096):
            assert abs((sign[:-lag] * sign[lag:]).mean()) < 5 / np.sqrt(count)
    by_bit = signs("a", 0, count, 0).numpy().reshape(-1, 64).sum(axis=0)
    assert stats.chi2.sf(float((by_bit**2 / (count / 64)).sum()), 64) > 1e-6
    other = signs("a", 0, count, 1).numpy()
    assert abs((signs("a", 0, count, 0).numpy() * other).mean()) < 5 / np.sqrt(count)
    assert abs((signs("a", 0, count, 0).numpy() * signs("b", 0, count, 0).numpy()).mean()) < 5 / np.sqrt(count)


def test_buckets_are_uniform():
    starts = buckets("w", 0, 2**20, 1024, 0).numpy()[::BLOCK]
    observed = np.bincount(starts // 16, minlength=64)
    assert stats.chisquare(observed).pvalue > 1e-6
    assert len(np.unique(buckets("w", 0, BLOCK, 1024, 0).numpy())) == BLOCK, "entries of one block never collide"


def test_inner_products_are_unbiased_and_within_the_stated_variance():
    rng = np.random.default_rng(1)
    n, size, seeds = 1500, 256, 400
    scale = np.exp(rng.normal(size=n))  # a few large entries, as gradients have
    g, h = rng.normal(size=n) * scale, rng.normal(size=n) * scale
    h = 0.6 * g + h
    g, h = g.astype(np.float32).astype(np.float64), h.astype(np.float32).astype(np.float64)
    products = np.array([sketch(g, size=size, seed=s) @ sketch(h, size=size, seed=s) for s in range(seeds)])
    block = np.arange(n) // BLOCK
    apart = block[:, None] != block[None, :]
    pairs = np.outer(g**2, h**2) + np.outer(g * h, g * h)
    variance = float(pairs[apart].sum()) / size
    assert abs(products.mean() - g @ h) < 4 * np.sqrt(variance / seeds)
    # The sample variance of 400 draws scatters by about 10 %, more with heavy tails.
    assert 0.7 < products.var(ddof=1) / variance < 1.35
    assert variance <= ((g @ g) * (h @ h) + (g @ h) ** 2) / size


def test_blocks_of_aligned_hot_columns_do_not_fatten_the_error():
    """Energy in one column of row-major matrices: the worst case for schemes that shift whole rows."""
    n, size, seeds = 64 * 128, 1024, 300
    g, h = np.zeros(n), np.zeros(n)
    rng = np.random.default_rng(2)
    g[::128], h[::128] = rng.normal(size=64), rng.normal(size=64)
    errors = np.array([sketch(g, size=size, seed=s) @ sketch(h, size=size, seed=s) for s in range(seeds)]) - g @ h
    bound = np.sqrt(((g @ g) * (h @ h) + (g @ h) ** 2) / size)
    assert np.sqrt((errors**2).mean()) < 1.25 * bound


finite = st.floats(-100, 100, width=32)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(finite, finite), min_size=1, max_size=700),
    st.integers(-3, 3),
    st.integers(0, 2**31 - 1),
    st.sampled_from([64, 256, 2048]),
)
def test_sketches_are_linear(pairs, factor, seed, size):
    g, h = (np.array(column, dtype=np.float32) for column in zip(*pairs, strict=True))
    both = Sketch(size, seed)
    both.add("w", torch.from_numpy(g))
    for _ in range(abs(factor)):
        both.add("w", torch.from_numpy(h) * (1 if factor > 0 else -1))
    expected = sketch(g, size=size, seed=seed) + factor * sketch(h, size=size, seed=seed)
    np.testing.assert_allclose(both.vector().numpy(), expected, rtol=0, atol=1e-9)


def test_parameters_add_in_any_order_and_names_matter():
    a, b = torch.randn(300, generator=torch.Generator().manual_seed(0)), torch.ones(17, 9)
    one, two, swapped = Sketch(512, 0), Sketch(512, 0), Sketch(512, 0)
    for made, order in ((one, (("a", a), ("b", b))), (two, (("b", b), ("a", a))), (swapped, (("b", a), ("a", b)))):
        for name, values in order:
            made.add(name, values)
    assert torch.allclose(one.vector(), two.vector(), rtol=0, atol=1e-13)
    assert not torch.allclose(one.vector(), swapped.vector())


@pytest.mark.parametrize("kept", [0, 2, 256])
def test_kept_hashes_change_nothing(kept, monkeypatch):
    """Gradients of all lengths, three times over: from the second time on, hashes come from the first."""
    monkeypatch.setattr(module, "_KEPT", kept)
    rng = torch.Generator().manual_seed(0)
    gradients = {f"p{n}": torch.randn(n, generator=rng) for n in (1, 63, 8192, 8193, 2**17 + 5)}
    made = Sketch(2048, 1)
    for _ in range(3):
        made.reset()
        for name, values in gradients.items():
            made.add(name, values)
        expected = sum(sketch(values.numpy(), name=name, size=2048, seed=1) for name, values in gradients.items())
        np.testing.assert_allclose(made.vector().numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("chunk", "piece"), [(2**10, 2**8), (2**12, 2**12), (2**20, 2**15)])
def test_chunks_and_threads_change_nothing(chunk, piece, monkeypatch):
    values = torch.randn(70_001, generator=torch.Generator().manual_seed(0))
    expected, found = (torch.zeros(4096, dtype=torch.float64) for _ in range(2))
    expected.index_add_(0, buckets("w", 0, 70_001, 4096, 1), (signs("w", 0, 70_001, 1) * values).double())
    monkeypatch.setattr(module, "_CPU_CHUNK", chunk)
    monkeypatch.setattr(module, "_CPU_PIECE", piece)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        fold(found, "w", values, 1)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_folded_in_float32_and_up(dtype):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = torch.zeros(1024, dtype=torch.float64)
    fold(found, "w", values, 0)
    np.testing.assert_allclose(found.numpy(), sketch(values.float().numpy(), size=1024), rtol=0, atol=1e-12)


def test_non_contiguous_gradients_are_read_in_their_logical_order():
    values = torch.randn(37, 53, generator=torch.Generator().manual_seed(0))
    expected, found = (torch.zeros(256, dtype=torch.float64) for _ in range(2))
    fold(expected, "w", values.t().contiguous(), 0)
    fold(found, "w", values.t(), 0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("count", [1, 31, 1000, 2**15 + 5])
@pytest.mark.parametrize("size", [64, 2048])
def test_every_kernel_computes_the_same(count, size):
    """The CPU's in pieces, the plain one (CUDA without a compiler), and the plain one traced, which is what torch.compile
    lowers on CUDA; the lowering itself needs a GPU."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    device = values.device
    words, offsets = module._sign_words("w", 0, 0, count, device), module._offsets("w", 0, 0, count, size, device)
    totals = [torch.zeros(size, dtype=torch.float64) for _ in range(3)]
    traced = torch.compile(module._add, dynamic=True, backend="aot_eager")
    for total, kernel in zip(totals, (module._add_on_cpu, module._add, traced), strict=True):
        kernel(total, values, words, offsets)
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(totals[2], totals[1], rtol=0, atol=1e-12)
