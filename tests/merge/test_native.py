"""The compiled kernel: the bits of NumPy, and what happens where it cannot be compiled, kept or trusted."""

import ctypes
import shutil
import stat
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cases import make_plan, near, write_checkpoint

from merit.errors import CheckpointError
from merit.hf.dtypes import DTYPES
from merit.merge import Branch, MergeResult, native, run_merge
from merit.merge.arithmetic import Combination

COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MERIT_KERNEL", raising=False)
    native._load.cache_clear()
    yield tmp_path / "cache" / "merit"
    native._load.cache_clear()


def by_both(coefficients, raws, sources, out):
    results = []
    for compiled in (None, native.load()):
        kernel = Combination(coefficients, [DTYPES[s] for s in sources], DTYPES[out], raws[0].size, compiled)
        results.append(np.empty(raws[0].size, DTYPES[out].raw))
        kernel([np.ascontiguousarray(r) for r in raws], results[-1])
        kernel.settle()
    return results


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 1300),
    st.lists(st.sampled_from([1, 1, 2, 3, 10**6 + 3, 10**15 + 37]), min_size=1, max_size=6),
    st.sampled_from(["BF16", "F32"]),
    st.booleans(),
    st.fractions(-2, 2, max_denominator=8),
    st.integers(0, 2**32),
)
def test_compiled_and_numpy_give_the_same_bits(size, weights, out, mixed, scale, seed):
    """Long pieces with ties, zeros of both signs, subnormals, dust, frozen parts; weights that float64 holds and not."""
    chance = np.random.default_rng(seed)
    coefficients = [1 - scale, *(scale * Fraction(w, sum(weights)) for w in weights)]
    sources = [chance.choice(["BF16", "F32"]) if mixed else out for _ in coefficients]
    start = torch.from_numpy(chance.standard_normal(size) * chance.choice([1e-40, 1e-3, 1, 1e30]))
    start[torch.from_numpy(chance.random(size) < 0.2)] = -0.0
    raws = []
    for tag in sources:
        step = torch.from_numpy(chance.standard_normal(size) * (chance.random(size) < 0.7)) * start.abs() * 0.01
        step[: size // 2] *= chance.integers(2)  # the same in some operands
        values = (start + step).to(torch.bfloat16)
        raws.append(
            values.view(torch.int16).numpy().view(np.uint16) if tag == "BF16" else values.float().numpy().copy()
        )
    numpy, compiled = by_both(coefficients, raws, sources, out)
    assert numpy.tobytes() == compiled.tobytes()


def test_it_compiles_where_there_is_a_compiler_and_only_once(cache, monkeypatch):
    assert native.available() == (COMPILER is not None)
    found = list(cache.glob("kernel-*.so"))
    assert len(found) == (COMPILER is not None)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    monkeypatch.setattr(native, "_compile", lambda path: pytest.fail("compiled twice"))
    native._load.cache_clear()
    assert native.available() == bool(found)


def test_no_compiler_no_kernel(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert not native.available()


def test_a_source_that_does_not_compile_leaves_nothing(cache, monkeypatch, tmp_path):
    (tmp_path / "kernel.c").write_text("#error no\n")
    monkeypatch.setattr(native, "_SOURCE", tmp_path / "kernel.c")
    assert not native.available()
    assert list(cache.iterdir()) == []


def test_no_place_to_keep_it_no_kernel(cache):
    cache.parent.write_text("a file where the folder should be")
    assert not native.available()


def test_without_a_home_nothing_is_made(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.chdir(tmp_path)
    assert not native.available()
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_others_may_write_is_not_trusted(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert not native.available()
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_cut_kernel_is_found_before_it_is_loaded_and_made_again(cache, share):
    """Fails on commit f5727a1: an emptied file meant NumPy for ever in silence, half a file ended every run by SIGBUS."""
    assert native.available()
    (kept,) = cache.glob("kernel-*.so")
    whole = kept.read_bytes()
    kept.unlink()  # the loaded one must stay as it is
    kept.write_bytes(whole[: int(len(whole) * share)])
    native._load.cache_clear()
    assert native.available()
    (again,) = cache.glob("kernel-*.so")
    assert len(again.read_bytes()) == len(whole)


@pytest.mark.parametrize("choice", ["numpy", "kernel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_record_says_what_did_the_arithmetic(tmp_path, monkeypatch, choice, dtype):
    """Fails on commit f5727a1: neither record nor output said whether the kernel or NumPy ran."""
    monkeypatch.setenv("MERIT_KERNEL", choice)
    start = {"w": torch.randn(7, 5).to(dtype)}
    base = write_checkpoint(tmp_path / "base", start)
    branches = [Branch(write_checkpoint(tmp_path / f"b{k}", near(start, k)), 1, f"b{k}") for k in range(2)]
    result = run_merge(make_plan(base, branches, output=tmp_path / "out"))
    kernel = choice == "kernel" and COMPILER is not None and dtype is torch.bfloat16
    assert result.arithmetic == ("kernel" if kernel else "numpy")
    assert MergeResult.load(tmp_path / "out").arithmetic == result.arithmetic


@pytest.mark.parametrize("wrong", ["sum[i] - e, sum[i] + e", "rest != 0"])
def test_a_kernel_that_computes_something_else_is_not_used(cache, monkeypatch, tmp_path, wrong):
    """As a compiler that reorders arithmetic would: no element in doubt, or no care for what lies beside a tie."""
    assert wrong in native._SOURCE.read_text()
    instead = {"rest != 0": "0"}.get(wrong, "sum[i], sum[i]")
    (tmp_path / "kernel.c").write_text(
        native._SOURCE.read_text()
        .replace(wrong, instead)
        .replace("sum[i] - d", "sum[i]")
        .replace("sum[i] + d", "sum[i]")
    )
    monkeypatch.setattr(native, "_SOURCE", tmp_path / "kernel.c")
    assert not native.available()


def test_the_environment_switches_it_off(cache, monkeypatch):
    monkeypatch.setenv("MERIT_KERNEL", "numpy")
    assert native.load() is None
    assert not cache.exists()


def test_the_struct_is_as_long_as_the_kernel_thinks():
    assert ctypes.sizeof(native._Terms) == 2 * ctypes.sizeof(ctypes.c_void_p) + 8 + 4 * 4 + ctypes.sizeof(
        ctypes.c_void_p
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_whole_merges_are_the_same_with_and_without_whatever_the_threads(tmp_path, dtype, monkeypatch):
    g = torch.Generator().manual_seed(1)
    start = {f"w{i}": (torch.randn(i * 211, 700, generator=g) * 0.02).to(dtype) for i in range(1, 4)}
    base = write_checkpoint(tmp_path / "base", start)
    branches = [
        Branch(write_checkpoint(tmp_path / f"b{k}", near(start, k), shards=1 + k), 10**8 + 7 * k, f"b{k}")
        for k in range(3)
    ]
    found = set()
    for kernel in ("auto", "numpy"):
        monkeypatch.setenv("MERIT_KERNEL", kernel)
        for count in (1, 2, 3):
            monkeypatch.setattr("merit.merge.stream.threads", lambda count=count: count)
            plan = make_plan(base, branches, "average", output=tmp_path / f"{kernel}{count}")
            found.add(run_merge(plan).model_fingerprint)
    assert len(found) == 1


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_crash(tmp_path):
    start = {"w": torch.randn(3000, 1000).bfloat16()}
    base = write_checkpoint(tmp_path / "base", start)
    branches = [Branch(write_checkpoint(tmp_path / f"b{k}", near(start, k)), 1, f"b{k}") for k in range(2)]
    file = branches[1].path / "model.safetensors"

    def progress(done, total):
        with file.open("r+b") as stream:
            stream.truncate(1000)

    with pytest.raises(CheckpointError, match="became shorter"):
        run_merge(make_plan(base, branches, output=tmp_path / "out"), progress)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b0", "b1", "base"]


def test_an_empty_home_is_no_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "")
    assert not native._cache_folder().is_absolute()
    assert native._load(native._cache_folder()) is None
