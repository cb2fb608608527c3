"""What one thread of the merge does: read and hash blocks of all sources, and compute merged raw values.

The bridge between the files (``Reader``) and the pure arithmetic and operators. It writes nothing; ``stream`` does.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from merit.errors import MergeError
from merit.hf.checkpoint import TensorDigest, TensorInfo, pread_into
from merit.hf.dtypes import BLOCK, to_float
from merit.merge import native
from merit.merge.arithmetic import Combination, NonFiniteError, round_to
from merit.merge.operators import ties
from merit.merge.operators.entries import Entries
from merit.merge.plan import MergePlan, TensorPlan
from merit.merge.result import Number
from merit.parallel import parallel, threads

__all__ = ["SPAN", "WHOLE", "Reader", "Statistics", "TrimmedEntries", "Worker"]

PIECE = 4
"""Blocks per step of a linear merge: longer array operations, so that threads wait less for the interpreter lock."""
SPAN = 8
"""Blocks per unit of work."""
WHOLE = ("matrix", "tensor", "compute")
"""Kinds of tensors that one thread merges as a whole."""


class Reader:
    """The tensors of θ0 (source 0), of the branches (1..K) and of their moments (K+1..2K), hashed as they are read.

    ``with_base`` says whether θ0's data is read at all: an average needs it only for its fingerprint.
    """

    def __init__(self, plan: MergePlan) -> None:
        tensors = [t for f in plan.files for t in f.tensors]
        self.folders = [plan.base.folder, *(h.folder for h in (*plan.heads, *plan.moments))]
        self.digests = [TensorDigest() for _ in self.folders]
        linear = all(t.kind == "exact" or (t.kind == "linear" and not t.coefficients[0]) for t in tensors)
        self.with_base = plan.base_fingerprint is None or not linear
        self._files: dict[tuple[int, str], tuple[int, Path]] = {}
        for tensor in tensors:
            for digest, source in zip(self.digests, tensor.sources, strict=False):
                digest.add_tensor(source)

    @contextmanager
    def open(self, tensors: Sequence[TensorPlan]) -> Iterator[None]:
        """Keep the files that hold the sources of ``tensors`` open."""
        try:
            for k, name in sorted({(k, s.file) for t in tensors for k, s in enumerate(t.sources)}):
                path = self.folders[k] / name
                self._files[k, name] = os.open(path, os.O_RDONLY), path
            yield
        finally:
            while self._files:
                os.close(self._files.popitem()[1][0])

    def prefetch(self, tensor: TensorPlan, first: int) -> None:
        """Ask the system to read a span ahead in one large request, whatever its read-ahead window."""
        if not hasattr(os, "posix_fadvise"):
            return
        for k, source in list(enumerate(tensor.sources))[not self.with_base :]:
            step = BLOCK * source.dtype.itemsize
            length = source.nbytes if tensor.kind in WHOLE else SPAN * step
            start = first * step
            if start < source.nbytes:
                descriptor, _ = self._files[k, source.file]
                length = min(length, source.nbytes - start)
                os.posix_fadvise(descriptor, source.start + start, length, os.POSIX_FADV_WILLNEED)

    def read(self, k: int, source: TensorInfo, block: int, buffer: memoryview, blocks: int = 1) -> np.ndarray:
        """Raw values of ``blocks`` blocks of source ``k``, starting at ``block`` (fewer at its end), in ``buffer``."""
        step = BLOCK * source.dtype.itemsize
        part = buffer[: min(blocks * step, source.nbytes - block * step)]
        descriptor, path = self._files[k, source.file]
        pread_into(descriptor, part, source.start + block * step, path)
        self.digests[k].add(source.name, block, part)
        return np.frombuffer(part, source.dtype.raw)


class Statistics:
    """What operators report, for the record; safe to use from all threads.

    Attributes:
        paths: How the linear arithmetic was done: ``kernel``, ``numpy``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._norms = np.zeros(2)
        self.paths: set[str] = set()
        self._numbers: dict[str, Number | list[float] | dict[str, Number]] = {}

    def add_norms(self, tau: np.ndarray, mean: np.ndarray) -> None:
        """Add ‖τ‖² and ‖uniform mean of δ‖² of a part of the model."""
        norms = [float(np.vdot(tau, tau)), float(np.vdot(mean, mean))]
        with self._lock:
            self._norms += norms

    def add(self, key: str, value: Number | list[float]) -> None:
        """Set a number of the whole merge."""
        with self._lock:
            self._numbers[key] = value

    def add_of_tensor(self, key: str, tensor: str, value: Number) -> None:
        """Set a number of one tensor."""
        with self._lock:
            by_tensor = self._numbers.setdefault(key, {})
            assert isinstance(by_tensor, dict)
            by_tensor[tensor] = value

    def summary(self) -> dict[str, Number | list[float] | dict[str, Number]]:
        """All numbers; ``norm_ratio`` is ‖τ‖ / ‖uniform mean of δ‖ (six digits: the sum's order depends on threads)."""
        if self._norms[1] > 0:
            self._numbers["norm_ratio"] = float(f"{np.sqrt(self._norms[0] / self._norms[1]):.6g}")
        return {k: dict(sorted(v.items())) if isinstance(v, dict) else v for k, v in sorted(self._numbers.items())}


