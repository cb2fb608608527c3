"""What two half-samples tell: sampling noise, unbiased norms, noise-corrected cosines, and how many examples are enough.

Pure NumPy on the inner products of half-sample gradients; it runs no model and reads no file. Every dataset t has two
partial gradients, from the even and the odd positions of its calibration sample, whose sum is the sample's mean gradient:
g = S_e + S_o. With a and b = 1 − a the halves' shares of the weight, S_e/a and S_o/b are two independent estimates of one
gradient, and their squared distance measures the noise:

    S² = ‖S_e/a − S_o/b‖² / (q_e + q_o)          E S² = trace of the covariance of one example's gradient
    E‖g‖² = ‖G‖² + S² (q − Q)                    G: the gradient of all rows of the dataset

q = Σw²/(Σw)² is one over the effective number of examples (exactly 1/n with equal weights); Q is that of the whole dataset,
the finite-population correction: a sample of all rows has no noise. With token weights both are ratio estimates, right to
first order. No full gradient is ever needed.

Source: Cochran, Sampling Techniques, 1977 (§2.5 finite populations, §6 ratio estimates); Spearman 1910, Brown 1910.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class HalfSamples:
    """Inner products and weights of T datasets' half-sample gradients; row t everywhere is dataset t.

    Attributes:
        even_even: ⟨S_e, S_e⟩ (T,) or (T, T) float64.
        odd_odd: ⟨S_o, S_o⟩, likewise.
        even_odd: ⟨S_e of row, S_o of column⟩, likewise.
        share_even: a (T,): the even half's share of the weight; 1 where a sample has one example.
        q_even: q of the even half (T,).
        q_odd: q of the odd half (T,); infinite where it is empty.
        q: q of the sample (T,).
        q_all: Q of all the dataset's rows (T,).
    """

    even_even: np.ndarray
    odd_odd: np.ndarray
    even_odd: np.ndarray
    share_even: np.ndarray
    q_even: np.ndarray
    q_odd: np.ndarray
    q: np.ndarray
    q_all: np.ndarray

    def gram(self) -> np.ndarray:
        """⟨g_i, g_j⟩ (T, T), from the full matrices of the halves."""
        gram: np.ndarray = self.even_even + self.odd_odd + self.even_odd + self.even_odd.T
        return gram


@dataclass(frozen=True)
class Reliability:
    """Per dataset, all (T,) float64.

    Attributes:
        squared_norm: ‖g‖², inflated by sampling noise.
        unbiased_squared_norm: Unbiased for ‖G‖², the squared norm of all rows' gradient; ≤ 0 where noise drowns it.
        noise: S² (q − Q): the part of ‖g‖² that is sampling noise. NaN with a single example of a larger dataset.
        reliability: Expected cosine of g with the gradient of another such sample of endless data (Spearman–Brown of the two
            halves). NaN with a single example.
        expected_cosine: Expected cosine of g with G; 1 where the sample is the whole dataset.
    """

    squared_norm: np.ndarray
    unbiased_squared_norm: np.ndarray
    noise: np.ndarray
    reliability: np.ndarray
    expected_cosine: np.ndarray


def reliability(halves: HalfSamples) -> Reliability:
    """Noise and reliability of every dataset's gradient, from its own two halves."""
    ee, oo, eo = (m if m.ndim == 1 else np.diag(m) for m in (halves.even_even, halves.odd_odd, halves.even_odd))
    a, b = halves.share_even, 1.0 - halves.share_even
    squared = ee + oo + 2 * eo
    paired = (a > 0) & (b > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = ee / a**2 + oo / b**2 - 2 * eo / (a * b)
        variance = np.where(paired, distance / (halves.q_even + halves.q_odd), np.nan)
    left = np.maximum(halves.q - halves.q_all, 0.0)
    whole = left <= 1e-12 * halves.q
    noise = np.where(whole, 0.0, variance * left)
    unbiased = squared - noise
    return Reliability(
        squared_norm=squared,
        unbiased_squared_norm=unbiased,
        noise=noise,
        reliability=np.clip(1.0 - variance * halves.q / squared, -1.0, 1.0),
        expected_cosine=np.where(whole, 1.0, np.sqrt(np.clip(unbiased / squared, 0.0, 1.0))),
    )


def noise_corrected_cosine(gram: np.ndarray, found: Reliability) -> np.ndarray:
    """Cosines between whole-data gradients, as far as samples can tell: G_ij / √(u_i u_j), u the unbiased squared norms.

    Sampling noise of different datasets is independent, so it leaves ⟨g_i, g_j⟩ unbiased and only inflates the norms: plain
    cosines are too small in magnitude. The estimate can leave [−1, 1] by its own noise and is not clipped.

    Returns:
        (T, T) float64 with unit diagonal; rows and columns of datasets with u ≤ 0 (or unknown) are NaN, diagonal too.
    """
    u = np.where(found.unbiased_squared_norm > 0, found.unbiased_squared_norm, np.nan)
    corrected: np.ndarray = gram / np.sqrt(np.outer(u, u))
    np.fill_diagonal(corrected, np.where(np.isnan(u), np.nan, 1.0))
    return corrected


def cross_half_cosine(halves: HalfSamples) -> np.ndarray | None:
    """Products of even-half with odd-half gradients over the plain norms: cosines free of shared noise, the diagonal too.

    Returns:
        (T, T), symmetric, for :func:`merit.conflict.geometry.spectral_concentration`; None where some half is empty.
    """
    a, b = halves.share_even, 1.0 - halves.share_even
    if np.any(a <= 0) or np.any(b <= 0):
        return None
    norms = np.sqrt(np.diag(halves.gram()))
    product: np.ndarray = halves.even_odd / np.outer(a, b) / np.outer(norms, norms)
    return np.asarray((product + product.T) / 2)


def calibration_steps(rows: int, limit: int, first: int = 48) -> list[int]:
    """Sample sizes at which an automatic draw stops to look: 48, 68, 96, 136, 192 ... (×√2, even), up to what there is.

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
        size = 2 * round(first * 2 ** (k / 2) / 2)
    return [*steps, last]
