"""Count sketch of a gradient that is never held as a whole: signs and buckets from a hash, folded parameter by parameter.

Pure tensor maths: which bucket and which sign an entry gets, and how a gradient is added. It knows no model and no files.

Entry i of the parameter called ``name`` goes to bucket (o(i div B) + i mod B) mod m with sign σ(i) = ±1, where the offset o
of a block of B entries and the signs are counter-based hashes (SplitMix64's finalizer) of (seed, name, counter): no random
array is stored, and CPU and GPU compute identical bits. A sketch is linear in the gradient, so micro-batches and parameters
simply add. For g, h sketched with one seed, and signs and offsets independent,

    E⟨Sg, Sh⟩ = ⟨g, h⟩
    Var⟨Sg, Sh⟩ = 1/m · Σ (g_i² h_j² + g_i h_i g_j h_j) over pairs i ≠ j of *different* blocks  ≤  (‖g‖²‖h‖² + ⟨g,h⟩²) / m

the bound being that of the plain count sketch: only pairs inside one block are left out, since they never collide. Blocks
exist because a run of B neighbouring buckets costs one hash and stays in the processor's cache; B is small so that
collisions of many pairs at once, which fatten the tail but not the variance, stay rare.

Source: Charikar, Chen & Farach-Colton 2002 (count sketch); Weinberger et al. 2009 (inner products under feature hashing);
Steele, Lea & Flood 2014 (SplitMix).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

__all__ = ["BLOCK", "Sketch", "buckets", "fold", "signs"]

BLOCK = 256
"""Entries that share one offset hash (fewer where the sketch itself is smaller)."""

_CPU_CHUNK, _CPU_PIECE, _CPU_SHORT = 2**20, 2**17, 2**13
_CUDA_CHUNK = 2**24
_KEPT = 256
"""Runs of entries whose hashes a sketch keeps on a CPU, at most 40 MB: all of a model of 256 tensors."""
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SIGN_BIT = -(2**31)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - 2**64 if value >= 2**63 else value


@lru_cache(maxsize=8192)
def _key(seed: int, name: str, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{name}\0{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _hash(counters: torch.Tensor, key: int) -> torch.Tensor:
    """SplitMix64 of int64 counters; int64 arithmetic wraps alike on every device."""
    z = counters * _signed(_GOLDEN) + key
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _signed(_MIX1)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _signed(_MIX2)
    return z ^ ((z >> 31) & (2**33 - 1))


def _sign_words(name: str, seed: int, start: int, count: int, device: torch.device) -> torch.Tensor:
    """Words of 32 sign bits for entries ``start`` .. ``start + count`` (start a multiple of 64), int32."""
    first, words = start // 64, -(-count // 64)
    counters = torch.arange(first, first + words, dtype=torch.int64, device=device)
    return _hash(counters, _key(seed, name, "sign")).view(torch.int32)


def _offsets(name: str, seed: int, start: int, count: int, size: int, device: torch.device) -> torch.Tensor:
    """First bucket of every block of entries ``start`` .. ``start + count`` (start a multiple of the block), int32."""
    block = min(BLOCK, size)
    counters = torch.arange(start // block, -(-(start + count) // block), dtype=torch.int64, device=device)
    return (_hash(counters, _key(seed, name, "bucket")) & (size - 1)).to(torch.int32)


def _shifts(device: torch.device) -> torch.Tensor:
    """Moves sign bit k of a word to bit 31."""
    return 31 - torch.arange(32, dtype=torch.int32, device=device)


def signs(name: str, start: int, count: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Signs ±1 (count,) float32 of entries ``start`` .. ``start + count`` of parameter ``name``."""
    begin = start - start % 64
    words = _sign_words(name, seed, begin, start - begin + count, torch.device(device))
    bits = (words[:, None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return 1.0 - 2.0 * bits.flatten()[start - begin :][:count].float()


def buckets(
    name: str, start: int, count: int, size: int, seed: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Buckets (count,) int32 in [0, size) of entries ``start`` .. ``start + count`` of parameter ``name``."""
    block = min(BLOCK, size)
    begin = start - start % block
    offsets = _offsets(name, seed, begin, start - begin + count, size, torch.device(device))
    inside = torch.arange(block, dtype=torch.int32, device=device)
    return ((offsets[:, None] + inside) & (size - 1)).flatten()[start - begin :][:count]


class Hashes(NamedTuple):
    """What a run of entries needs: :func:`_sign_words` and :func:`_offsets`, or for a short run, spelled out per entry."""

    signs: torch.Tensor
    places: torch.Tensor


def fold(
    total: torch.Tensor,
    name: str,
    values: torch.Tensor,
    seed: int,
    kept: dict[tuple[str, int, int], Hashes] | None = None,
) -> None:
    """Add a parameter's gradient to a sketch, in place.

    Scratch memory is about 4 MB whatever the parameter's size (a few hundred on CUDA). Entries are added in float64, so
    that the order of addition, which differs between devices and micro-batch sizes, does not show in float32.

    Args:
        total: The sketch (m,), float64, m a power of two, on the gradient's device.
        name: The parameter's name: part of the hash.
        values: The gradient, any shape, any floating dtype (cast to float32 first).
        seed: Part of the hash.
        kept: Hashes of calls before, of the same seed, size and device; new ones are added while they are few.
    """
    size = total.numel()
    assert size & (size - 1) == 0, "the sketch size must be a power of two"
    flat = values.detach().reshape(-1)
    if flat.device.type == "cpu":
        for start in range(0, flat.numel(), _CPU_CHUNK):
            part = flat[start : start + _CPU_CHUNK].float().contiguous()
            add = _add_short if part.numel() <= _CPU_SHORT else _add_on_cpu
            add(total, part, *_cpu_hashes(name, seed, start, part.numel(), size, {} if kept is None else kept))
        return
    add = _add_compiled if _compile_works(flat.device) else _add
    for start in range(0, flat.numel(), _CUDA_CHUNK):
        part = flat[start : start + _CUDA_CHUNK].float().contiguous()
        words = _sign_words(name, seed, start, part.numel(), flat.device)
        add(total, part, words, _offsets(name, seed, start, part.numel(), size, flat.device))


def _cpu_hashes(
    name: str, seed: int, start: int, count: int, size: int, kept: dict[tuple[str, int, int], Hashes]
) -> Hashes:
    """Hashes of entries ``start`` .. ``start + count``, from ``kept`` where they are there."""
    found = kept.get((name, start, count))
    if found is None:
        cpu = torch.device("cpu")
        found = Hashes(_sign_words(name, seed, start, count, cpu), _offsets(name, seed, start, count, size, cpu))
        if count <= _CPU_SHORT:
            found = Hashes(_flips(found.signs, count), _places(found.places, count, size).long())
        if len(kept) < _KEPT:
            kept[name, start, count] = found
    return found


def _flips(words: torch.Tensor, count: int) -> torch.Tensor:
    """The bit that turns an entry's sign, in its place in float32: (count,) int32."""
    return ((words[:, None] << _shifts(words.device)) & _SIGN_BIT).flatten()[:count]


def _places(offsets: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """Buckets (count,) int32."""
    inside = torch.arange(min(BLOCK, size), dtype=torch.int32, device=offsets.device)
    return ((offsets[:, None] + inside) & (size - 1)).flatten()[:count]


def _add(total: torch.Tensor, part: torch.Tensor, words: torch.Tensor, offsets: torch.Tensor) -> None:
    """Add ``part`` with the signs of ``words`` to runs of buckets that begin at ``offsets``."""
    count = part.numel()
    signed = (part.view(torch.int32) ^ _flips(words, count)).view(torch.float32)
    total.index_add_(0, _places(offsets, count, total.numel()), signed.to(total.dtype))


def _add_on_cpu(total: torch.Tensor, part: torch.Tensor, words: torch.Tensor, offsets: torch.Tensor) -> None:
    """:func:`_add` in pieces that stay in the processor's cache, with reused scratch: twice as fast.

    scatter_add_ takes half of index_add_'s time and adds in the same order.
    """
    size, block = total.numel(), min(BLOCK, total.numel())
    flips = torch.empty((_CPU_PIECE // 32, 32), dtype=torch.int32)
    places = torch.empty((_CPU_PIECE // block, block), dtype=torch.int64)
    signed = torch.empty(_CPU_PIECE, dtype=torch.float64)
    shifts, inside = _shifts(part.device), torch.arange(block)
    pieces = zip(
        part.view(torch.int32).split(_CPU_PIECE),  # type: ignore[no-untyped-call]
        words[:, None].split(_CPU_PIECE // 32),  # type: ignore[no-untyped-call]
        offsets.long()[:, None].split(_CPU_PIECE // block),  # type: ignore[no-untyped-call]
        strict=True,
    )
    for piece, words_here, offsets_here in pieces:
        count = piece.numel()
        bits = torch.bitwise_left_shift(words_here, shifts, out=flips[: len(words_here)]).view(-1)[:count]
        bits.bitwise_and_(_SIGN_BIT).bitwise_xor_(piece)
        at = torch.add(offsets_here, inside, out=places[: len(offsets_here)]).view(-1)[:count]
        at.bitwise_and_(size - 1)
        total.scatter_add_(0, at, signed[:count].copy_(bits.view(torch.float32)))


def _add_short(total: torch.Tensor, part: torch.Tensor, flips: torch.Tensor, places: torch.Tensor) -> None:
    """:func:`_add` of few entries, whose hashes are spelled out: there, calls take longer than arithmetic."""
    total.scatter_add_(0, places, (part.view(torch.int32) ^ flips).view(torch.float32).to(total.dtype))


@lru_cache(maxsize=1)
def _compiled() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]:
    return torch.compile(_add, dynamic=True)


def _add_compiled(total: torch.Tensor, part: torch.Tensor, words: torch.Tensor, offsets: torch.Tensor) -> None:
    _compiled()(total, part, words, offsets)


@lru_cache(maxsize=4)
def _compile_works(device: torch.device) -> bool:
    """Whether torch.compile gives what eager gives on this device (a machine may lack a compiler)."""
    values = torch.linspace(-1, 1, 1000, device=device)
    words, offsets = _sign_words("probe", 0, 0, 1000, device), _offsets("probe", 0, 0, 1000, 256, device)
    totals = [torch.zeros(256, dtype=torch.float64, device=device) for _ in range(2)]
    try:
        _add_compiled(totals[0], values, words, offsets)
    except Exception:  # whatever the compiler stack raises, eager is right
        return False
    _add(totals[1], values, words, offsets)
    return bool(torch.allclose(totals[0], totals[1], rtol=0, atol=1e-12))


class Sketch:
    """A sketch being filled: parameters are added one by one, in any order.

    Args:
        size: Buckets m, a power of two.
        seed: Seed of signs and buckets; only sketches of one seed can be compared.
        device: Where gradients will be.
    """

    def __init__(self, size: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.size, self.seed = size, seed
        self._total = torch.zeros(size, dtype=torch.float64, device=device)
        self._kept: dict[tuple[str, int, int], Hashes] = {}

    def reset(self) -> None:
        """Start again from zero."""
        self._total.zero_()

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Add a parameter's gradient."""
        fold(self._total, name, gradient, self.seed, self._kept)

    def vector(self) -> torch.Tensor:
        """The sketch so far (m,) float64 on the CPU."""
        return self._total.cpu().clone()
