"""``kernel.c``, compiled once per machine with its C compiler and kept in the user's cache folder, if possible.

The kernel returns the same bits as NumPy does in ``arithmetic`` (which takes over if there is no compiler, no writable
cache folder, or the dtype is not bfloat16 or float32), in a fraction of the time and without the interpreter lock.
``MERIT_KERNEL=numpy`` in the environment switches it off. Nothing is downloaded. Not covered: Windows' own compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from merit.files import file_hash, publish, sync
from merit.hf.dtypes import DTYPES, DType

__all__ = ["Kernel", "available"]

_SOURCE = Path(__file__).with_name("kernel.c")
_KINDS = {"BF16": 0, "F32": 1}
_MOST = 64  # operands; the kernel's own limit
_FLAGS = (["-O3", "-march=native", "-mprefer-vector-width=512"], ["-O3", "-march=native"], ["-O3"])
_SECONDS = 60  # for one compilation

Function = Callable[..., int]


class _Terms(ctypes.Structure):
    """``struct terms`` of kernel.c."""

    _fields_ = (
        ("coefficients", ctypes.c_void_p),
        ("numerators", ctypes.c_void_p),
        ("denominator", ctypes.c_double),
        ("count", ctypes.c_int32),
        ("copyable", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("kinds", ctypes.c_void_p),
    )


class Kernel:
    """One linear combination, bound to the compiled function; has scratch buffers, so use one per thread.

    Args:
        function: From ``load``.
        coefficients: The c_k in float64.
        rational: (numerators, denominator) with c_k = numerators[k] / denominator, all exact in float64; None if products
            of numerators and operands may not be exact.
        sources, out: Dtypes (``Kernel.covers``).
        copyable: The c_k sum to one and all dtypes are the same: blocks that are identical in all operands are copied.
        size: Maximum elements per call.
    """

    def __init__(
        self,
        function: Function,
        coefficients: Sequence[float],
        rational: tuple[Sequence[int], int] | None,
        sources: Sequence[DType],
        out: DType,
        copyable: bool,
        size: int,
    ) -> None:
        self._function = function
        numerators, denominator = rational or ([0] * len(coefficients), 0)
        numbers = np.array(numerators, np.float64)
        self._arrays = np.array(coefficients, np.float64), numbers, np.array([_KINDS[s.tag] for s in sources], np.int32)
        places = [array.ctypes.data for array in self._arrays]
        self._terms = _Terms(*places[:2], denominator, len(sources), copyable, _KINDS[out.tag], places[2])
        self._operands = (ctypes.c_void_p * len(sources))()
        self._undecided = np.empty(size, np.int64)
        self._fixed = ctypes.addressof(self._terms), self._undecided.ctypes.data

    @staticmethod
    def covers(sources: Sequence[DType], out: DType) -> bool:
        """Whether the compiled kernel supports these dtypes."""
        return len(sources) <= _MOST and all(d.tag in _KINDS for d in (*sources, out))

    def __call__(self, raws: Sequence[np.ndarray], out: np.ndarray) -> np.ndarray | int:
        """Combine: positions of elements that stay undecided, or the number of an operand that is not finite."""
        for k, raw in enumerate(raws):
            self._operands[k] = raw.__array_interface__["data"][0]
        terms, undecided = self._fixed
        left = self._function(terms, out.size, self._operands, out.__array_interface__["data"][0], undecided)
        return -1 - left if left < 0 else self._undecided[:left].copy()


def available() -> bool:
    """Whether merges on this machine use the compiled kernel."""
    return load() is not None


def load() -> Function | None:
    """The compiled function, compiled on first use; None if NumPy must do the work."""
    return None if os.environ.get("MERIT_KERNEL") == "numpy" else _load(_cache_folder())


@functools.cache
def _load(folder: Path) -> Function | None:
    if not folder.is_absolute():
        return None  # no home
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid"):
            status = folder.stat()
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                return None  # someone else could put code there
        path = _kept(folder) or _compile(folder)
        if path is None:
            return None
        function = ctypes.CDLL(str(path)).merit_combine
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 3]
    return function if _sound(function) else None


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    if home.startswith("~") and os.environ.get("HOME") == "":
        return Path(home)  # it would be expanded to the root folder
    return Path(os.path.expanduser(home)) / "merit"  # noqa: PTH111 (a home that cannot be found is not an error here)


def _key() -> str:
    """What the compiled code depends on: its source, the flags, the processor (a home folder may be shared)."""
    cpu = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        cpu = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    machine = os.uname().machine if hasattr(os, "uname") else ""
    parts = (_SOURCE.read_text(), str(_FLAGS), sys.platform, machine, cpu)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _kept(folder: Path) -> Path | None:
    """The compiled file, if it exists and is intact (its name contains its hash): loading half of one would crash."""
    for path in folder.glob(f"kernel-{_key()}-*.so"):
        if path.stem.rpartition("-")[2] == file_hash(path)[:24]:
            return path
        path.unlink()
    return None


def _compile(folder: Path) -> Path | None:
    def runs(*command: str) -> bool:
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False)
            return done.returncode == 0
        except subprocess.TimeoutExpired:
            return False

    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or (sys.platform == "darwin" and not runs("xcode-select", "-p")):
        return None  # Apple's cc without its tools would open a window that offers them
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "kernel.so"
        always = ("-fno-strict-aliasing", "-shared", "-fPIC", "-o", str(made), str(_SOURCE), "-lm")
        for flags in _FLAGS:
            if runs(compiler, *flags, *always):
                sync(made)
                path = folder / f"kernel-{_key()}-{file_hash(made)[:24]}.so"
                publish(made, path)
                return path
    return None


def _sound(function: Function) -> bool:
    """Whether ties, near-ties and cancellation come out right, as they would not if the compiler reordered arithmetic."""
    kernel = Kernel(function, [0.25, 0.25, 0.5], ([1, 1, 2], 4), [DTYPES["F32"]] * 3, DTYPES["BF16"], False, 4)
    step = 2.0**-6  # of bfloat16 at 2
    rows = [[2, 2, 2 + step, 1], [2 + step, 2 + step, 2 + 2 * step, 3], [2 + step / 2] * 2 + [2 + 1.5 * step, -2]]
    rows[2][1] += 2.0**-20
    out = np.empty(4, np.uint16)
    undecided = kernel([np.array(row, np.float32) for row in rows], out)
    return isinstance(undecided, np.ndarray) and not undecided.size and out.tolist() == [0x4000, 0x4001, 0x4002, 0]
