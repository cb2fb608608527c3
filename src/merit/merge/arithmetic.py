"""Arithmetic of the merge: correctly rounded linear combinations of stored tensors, block by block. Pure, no files.

``Combination`` computes y = round(Σ_k c_k x_k) with *rational* coefficients c_k, such that every element is the exact real
sum rounded once to the output dtype (to nearest, ties to even). The result does not depend on thread count, order or CPU.
It works in two steps (Ziv's strategy): a fast floating sum s with a known error bound e; elements that round alike at s − e
and s + e are done, the few others are decided by exact arithmetic. Thanks to the second step the first may be float32 for
bfloat16 tensors (float64 for all others). Not covered: float64 outputs, which are within (K + 3) float64 roundings.

Layout trick for bfloat16: two neighbours are one 32-bit word. ``word << 16`` and ``word & 0xFFFF0000`` are the float32
patterns of its low and high half, so widening needs no strided access; blocks stay in "all low, then all high" order
until they are packed again.

Source: A. Ziv, Fast evaluation of elementary mathematical functions with correctly rounded last bit, 1991; error-free
sum and product: Ogita, Rump, Oishi, Accurate sum and dot product, 2005; round to odd: Boldo, Melquiond, 2008.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from merit.hf.dtypes import BLOCK, DType, to_float
from merit.merge.native import Function, Kernel

__all__ = ["Combination", "NonFiniteError", "exact_weights", "round_to"]

_UNIT = 2.0**-53
_PRECISION = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}
_LARGEST = {"BF16": 2.0**127, "F16": 2.0**15, "F32": 2.0**127, "F64": 2.0**1023}  # below this nothing can overflow


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity.

    Attributes:
        source: Position of the operand that contains it, or None: the result overflowed.
        tensor: Its tensor, where known.
    """

    def __init__(self, source: int | None, tensor: str | None = None) -> None:
        super().__init__(source, tensor)
        self.source, self.tensor = source, tensor


_LARGEST_EXPONENT = 400
"""Limit of decimal exponents of weights and scales; a larger power of ten would fill the memory and overflow float64."""


def exact_weights(values: Sequence[int | float | str | Fraction]) -> list[Fraction]:
    """Weights as exact rationals; a float is read as the shortest decimal that prints the same (0.3 is 3/10).

    Raises:
        ValueError: Not a number, or one of an absurd size.
    """
    return [_exact(repr(value) if isinstance(value, float) else value) for value in values]


def _exact(value: int | str | Fraction) -> Fraction:
    if isinstance(value, str):
        exponent = value.lower().partition("e")[2]
        if len(value) > 100 or (exponent and abs(int(exponent)) > _LARGEST_EXPONENT):
            raise ValueError(f"{value[:40]} is not a number of a reasonable size")
    return Fraction(value)


