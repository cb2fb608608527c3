"""TIES: trim each δ_k to its largest entries, elect a sign per entry, average the entries that agree with it.

Limits: no weights in the paper (``weighted`` multiplies δ_k by w_k in the election and in the mean). The kept share is
⌊density · d⌋ entries of the whole vector (``trim: global``) or of each tensor (``local``); entries equal to the threshold
are also kept, and exact zeros count as entries, so the realised density differs and is recorded.

Source: Yadav et al., TIES-Merging: resolving interference when merging models, arXiv:2306.01708, §4, Algorithm 1.
"""

from __future__ import annotations

import numpy as np


def trim(deltas: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Zero the entries of δ_k (K, n) below branch k's threshold (K,); a threshold of 0 keeps all."""
    kept = np.empty_like(deltas)
    for delta, threshold, out in zip(deltas, thresholds, kept, strict=True):
        single = delta.astype(np.float32)
        np.multiply(delta, np.abs(single, out=single) >= threshold, out=out)
    return kept


def elected_signs(trimmed: np.ndarray) -> np.ndarray:
    """Sign of Σ_k δ_k per entry, for trimmed δ (K, n): −1, 0 or 1 in float64 (n,). 0 is resolved by the majority later."""
    total = np.zeros(trimmed.shape[1])
    for row in trimmed:
        total += row
    return np.sign(total)


def merge_entries(trimmed: np.ndarray, majority: float, weights: np.ndarray | None = None) -> np.ndarray:
    """Merge entries of trimmed task vectors.

    Args:
        trimmed: (K, n) float64 from ``trim``.
        majority: −1, 0 or 1: sign of the sum of all elected signs of the model, used where an entry's sum is 0.
        weights: None, or w_k (K,) with Σ w_k = 1.

    Returns:
        τ (n,) float64: the (weighted) mean of the non-zero values with the elected sign, 0 where there is none.
    """
    share = np.ones(len(trimmed)) if weights is None else weights
    sign = elected_signs(trimmed if weights is None else trimmed * weights[:, None])
    sign[sign == 0] = majority
    total, count, part = np.zeros_like(sign), np.zeros_like(sign), np.empty_like(sign)
    for row, w in zip(trimmed, share, strict=True):
        np.multiply(row, sign, out=part)  # positive where the value agrees
        count += np.multiply(part > 0, w)
        np.maximum(part, 0, out=part)
        part *= w
        total += part
    np.divide(total, count, out=total, where=count > 0)
    total *= sign
    return total


class Threshold:
    """Finds the ⌊density · d⌋-th largest |δ| of each branch exactly in two counting passes, without holding the vector.

    |δ| as float32 has a bit pattern that is monotone in its value: pass 1 counts the high 16 bits, pass 2 the low 16 bits
    inside the bin where the count crosses.
    """

    def __init__(self, branches: int, density: float) -> None:
        self.density, self.branches = density, branches
        self.high = np.zeros((branches, 1 << 16), np.int64)
        self.low = np.zeros((branches, 1 << 16), np.int64)
        self.bins = np.zeros(branches, np.int64)

    @staticmethod
    def bits(deltas: np.ndarray) -> np.ndarray:
        """Bit patterns of |δ| in float32, as uint32."""
        patterns: np.ndarray = np.abs(deltas.astype(np.float32)).view(np.uint32)
        return patterns

    def count_high(self, deltas: np.ndarray) -> np.ndarray:
        """Pass 1, one block (K, n): counts (K, 65536) to be added to ``high``."""
        return np.stack([np.bincount(row >> 16, minlength=1 << 16) for row in self.bits(deltas)])

    def close_high(self) -> None:
        """Between the passes: find each branch's crossing bin."""
        for k, counts in enumerate(self.high):
            self.bins[k] = (1 << 16) - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), max(1, self._keep(k))))

    def count_low(self, deltas: np.ndarray) -> np.ndarray:
        """Pass 2, one block (K, n): counts (K, 65536) inside the crossing bins, to be added to ``low``."""
        rows = zip(self.bits(deltas), self.bins, strict=True)
        return np.stack([np.bincount(row[row >> 16 == b] & 0xFFFF, minlength=1 << 16) for row, b in rows])

    def _keep(self, k: int) -> int:
        return int(self.density * int(self.high[k].sum()))

    def values(self) -> np.ndarray:
        """Thresholds (K,) float64; infinity where nothing is kept (⌊density · d⌋ = 0)."""
        result = np.full(self.branches, np.inf)
        for k in range(self.branches):
            rest = self._keep(k) - int(self.high[k, self.bins[k] + 1 :].sum())
            if self._keep(k) > 0:
                low = (1 << 16) - 1 - int(np.searchsorted(np.cumsum(self.low[k, ::-1]), rest))
                pattern = np.array((int(self.bins[k]) << 16) | low, np.uint32)
                result[k] = float(pattern.view(np.float32))
        return result
