"""Geometries as other calibration samples and other sketches would have given them. Pure NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from merit.conflict.reliability import PARTS, SubSamples


def resampled_grams(parts: SubSamples, replicates: int, seed: int, sketch_size: int = 0) -> Iterator[np.ndarray]:
    """Gram matrices (T, T) as other calibration samples of the same sizes, and another sketch, would have given.

    *Samples.* Replicate gradients are g* = g + c Σ_p z_p a_p (S_p/a_p − g), z standard normal: every dataset moves in the
    three directions in which its quarters differ. With c² = (q − Q) / (q − q Σ_p a_p²), g* varies about g as g does about
    the gradient of all rows. A sample of all rows does not vary, nor one of a single example, whose noise nothing tells. g
    already holds one such error, so replicates are noisier than the truth by one share, and probabilities from them err low.

    *Sketch.* G becomes √G (I + W) √G with W symmetric, normal, of variance 1/m (2/m on its diagonal), as another sketch
    would have it: ⟨g_i, g_j⟩ then has the count sketch's variance, (‖g_i‖²‖g_j‖² + ⟨g_i, g_j⟩²) / m, and parallel gradients
    stay parallel.

    Args:
        parts: Inner products of the quarters.
        replicates: Number of matrices.
        seed: Of the draws.
        sketch_size: m; 0 where gradients were kept whole.

    Source: Wolter, Introduction to Variance Estimation, 2007, ch. 3 (random groups).
    """
    count = len(parts.q)
    products = parts.products()
    spare = parts.q * (1.0 - (parts.shares**2).sum(axis=1))
    scale = np.sqrt(np.divide(parts.excess(), spare, out=np.zeros(count), where=spare > 0))
    generator = np.random.Generator(np.random.PCG64(seed))
    root = _root(products.sum(axis=(0, 1), dtype=np.float64)) if sketch_size else None
    for _ in range(replicates):
        z = generator.standard_normal((PARTS, count))
        weights = 1.0 + scale * (z - (parts.shares.T * z).sum(axis=0))
        gram: np.ndarray = np.einsum("pi,rj,prij->ij", weights, weights, products, optimize=True)
        if root is not None:
            error = generator.standard_normal((count, count))
            gram = gram + root @ (error + error.T) @ root / np.sqrt(2 * sketch_size)
        yield gram


def _root(gram: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    root: np.ndarray = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root