def round_to(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Round float64 ``values`` once, to nearest with ties to even.

    Returns:
        Raw values (``DType.raw``; bf16 as uint16). Overflow gives an infinity.
    """
    with np.errstate(over="ignore", under="ignore"):
        if dtype.tag != "BF16":
            return values.astype(dtype.raw)
        single = values.astype(np.float32)  # a second rounding follows: repaired where this one hit a tie of bf16
        bits = single.view(np.uint32)
        low = bits & 0xFFFF
        up = (low > 0x8000) | ((low == 0x8000) & (bits & 0x10000 != 0))
        tie = np.flatnonzero(low == 0x8000)
        if tie.size:
            exact, rounded = np.abs(values.reshape(-1)[tie]), np.abs(single.reshape(-1)[tie]).astype(np.float64)
            up.reshape(-1)[tie] = np.where(exact == rounded, up.reshape(-1)[tie], exact > rounded)
        result: np.ndarray = ((bits >> 16) + up).astype(np.uint16)
        return result


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: np.ndarray, b: float) -> tuple[np.ndarray, np.ndarray]:
    def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        big = x * 134217729.0  # 2^27 + 1
        high = big - (big - x)
        return high, x - high

    product = a * b
    (a_high, a_low), (b_high, b_low) = split(a), split(np.float64(b))  # type: ignore[arg-type]
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _to_odd(quotient: np.ndarray, remainder_sign: np.ndarray) -> np.ndarray:
    """From the nearest float64 and the sign of (exact − nearest): the bracketing float64 with an odd last bit."""
    odd = quotient.view(np.uint64) & 1 == 1
    move = (remainder_sign != 0) & ~odd
    return np.where(move, np.nextafter(quotient, np.copysign(np.inf, remainder_sign)), quotient)


class Combination:
    """y = round(Σ_k c_k x_k) for pieces of at most ``size`` elements; has scratch buffers, so use one per thread.

    Call it for some blocks, then ``settle()`` once: the elements in doubt are collected and decided together.

    Args:
        coefficients: The c_k, exact.
        sources: Dtype of each operand x_k (floating).
        out: Dtype of y.
        size: Maximum elements per call.
        compiled: ``native.load()``'s function, used where it supports the dtypes: the same bits, faster. None: NumPy.
    """

    def __init__(
        self,
        coefficients: Sequence[Fraction],
        sources: Sequence[DType],
        out: DType,
        size: int = BLOCK,
        compiled: Function | None = None,
    ) -> None:
        self.sources, self.out = list(sources), out
        self._denominator = math.lcm(*(c.denominator for c in coefficients))
        self._numerators = [int(c * self._denominator) for c in coefficients]
        self._floats = [float(c) for c in coefficients]
        self._singles = [np.float32(c) for c in self._floats]
        self._copyable = sum(coefficients) == 1 and all(s == out for s in self.sources)
        bits = max(abs(n).bit_length() for n in self._numerators) + max(_PRECISION[s.tag] for s in self.sources)
        self._exact_products = bits <= 53 and self._denominator < 2**53
        normal = all(not c or abs(c) >= 2.0**-126 for c in self._floats)  # others would lose digits in float32
        self._paired = normal and all(d.tag == "BF16" for d in (*self.sources, out))
        self._compiled: Kernel | None = None
        if compiled is not None and Kernel.covers(self.sources, out):
            rational = (self._numerators, self._denominator) if self._exact_products else None
            self._compiled = Kernel(compiled, self._floats, rational, self.sources, out, self._copyable, size)
        else:
            self._sum, self._term, self._test = (np.empty(size, np.float32) for _ in range(3))
        self._doubts: list[tuple[np.ndarray, np.ndarray, list[np.ndarray]]] = []

    @property
    def compiled(self) -> bool:
        """Whether the compiled kernel does the work."""
        return self._compiled is not None

    def __call__(self, raws: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Combine one block.

        Args:
            raws: K arrays of n raw values each (``DType.raw``), contiguous; not needed after the call.
            out: Receives n raw values of the output dtype; elements in doubt are final only after ``settle``.

        Raises:
            NonFiniteError: An operand contains NaN or infinity.
        """
        if self._compiled is not None:
            doubt = self._compiled(raws, out)
            if isinstance(doubt, int):
                raise NonFiniteError(doubt)
        elif self._copyable and _identical(raws):
            if not math.isfinite(_magnitude(raws[0], self.sources[0])):
                raise NonFiniteError(0)
            out[:] = raws[0]
            return
        else:
            doubt = self._in_numpy(raws, out)
        if doubt.size:
            self._doubts.append((out, doubt, [raw[doubt] for raw in raws]))

    def _in_numpy(self, raws: Sequence[np.ndarray], out: np.ndarray) -> np.ndarray:
        """Positions in doubt."""
        spread = 0.0  # Σ|c_k| max|x_k|
        for k, raw in enumerate(raws):
            magnitude = _magnitude(raw, self.sources[k])
            if not math.isfinite(magnitude):
                raise NonFiniteError(k)
            spread += abs(self._floats[k]) * magnitude
        fast = self._paired and raws[0].size % 2 == 0 and spread < 2.0**126
        return self._add_pairs(raws, spread, out) if fast else self._add(raws, spread, out)

    def settle(self) -> None:
        """Decide all elements in doubt.

        Raises:
            NonFiniteError: A result overflows the output dtype.
        """
        doubts, self._doubts = self._doubts, []
        if not doubts:
            return
        decided = self._decide([np.concatenate([raws[k] for *_, raws in doubts]) for k in range(len(self.sources))])
        if not math.isfinite(_magnitude(decided, self.out)):
            raise NonFiniteError(None)
        start = 0
        for out, where, _ in doubts:
            out[where] = decided[start : start + where.size]
            start += where.size

    def _add(self, raws: Sequence[np.ndarray], spread: float, out: np.ndarray) -> np.ndarray:
        """Sum in float64; positions in doubt. Errors: of c_k, of the product, of K − 1 sums, of s ± e."""
        error = (len(raws) + 4) * _UNIT * spread
        total = to_float(raws[0], self.sources[0]) * self._floats[0]
        for raw, dtype, c in zip(raws[1:], self.sources[1:], self._floats[1:], strict=True):
            total += to_float(raw, dtype) * c
        if self.out.tag == "F64":
            out[:] = total
            return np.empty(0, np.intp) if np.isfinite(total).all() else np.flatnonzero(~np.isfinite(total))
        integer = f"u{self.out.itemsize}"
        out[:] = round_to(total - error, self.out)
        unsure = out.view(integer) != round_to(total + error, self.out).view(integer)
        if spread >= _LARGEST[self.out.tag]:
            unsure |= ~np.isfinite(to_float(out, self.out))
        return np.flatnonzero(unsure)

    def _add_pairs(self, raws: Sequence[np.ndarray], spread: float, out: np.ndarray) -> np.ndarray:
        """Sum bf16 pairs in float32 (module docstring); positions in doubt."""
        n, h = out.size, out.size // 2
        error = np.float32((len(raws) + 5) * 2.0**-24 * spread + (len(raws) + 2) * 2.0**-149)
        total, term, test = self._sum[:n], self._term[:n], self._test[:n].view(np.uint32)
        word = term.view(np.uint32)
        for k, (raw, c) in enumerate(zip(raws, self._singles, strict=True)):
            pair = raw.view(np.uint32)
            np.left_shift(pair, 16, out=word[:h])
            np.bitwise_and(pair, 0xFFFF0000, out=word[h:])
            if k:
                np.multiply(term, c, out=term)
                np.add(total, term, out=total)
            else:
                np.multiply(term, c, out=total)
        # Adding half a bf16 step to the bit pattern and truncating rounds to nearest; a tie is always in doubt.
        np.subtract(total, error, out=term)
        np.add(total, error, out=total)
        bits = total.view(np.uint32)
        np.add(word, 0x8000, out=word)
        np.add(bits, 0x8000, out=bits)
        np.bitwise_xor(word, bits, out=test)
        np.right_shift(word[:h], 16, out=word[:h])
        np.bitwise_and(word[h:], 0xFFFF0000, out=word[h:])
        np.bitwise_or(word[:h], word[h:], out=out.view(np.uint32))
        doubt = np.flatnonzero(test > 0xFFFF)
        return np.where(doubt < h, 2 * doubt, 2 * (doubt - h) + 1)

    def _decide(self, raws: Sequence[np.ndarray]) -> np.ndarray:
        """Correctly rounded raw results of gathered elements, by exact arithmetic."""
        xs = [to_float(raw, dtype) for raw, dtype in zip(raws, self.sources, strict=True)]
        known, odd = np.zeros(xs[0].size, bool), np.zeros(xs[0].size)
        if self._exact_products:
            total, known[:] = xs[0] * float(self._numerators[0]), True
            for x, numerator in zip(xs[1:], self._numerators[1:], strict=True):
                total, lost = _two_sum(total, x * float(numerator))
                known &= lost == 0
            quotient = total / self._denominator
            product, lost = _two_product(quotient, float(self._denominator))
            odd = _to_odd(quotient, (total - product) - lost)
        for i in np.flatnonzero(~known):
            exact = sum((n * Fraction(float(x[i])) for n, x in zip(self._numerators, xs, strict=True)), Fraction(0))
            exact /= self._denominator
            if not exact:  # the sign that a floating sum gives a zero
                negative = all(bool(np.signbit(x[i])) != (n < 0) for n, x in zip(self._numerators, xs, strict=True))
                odd[i] = -0.0 if negative and not any(x[i] for x in xs) else 0.0
                continue
            nearest = np.array([float(exact)])
            odd[i] = _to_odd(nearest, np.array([float((exact > nearest[0]) - (exact < nearest[0]))]))[0]
        return round_to(odd, self.out)


def _identical(raws: Sequence[np.ndarray]) -> bool:
    views = [raw.view(np.uint8) for raw in raws]
    head = views[0][:64].tobytes()
    if any(view[:64].tobytes() != head for view in views[1:]):
        return False
    return all(np.array_equal(views[0], view) for view in views[1:])


def _magnitude(raw: np.ndarray, dtype: DType) -> float:
    """Largest |x| of a block (0 for an empty one); inf or NaN when one is not finite."""
    if raw.size == 0:
        return 0.0
    if dtype.tag != "BF16":
        return float(np.maximum(raw.max(), -raw.min()))
    positive, negative = int(raw.view(np.int16).max()), int(raw.max())  # the sign is the highest bit
    pattern = max(positive, negative & 0x7FFF if negative >= 0x8000 else 0)
    return float(np.array(pattern << 16, np.uint32).view(np.float32))
