"""Products of sums of quarter-samples, and mixtures without any conflict made from the measured noise. Pure NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from merit.conflict.reliability import PARTS

_HADAMARD = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
_ONE = np.eye(PARTS)
_BLOCKS = tuple((k, m) for k in range(PARTS) for m in range(k, PARTS))


@dataclass(frozen=True)
class Quarters:
    """Inner products of the quarter means of T datasets, by those of four vectors v_k per dataset that they are made of.

    Quarter p of dataset i is ``common`` + Σ_k basis[k, p] v_k(i); only sums of quarters are ever formed, as (T, T).

    Attributes:
        blocks: (10, T, T): at k ≤ l ⟨v_k of i, v_l of j⟩, plus the same with i and j exchanged where k < l.
        basis: (4, 4).
        common: Squared length of a vector that all quarters of all datasets share.
        drift: Its products (4, T) with the rest of every quarter.
    """

    blocks: np.ndarray
    basis: np.ndarray
    common: float
    drift: np.ndarray

    @classmethod
    def of(
        cls, products: np.ndarray, basis: np.ndarray = _ONE, common: float = 0.0, drift: np.ndarray | None = None
    ) -> Quarters:
        """From ⟨v_k of i, v_l of j⟩, (4, 4, T, T); by default v_k is quarter k itself."""
        count = products.shape[2]
        blocks = np.empty((len(_BLOCKS), count, count), dtype=products.dtype)
        for block, (k, m) in zip(blocks, _BLOCKS, strict=True):
            block[:] = products[k, m]
            if k < m:
                block += products[k, m].T
        return cls(blocks, basis, common, np.zeros((PARTS, count)) if drift is None else drift)

    def squares(self, u: np.ndarray) -> np.ndarray:
        """Products (n, T, T) of Σ_p u_p · quarter p, for n combinations ``u`` (n, 4)."""
        dtype, count = self.blocks.dtype, self.blocks.shape[1]
        found: np.ndarray = (self._weights(u).astype(dtype) @ self.blocks.reshape(len(_BLOCKS), -1)).reshape(
            len(u), count, count
        )
        total, along = u.sum(axis=1), u @ self.drift
        for one, t, drift in zip(found, total, along, strict=True):
            if t and self.common:
                one += (t * t * self.common + t * drift).astype(dtype)[:, None]
                one += (t * drift).astype(dtype)[None, :]
        return found

    def _weights(self, u: np.ndarray) -> np.ndarray:
        """Factors (n, 10) of the blocks."""
        weights = u @ self.basis.T
        return np.stack([weights[:, k] * weights[:, m] for k, m in _BLOCKS], axis=1)

    def norms(self) -> np.ndarray:
        """‖G_i‖ (T,), from products of different quarters; not below a quarter of the plain norm."""
        u = np.vstack([_ONE, np.ones(PARTS)])
        own = self._weights(u) @ np.einsum("bii->bi", self.blocks).astype(np.float64)
        total = u.sum(axis=1)[:, None]
        squared = own + total**2 * self.common + 2 * total * (u @ self.drift)
        trace, whole = squared[:PARTS].sum(axis=0), squared[PARTS]
        lengths: np.ndarray = np.sqrt(np.maximum((whole - trace) / (PARTS * (PARTS - 1)), whole / PARTS**2 / 16))
        return lengths


def null_mixtures(
    means: np.ndarray, norms: np.ndarray, draws: int, generator: np.random.Generator
) -> Iterator[Quarters]:
    """Mixtures whose datasets all have one gradient, with their measured noise.

    In units of its own norm, a dataset's quarters span the grand mean and three contrasts, which are pure noise. A null
    mixture has quarters m + Σ_k H_kp c_k for every dataset: m the mixture's mean direction with unit length, H the
    Hadamard signs over two, c_1..c_3 the dataset's own contrasts in random order with random signs, and c_0, the noise of
    its mean, a contrast of another dataset scaled to its noise. So the noise keeps its size in every dataset and its real,
    low-ranked shape; norms, axes, cuts and figures are then computed again. Draws act on inner products, never on vectors.

    Args:
        means: ⟨S_p/a_p of i, S_r/a_r of j⟩, (4, 4, T, T).
        norms: (T,): what they are divided by to be gradients in units of their norms.
        draws: Number of null mixtures.
        generator: Of the draws.
    """
    count, dtype = means.shape[2], means.dtype
    inverse = (1.0 / norms).astype(dtype)
    both = np.kron(_HADAMARD, _HADAMARD).astype(dtype)
    products = (both @ means.reshape(PARTS**2, -1)).reshape(means.shape) * inverse[:, None] * inverse[None, :]
    noise = np.ascontiguousarray(products[1:, 1:].transpose(0, 2, 1, 3)).reshape(3 * count, 3 * count)
    length = max(float(products[0, 0].mean()) / PARTS, 1e-12)  # squared, of the mean over all quarters
    along = products[1:, 0].mean(axis=2).reshape(3 * count).astype(np.float64) / 2 / np.sqrt(length)
    size = np.sqrt(np.diag(noise).reshape(3, count).mean(axis=0))
    size = np.where(size > 0, size, 1e-300)
    del products
    for _ in range(draws):
        other = generator.permutation(count)
        order = generator.permuted(np.tile(np.arange(3), (count, 1)), axis=1).T  # (3, T)
        places = np.vstack([generator.integers(0, 3, count) * count + other, order * count + np.arange(count)])
        factors = generator.choice([-1.0, 1.0], (PARTS, count))
        factors[0] *= size / size[other]
        flat, signs = places.ravel(), factors.ravel().astype(dtype)
        drawn = noise[flat].take(flat, axis=1)
        drawn *= signs[:, None]
        drawn *= signs[None, :]
        drawn = drawn.reshape(PARTS, count, PARTS, count).transpose(0, 2, 1, 3)
        yield Quarters.of(drawn, _HADAMARD, 1.0, _HADAMARD.T @ (along[places] * factors))