class Worker:
    """One thread's buffers and kernels."""

    def __init__(
        self, reader: Reader, plan: MergePlan, statistics: Statistics, entries: TrimmedEntries | None = None
    ) -> None:
        self.reader, self.plan, self.statistics, self.entries = reader, plan, statistics, entries
        self._buffers = [memoryview(bytearray(PIECE * BLOCK * 8)) for _ in reader.folders]
        self._kernels: dict[tuple[int, tuple[str, ...], str], Combination] = {}
        self._space = bytearray(SPAN * BLOCK * 8)

    def merge(self, tensor: TensorPlan, first: int) -> np.ndarray:
        """Raw merged values of a span of blocks from ``first`` on (``WHOLE`` kinds: of the whole tensor).

        Raises:
            NonFiniteError: A source (numbered as in the reader) or the result is not finite.
            MergeError: Tensors that must be identical differ.
        """
        if tensor.kind in WHOLE:
            return self._whole(tensor)
        n = min(SPAN * BLOCK, tensor.out.size - first * BLOCK)
        result = np.frombuffer(self._space, tensor.out.dtype.raw, n)
        used, kernel = self._kernel(tensor) if tensor.kind == "linear" else ([], None)
        step = PIECE if kernel is not None else 1
        for block in range(first, min(first + SPAN, tensor.out.blocks), step):
            out = result[(block - first) * BLOCK : (block - first + step) * BLOCK]
            if kernel is not None:
                self._linear(tensor, block, out, used, kernel)
            elif tensor.kind == "exact":
                self._exact(tensor, block, out)
            else:
                self._entries(tensor, block, out)
        if kernel is not None:
            kernel.settle()
        return result

    def _raws(self, tensor: TensorPlan, block: int, blocks: int = 1) -> dict[int, np.ndarray]:
        sources = list(enumerate(tensor.sources))[not self.reader.with_base :]
        return {k: self.reader.read(k, source, block, self._buffers[k], blocks) for k, source in sources}

    def _kernel(self, tensor: TensorPlan) -> tuple[list[int], Combination]:
        used = [k for k, c in enumerate(tensor.coefficients) if c]
        key = (id(tensor.coefficients), tuple(tensor.sources[k].dtype.tag for k in used), tensor.out.dtype.tag)
        if key not in self._kernels:
            coefficients = [tensor.coefficients[k] for k in used]
            dtypes = [tensor.sources[k].dtype for k in used]
            made = Combination(coefficients, dtypes, tensor.out.dtype, PIECE * BLOCK, native.load())
            self._kernels[key] = made
            self.statistics.paths.add("kernel" if made.compiled else "numpy")
        return used, self._kernels[key]

    def _linear(self, tensor: TensorPlan, block: int, out: np.ndarray, used: list[int], kernel: Combination) -> None:
        raws = self._raws(tensor, block, PIECE)
        try:
            kernel([raws[k] for k in used], out)
        except NonFiniteError as error:
            raise NonFiniteError(None if error.source is None else used[error.source]) from None

    def _exact(self, tensor: TensorPlan, block: int, out: np.ndarray) -> None:
        raws = list(self._raws(tensor, block).values())[-len(self.plan.branches) :]
        for raw, branch in zip(raws, self.plan.branches, strict=False):
            if raw.tobytes() != raws[0].tobytes():
                raise MergeError(
                    f"{tensor.out.name} ({tensor.out.dtype.tag}) differs between {self.plan.branches[0].name} and "
                    f"{branch.name}; tensors of this dtype must be identical, they cannot be averaged.",
                    f"Nothing was left behind. Leave out the differing branch ({branch.name}).",
                )
        out[:] = raws[0]

    def _floats(self, tensor: TensorPlan, k: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(raw, float64) values of one block of source ``k``; refused when not finite."""
        raw = self.reader.read(k, tensor.sources[k], block, self._buffers[k])
        values = to_float(raw, tensor.sources[k].dtype)
        if not np.isfinite(values).all():
            raise NonFiniteError(k)
        return raw, values

    def deltas(self, tensor: TensorPlan, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(raw θ0, θ0 float64, δ (K, n) float64) of one block."""
        raw, base = self._floats(tensor, 0, block)
        branches = range(1, len(self.plan.branches) + 1)
        return raw, base, np.stack([self._floats(tensor, k, block)[1] - base for k in branches])

    def _entries(self, tensor: TensorPlan, block: int, out: np.ndarray) -> None:
        raw, base, deltas = self.deltas(tensor, block)
        moments = self._moments(tensor, block)
        if not deltas.any() and tensor.out.dtype == tensor.sources[0].dtype:
            out[:] = raw
            return
        if tensor.kind == "entry":
            plan = self.plan
            entries = Entries(deltas, np.array(plan.shares), tensor.out.name, block * BLOCK, moments)
            tau = plan.operator.function(entries, **plan.options)
        else:
            assert self.entries is not None
            tau = self.entries.merge(tensor.out.name, deltas)
        self.statistics.add_norms(tau, deltas.mean(axis=0))
        out[:] = _finite(base + float(self.plan.scale) * tau, tensor)

    def _moments(self, tensor: TensorPlan, block: int) -> np.ndarray | None:
        """Second moments (K, n) float64 of one block, if the operator needs them."""
        first = len(self.plan.branches) + 1
        if len(tensor.sources) == first:
            return None
        moments = np.stack([self._floats(tensor, k, block)[1] for k in range(first, len(tensor.sources))])
        if moments.min(initial=0.0) < 0:
            raise MergeError(
                f"{tensor.out.name}: a second moment is negative.", "The file is damaged; retrain the branch."
            )
        return moments

    def _matrix(self, tensor: TensorPlan, k: int, i: int) -> np.ndarray:
        """Matrix ``i`` of a 3-D stack of source ``k``, else the whole tensor, in float64; reads only its own blocks."""
        source = tensor.sources[k]
        shape = source.shape[1:] if _is_stack(tensor) else source.shape
        start = i * math.prod(shape)
        end = start + math.prod(shape)
        values = np.empty(end - start)
        for block in range(start // BLOCK, -(-end // BLOCK)):
            part, first = self._floats(tensor, k, block)[1], block * BLOCK
            low, high = max(start, first), min(end, first + part.size)
            values[low - start : high - start] = part[low - first : high - first]
        return values.reshape(shape)

    def _whole(self, tensor: TensorPlan) -> np.ndarray:
        stack = _is_stack(tensor)
        return np.concatenate([self._merged(tensor, i, stack) for i in range(tensor.out.shape[0] if stack else 1)])

    def _merged(self, tensor: TensorPlan, i: int, stack: bool) -> np.ndarray:
        """Raw merged values of one matrix (``compute``: of one whole tensor, never of a stack), flat."""
        name, plan = tensor.out.name, self.plan
        base = self._matrix(tensor, 0, i)
        if tensor.kind == "compute":
            assert plan.compute is not None
            return _finite(plan.compute(name, base), tensor).reshape(-1)
        update = plan.update
        if update is not None:
            deltas = _Deltas(lambda k: update(k, name, base), len(plan.branches))
        else:
            deltas = _Deltas(lambda k: self._matrix(tensor, k + 1, i) - base, len(plan.branches))
        mean = np.zeros_like(base)
        for k in range(len(deltas)):
            mean += deltas[k]
        mean /= len(deltas)
        options = {key: value for key, value in plan.options.items() if key != "matrix_scope"}
        tau, numbers = plan.operator.function(deltas, **options)
        for key, value in numbers.items():
            self.statistics.add_of_tensor(key, f"{name}[{i}]" if stack else name, value)
        self.statistics.add_norms(tau, mean)
        if not mean.any() and not tau.any() and tensor.out.dtype == tensor.sources[0].dtype:
            return round_to(base, tensor.out.dtype).reshape(-1)
        return _finite(base + float(plan.scale) * tau, tensor).reshape(-1)


def _is_stack(tensor: TensorPlan) -> bool:
    """Whether a tensor is merged matrix by matrix; ``tensor`` operators take everything whole."""
    return len(tensor.out.shape) == 3 and tensor.kind != "tensor"


class _Deltas:
    """K task vectors, computed when indexed, so that only one is in memory at a time."""

    def __init__(self, get: Callable[[int], np.ndarray], count: int) -> None:
        self._get, self._count = get, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, k: int, /) -> np.ndarray:
        return self._get(k)


def _second(count: Callable[[np.ndarray], np.ndarray], _: str, deltas: np.ndarray) -> np.ndarray:
    return count(deltas)


def _finite(values: np.ndarray, tensor: TensorPlan) -> np.ndarray:
    """Round once to the output dtype; NonFiniteError if that overflows."""
    result = round_to(values, tensor.out.dtype)
    if not np.isfinite(to_float(result, tensor.out.dtype)).all():
        raise NonFiniteError(None)
    return result


class TrimmedEntries:
    """TIES over a whole model: passes that find the thresholds and the majority sign, then the merge of a block."""

    def __init__(self, reader: Reader, plan: MergePlan, statistics: Statistics) -> None:
        self._reader, self._plan, self._statistics = reader, plan, statistics
        self._weights = np.array(plan.shares) if plan.options["weighted"] else None
        self._thresholds: dict[str, np.ndarray] = {}
        tensors = [t for f in plan.files for t in f.tensors if t.kind == "block" and t.out.size]
        groups = [tensors] if plan.options["trim"] == "global" else [[t] for t in tensors]
        density = float(plan.options["density"])
        for group in groups:
            finder = ties.Threshold(len(plan.branches), density)
            finder.high += self._scan(group, partial(_second, finder.count_high))
            finder.close_high()
            finder.low += self._scan(group, partial(_second, finder.count_low))
            self._thresholds.update({t.out.name: finder.values() for t in group})
        counts = self._scan(tensors, self._signs_and_kept)
        self._majority = float(np.sign(counts[0]))
        size = sum(t.out.size for t in tensors)
        statistics.add("densities", [float(c / size) for c in counts[1:]])  # non-zero entries kept, by branch
        if plan.options["trim"] == "global":
            statistics.add("thresholds", [float(x) for x in next(iter(self._thresholds.values()))])

    def _signs_and_kept(self, name: str, deltas: np.ndarray) -> np.ndarray:
        trimmed = ties.trim(deltas, self._thresholds[name])
        kept = np.count_nonzero(trimmed, axis=1)
        if self._weights is not None:
            trimmed = trimmed * self._weights[:, None]
        return np.array([int(ties.elected_signs(trimmed).sum()), *kept], np.int64)

    def _scan(self, tensors: Sequence[TensorPlan], count: Callable[[str, np.ndarray], np.ndarray]) -> np.ndarray:
        """Σ of ``count(name, deltas)`` over all blocks (integers, so the order does not matter)."""
        jobs = [(t, block) for t in tensors for block in range(t.out.blocks)]
        lock, totals = threading.Lock(), []

        def work(take: Callable[[], int]) -> None:
            worker, total = Worker(self._reader, self._plan, self._statistics), None
            while (i := take()) < len(jobs):
                tensor, block = jobs[i]
                try:
                    part = count(tensor.out.name, worker.deltas(tensor, block)[2])
                except NonFiniteError as error:
                    raise NonFiniteError(error.source, tensor.out.name) from None
                total = part if total is None else total + part
            if total is not None:
                with lock:
                    totals.append(total)

        with self._reader.open(tensors):
            parallel(work, max(1, min(threads(), len(jobs))))
        return sum(totals[1:], totals[0])

    def merge(self, name: str, deltas: np.ndarray) -> np.ndarray:
        """τ (n,) of one block of tensor ``name``, from δ (K, n) float64."""
        return ties.merge_entries(ties.trim(deltas, self._thresholds[name]), self._majority, self._weights)
