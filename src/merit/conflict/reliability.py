"""What sub-samples tell: sampling noise, unbiased norms, noise-corrected cosines, and how many examples are enough.

Pure NumPy on the inner products of quarter-sample gradients; it runs no model and reads no file. Every dataset has four
partial gradients, from places 0, 4, 8 ..., 1, 5 ..., 2, 6 ... and 3, 7 ... of its calibration sample, whose sum is the
sample's mean gradient: g = Σ_p S_p. With a_p the quarters' shares of the weight, the S_p/a_p are independent estimates of
one gradient, and their squared distances measure the noise:

    S² = mean over pairs of ‖S_p/a_p − S_r/a_r‖² / (q_p + q_r)     E S² = trace of the covariance of one example's gradient
    E‖g‖² = ‖G‖² + S² (q − Q)                                      G: the gradient of all rows of the dataset

q = Σw²/(Σw)² is one over the effective number of examples (exactly 1/n with equal weights); Q is that of the whole dataset,
the finite-population correction: a sample of all rows has no noise. With token weights both are ratio estimates, right to
first order. No full gradient is ever needed.

Source: Cochran, Sampling Techniques, 1977 (§2.5 finite populations, §6 ratio estimates).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

PARTS = 4
"""Sub-samples per dataset: two choose an axis, two judge it."""


@dataclass(frozen=True)
class SubSamples:
    """Inner products and weights of T datasets' quarter-sample gradients; row t everywhere is dataset t.

    Attributes:
        gram: (4T, 4T), float32 above 200 datasets: ⟨S_p of i, S_r of j⟩ at row pT + i, column rT + j.
        shares: a (T, 4): the quarters' shares of the weight; 0 where a quarter is empty.
        q_parts: q of the quarters (T, 4); infinite where empty.
        q: q of the sample (T,).
        q_all: Q of all the dataset's rows (T,).
    """

    gram: np.ndarray
    shares: np.ndarray
    q_parts: np.ndarray
    q: np.ndarray
    q_all: np.ndarray

    def products(self) -> np.ndarray:
        """⟨S_p of i, S_r of j⟩ as (4, 4, T, T), a view."""
        count = len(self.q)
        return self.gram.reshape(PARTS, count, PARTS, count).transpose(0, 2, 1, 3)

    def excess(self) -> np.ndarray:
        """q − Q (T,): the share of the noise that remains in the sample; exactly 0 where it is the whole dataset."""
        left = np.maximum(self.q - self.q_all, 0.0)
        return np.where(left <= 1e-12 * self.q, 0.0, left)


@dataclass(frozen=True)
class Reliability:
    """Per dataset, all (T,) float64.

    Attributes:
        squared_norm: ‖g‖², inflated by sampling noise.
        unbiased_squared_norm: Unbiased for ‖G‖², the squared norm of all rows' gradient; ≤ 0 where noise drowns it.
        noise: S² (q − Q): the part of ‖g‖² that is sampling noise. NaN with a single example of a larger dataset.
        reliability: Expected cosine of g with that of another such sample of endless data. NaN with a single example.
        expected_cosine: Expected cosine of g with G; 1 where the sample is the whole dataset.
    """

    squared_norm: np.ndarray
    unbiased_squared_norm: np.ndarray
    noise: np.ndarray
    reliability: np.ndarray
    expected_cosine: np.ndarray


def reliability(parts: SubSamples) -> Reliability:
    """Noise and reliability of every dataset's gradient, from its own quarters."""
    own = np.diagonal(parts.products(), axis1=2, axis2=3).astype(np.float64)  # (4, 4, T)
    squared = own.sum(axis=(0, 1))
    shares = np.where(parts.shares > 0, parts.shares, np.nan).T
    scaled = own / (shares[:, None] * shares[None, :])
    estimates = np.array(
        [
            (scaled[p, p] + scaled[r, r] - 2 * scaled[p, r]) / (parts.q_parts[:, p] + parts.q_parts[:, r])
            for p, r in combinations(range(PARTS), 2)
        ]
    )
    pairs = np.isfinite(estimates).sum(axis=0)
    with np.errstate(invalid="ignore"):
        variance = np.where(pairs > 0, np.nansum(estimates, axis=0) / np.maximum(pairs, 1), np.nan)
        excess = parts.excess()
        noise = np.where(excess == 0, 0.0, variance * excess)
        unbiased = squared - noise
        return Reliability(
            squared_norm=squared,
            unbiased_squared_norm=unbiased,
            noise=noise,
            reliability=np.clip(1.0 - variance * parts.q / squared, -1.0, 1.0),
            expected_cosine=np.where(excess == 0, 1.0, np.sqrt(np.clip(unbiased / squared, 0.0, 1.0))),
        )


def noise_corrected_cosine(gram: np.ndarray, found: Reliability) -> np.ndarray:
    """Cosines between whole-data gradients, estimated from samples: G_ij / √(u_i u_j), u the unbiased squared norms.

    Sampling noise of different datasets is independent, so it leaves ⟨g_i, g_j⟩ unbiased and only inflates the norms: plain
    cosines are too small in magnitude. The estimate can leave [−1, 1] by its own noise and is not clipped.

    Returns:
        (T, T) float64 with unit diagonal; rows and columns of datasets with u ≤ 0 (or unknown) are NaN, diagonal too.
    """
    u = np.where(found.unbiased_squared_norm > 0, found.unbiased_squared_norm, np.nan)
    corrected: np.ndarray = gram / np.sqrt(np.outer(u, u))
    np.fill_diagonal(corrected, np.where(np.isnan(u), np.nan, 1.0))
    return corrected


def calibration_steps(rows: int, limit: int, first: int = 48) -> list[int]:
    """Sample sizes at which an automatic draw stops to look: 48, 68, 96, 136, 192 ... (×√2, in fours), up to what there is.

    Args:
        rows: Rows of the dataset.
        limit: ``conflict.max_examples``.
        first: Smallest sample; below it two halves tell too little.
    """
    last = min(rows, limit)
    steps, size, k = [], first, 0
    while size < last:
        steps.append(size)
        k += 1
        size = 4 * round(first * 2 ** (k / 2) / 4)
    return [*steps, last]
