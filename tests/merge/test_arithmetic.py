from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cases import FORMATS, TORCH, nearest, raw, values

from merit.hf.dtypes import BLOCK, DTYPES
from merit.merge import native
from merit.merge.arithmetic import Combination, NonFiniteError, exact_weights, round_to

BF16 = DTYPES["BF16"]


def combine(coefficients, raws, sources, out):
    """By NumPy and by the compiled kernel: the same bits, or the same error."""
    results = []
    for compiled in (None, native.load()):
        kernel = Combination(coefficients, [DTYPES[s] for s in sources], DTYPES[out], compiled=compiled)
        result = np.empty(raws[0].size, DTYPES[out].raw)
        try:
            kernel(raws, result)
            kernel.settle()
        except NonFiniteError as error:
            results.append(error)
        else:
            results.append(result)
    errors = [r for r in results if isinstance(r, NonFiniteError)]
    assert len({e.source for e in errors}) <= 1
    assert len(errors) in (0, len(results))
    if errors:
        raise errors[0]
    assert all(r.tobytes() == results[0].tobytes() for r in results)
    return results[0]


def exact(coefficients, raws, sources):
    columns = zip(*(values(r, s) for r, s in zip(raws, sources, strict=True)), strict=True)
    return [
        sum((c * Fraction(float(x)) for c, x in zip(coefficients, row, strict=True)), Fraction(0)) for row in columns
    ]


def bfloat16(*numbers):
    return raw(torch.tensor(numbers, dtype=torch.bfloat16))


