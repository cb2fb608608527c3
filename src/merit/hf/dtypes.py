"""The safetensors dtypes as represented in NumPy, and the block size of streaming. No files, no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from merit.errors import CheckpointError

BLOCK = 1 << 16
"""Elements per block of a tensor: the unit of hashing and of streaming. Part of the fingerprint's definition."""


@dataclass(frozen=True, slots=True)
class DType:
    """One safetensors dtype: its tag, bytes per element, and NumPy dtype of its raw bytes (bf16, fp8: unsigned)."""

    tag: str
    itemsize: int
    raw: str
    kind: str  # "float" (merged), "float8" (too coarse to merge: copied when identical) or "exact" (must be identical)


_RAW = (
    "BF16:<u2 F16:<f2 F32:<f4 F64:<f8 F8_E4M3:u1 F8_E5M2:u1 "
    "BOOL:u1 U8:u1 I8:i1 U16:<u2 I16:<i2 U32:<u4 I32:<i4 U64:<u8 I64:<i8"
)


def _dtype(entry: str) -> DType:
    tag, raw = entry.split(":")
    kind = "float8" if tag.startswith("F8") else "float" if "F" in tag else "exact"
    return DType(tag, np.dtype(raw).itemsize, raw, kind)


DTYPES: dict[str, DType] = {dtype.tag: dtype for dtype in map(_dtype, _RAW.split())}


def to_float(raw: np.ndarray, dtype: DType, out: type = np.float64) -> np.ndarray:
    """Raw floating values as ``out`` (float64 or float32; widening is exact, float64 to float32 rounds once)."""
    if dtype.kind != "float":
        raise CheckpointError(f"{dtype.tag} is not a floating dtype that can be widened.")
    if dtype.tag == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(out)
