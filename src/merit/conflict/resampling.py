"""Geometries as other calibration samples would have given them. Pure NumPy on half-sample inner products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from merit.conflict.reliability import HalfSamples
from merit.errors import ConflictError


def resampled_grams(halves: HalfSamples, names: Sequence[str], replicates: int, seed: int) -> Iterator[np.ndarray]:
    """Gram matrices (T, T) as other calibration samples of the same sizes would have given.

    Replicate gradients are g* = g + ε c (S_e/a − S_o/b), one ε = ±1 per dataset, with c² = (q − Q) / (q_e + q_o): then
    g* varies about g as g does about the gradient of all rows (half-sample replication). A sample of all rows does not
    vary. g already holds one such error, so replicates are noisier than the truth by one share, and probabilities from
    them err low.

    Args:
        halves: Inner products of the half-samples.
        names: Dataset names (T,), for the message.
        replicates: Number of matrices.
        seed: Of the ε.

    Raises:
        ConflictError: A dataset has one calibration example out of more rows: nothing tells its noise.

    Source: McCarthy 1969 (balanced half-samples); Wolter, Introduction to Variance Estimation, 2007, ch. 3.
    """
    a = halves.share_even
    b = 1.0 - a
    left = np.maximum(halves.q - halves.q_all, 0.0)
    left = np.where(left <= 1e-12 * halves.q, 0.0, left)
    lone = (left > 0) & ((a <= 0) | (b <= 0))
    if lone.any():
        raise ConflictError(
            f"conflict: {names[int(lone.argmax())]} has a single calibration example, so its sampling noise is unknown.",
            "Set conflict.examples to 2 or more.",
        )
    spread = np.sqrt(np.where(left > 0, left / (halves.q_even + halves.q_odd), 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        to_even, to_odd = np.where(spread > 0, spread / a, 0.0), np.where(spread > 0, spread / b, 0.0)
    generator = np.random.Generator(np.random.PCG64(seed))
    for _ in range(replicates):
        sign = generator.choice([-1.0, 1.0], len(names))
        even, odd = 1.0 + sign * to_even, 1.0 - sign * to_odd
        cross = halves.even_odd * np.outer(even, odd)
        yield halves.even_even * np.outer(even, even) + halves.odd_odd * np.outer(odd, odd) + cross + cross.T