@st.composite
def operands(draw):
    """Up to 5 operands of any finite bit patterns, weights up to 10^12, and an output dtype."""
    count, size = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    weights = draw(st.lists(st.integers(1, 10**12), min_size=count, max_size=count))
    out = draw(st.sampled_from(sorted(FORMATS)))
    uniform = draw(st.booleans())
    sources = [out if uniform else draw(st.sampled_from(sorted(FORMATS))) for _ in range(count)]
    if out == "F16":
        sources = ["F16"] * count  # wider values could overflow it
    raws = []
    for tag in sources:
        width = 32 if tag == "F32" else 16
        finite = {"F32": 0x7F000000, "BF16": 0x7F00, "F16": 0x7B00}[tag]
        pattern = st.integers(0, finite).flatmap(lambda p, w=width: st.sampled_from([p, p | 1 << (w - 1)]))
        close = st.integers(finite // 2 - 3, finite // 2 + 3)
        bits = draw(st.lists(st.one_of(pattern, close), min_size=size, max_size=size))
        raws.append(np.array(bits, f"u{width // 8}").view(DTYPES[tag].raw))
    return weights, raws, sources, out


@settings(max_examples=400, deadline=None)
@given(operands())
def test_weighted_mean_is_the_exact_mean_rounded_once(case):
    weights, raws, sources, out = case
    shares = [Fraction(w, sum(weights)) for w in weights]
    got = values(combine(shares, raws, sources, out), out)
    want = [nearest(x, out) for x in exact(shares, raws, sources)]
    assert got.tolist() == want


@settings(max_examples=100, deadline=None)
@given(operands(), st.fractions(-2, 2, max_denominator=50))
def test_affine_combinations_are_rounded_once_too(case, scale):
    weights, raws, sources, out = case
    half = {2: 0xBFFF, 4: 0xBFFFFFFF}  # clears the exponent's highest bit: nothing can overflow
    small = [(r.view(f"u{r.itemsize}") & half[r.itemsize]).view(r.dtype) for r in raws]
    coefficients = [1 - scale, *(scale * Fraction(w, sum(weights)) for w in weights[1:])][: len(raws)]
    got = values(combine(coefficients, small, sources, out), out)
    want = [nearest(x, out) for x in exact(coefficients, small, sources)]
    assert got.tolist() == want


@pytest.mark.parametrize(
    ("coefficients", "rows", "want"),
    [
        # halfway between 1 and 1 + 2^-7: ties to even; the third operand's dust decides, far below float64's reach
        ([1, 1], [[1.0], [1 + 2**-7]], 1.0),
        ([1, 1], [[1 + 2**-7], [1 + 2**-6]], 1 + 2**-6),
        ([1, 1, 2], [[2.0], [2 + 2**-6], [2.0**-120]], 1 + 2**-7),
        ([1, 1, 2], [[2.0], [2 + 2**-6], [-(2.0**-120)]], 1.0),
        # cancellation: big numbers cancel, what remains is dust
        ([1, 1, 1], [[1.0], [2.0**-100], [-1.0]], 2.0**-100 / 3),
        ([3, 1, 3], [[2.0**100], [3.0], [-(2.0**100)]], 3 / 7),
        # halfway of subnormals, and the smallest subnormal
        ([1, 1], [[2.0**-133], [0.0]], 0.0),
        ([1, 1], [[2.0**-133 * 3], [0.0]], 2.0**-133 * 2),
        ([1, 2], [[2.0**-133], [2.0**-133 * 2]], 2.0**-133 * 2),
        # near the largest
        ([1, 1], [[3.3895e38], [3.3895e38]], 3.3895e38),
        ([1, 1], [[3.3895e38], [-3.3895e38]], 0.0),
    ],
)
@pytest.mark.parametrize("pad", [0, 1, 3])
def test_adversarial_elements(coefficients, rows, want, pad):
    """The same in the general path (odd length) and in the paired path (even length), among ordinary numbers."""
    raws = [bfloat16(*row, *([0.25 + 0.01 * k] * pad)) for k, row in enumerate(rows)]
    shares = [Fraction(c, sum(coefficients)) for c in coefficients]
    got = values(combine(shares, raws, ["BF16"] * len(raws), "BF16"), "BF16")
    want = float(torch.tensor(want, dtype=torch.float64).to(torch.bfloat16)) if want not in (1.0, 0.0) else want
    assert got[0] == want
    assert got.tolist() == [nearest(x, "BF16") for x in exact(shares, raws, ["BF16"] * len(raws))]


@pytest.mark.parametrize("tag", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("counts", [(1, 1), (1, 1, 1, 1), (123_456_789, 98_765_432, 7), (1, 3, 10**12)])
def test_a_full_block_equals_float64_accumulation_rounded_once(tag, counts):
    g = torch.Generator().manual_seed(3)
    base = torch.randn(BLOCK, generator=g) * 0.02
    raws = [raw((base + torch.randn(BLOCK, generator=g) * 1e-3).to(TORCH[tag])) for _ in counts]
    shares = [Fraction(c, sum(counts)) for c in counts]
    got = values(combine(shares, raws, [tag] * len(counts), tag), tag)
    mean = sum(c * values(r, tag) for c, r in zip(counts, raws, strict=True)) / sum(counts)
    want = torch.from_numpy(mean).to(TORCH[tag]).double().numpy()  # torch rounds by way of float32, twice on rare ties
    odd = np.flatnonzero(got != want)
    assert odd.size < 200
    assert [got[i] for i in odd] == [nearest(Fraction(float(mean[i])), tag) for i in odd]


def test_result_does_not_depend_on_order_scaling_or_position():
    g = torch.Generator().manual_seed(5)
    raws = [raw(torch.randn(4096, generator=g).bfloat16()) for _ in range(4)]
    shares = exact_weights([0.1, 0.2, 0.3, 0.4])
    reference = combine(shares, raws, ["BF16"] * 4, "BF16")
    assert np.array_equal(combine(shares[::-1], raws[::-1], ["BF16"] * 4, "BF16"), reference)
    part = [np.ascontiguousarray(r[777:1234]) for r in raws]
    assert np.array_equal(combine(shares, part, ["BF16"] * 4, "BF16"), reference[777:1234])


def test_identical_operands_come_back_bit_for_bit():
    bits = np.array([0x8000, 0x0000, 0x3F80, 0x0001], np.uint16)  # -0.0 keeps its sign
    third = Fraction(1, 3)
    assert np.array_equal(combine([third] * 3, [bits, bits.copy(), bits.copy()], ["BF16"] * 3, "BF16"), bits)


@pytest.mark.parametrize("tag", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("identical", [False, True])
def test_non_finite_operands_are_named(tag, bad, size, identical):
    good = torch.ones(size, dtype=TORCH[tag])
    evil = good.clone()
    evil[size - 1] = bad
    raws = [raw(evil), raw(evil.clone())] if identical else [raw(good), raw(evil)]
    with pytest.raises(NonFiniteError) as caught:
        combine([Fraction(1, 2)] * 2, raws, [tag] * 2, tag)
    assert caught.value.source == (0 if identical else 1)


@pytest.mark.parametrize("tag", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("size", [1, 4])
def test_overflow_of_the_result_is_an_error(tag, size):
    big = torch.full((size,), torch.finfo(TORCH[tag]).max, dtype=TORCH[tag])
    with pytest.raises(NonFiniteError) as caught:
        combine([Fraction(-1), Fraction(2)], [raw(-big), raw(big)], [tag] * 2, tag)
    assert caught.value.source is None


def test_values_near_the_largest_do_not_overflow_on_the_way():
    big = raw(torch.full((4,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16))
    other = bfloat16(1.0, 2.0, 3.0, 4.0)
    got = values(combine([Fraction(5), Fraction(-4), Fraction(1)], [big, big, other], ["BF16"] * 3, "BF16"), "BF16")
    assert (got == torch.finfo(torch.bfloat16).max).all()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, min_value=-6e4, max_value=6e4), min_size=1, max_size=20),
    st.sampled_from(sorted(FORMATS)),
)
def test_round_to_rounds_once(numbers, tag):
    got = values(round_to(np.array(numbers), DTYPES[tag]), tag)
    assert got.tolist() == [nearest(Fraction(x), tag) for x in numbers]


def test_round_to_decides_bfloat16_ties_by_what_float32_cannot_see():
    tie = 1 + 2.0**-8
    numbers = np.array([tie, np.nextafter(tie, 2), np.nextafter(tie, 0), -np.nextafter(tie, 2), 1 + 3 * 2.0**-8])
    assert values(round_to(numbers, BF16), "BF16").tolist() == [1.0, 1 + 2.0**-7, 1.0, -1 - 2.0**-7, 1 + 2.0**-6]


def test_weights_are_exact_decimals():
    assert exact_weights([0.3, 7, "0.25", Fraction(1, 3)]) == [
        Fraction(3, 10),
        Fraction(7),
        Fraction(1, 4),
        Fraction(1, 3),
    ]


def test_coefficients_that_float32_cannot_hold_well():
    """Subnormal in float32, they would lose digits there; the products are of the size of the other operand's."""
    rng = np.random.default_rng(0)
    coefficients = [Fraction(int(rng.integers(1, 2**20)), 2**160), Fraction(1)]
    large = torch.from_numpy(rng.uniform(1, 2, 512)).mul(2.0**126).to(torch.bfloat16)
    small = torch.from_numpy(rng.uniform(-2, 2, 512)).mul(2.0**-16).to(torch.bfloat16)
    raws = [raw(large), raw(small)]
    found = combine(coefficients, raws, ["BF16", "BF16"], "BF16")
    wanted = [nearest(x, "BF16") for x in exact(coefficients, raws, ["BF16", "BF16"])]
    assert values(found, "BF16").tolist() == [float(x) for x in wanted]
