"""The paper's linear-quadratic model as functions: what merging gains on a quadratic loss, and which splits gain most.

Pure NumPy in float64; every function names its equation. The loss of task t is ½(θ−θ_t)ᵀH(θ−θ_t) with one H for all tasks;
g_i is its gradient at θ0. Statements about splits need gradients that sum to zero, as they do where joint training has
converged; :func:`random_split_gain` also covers the others.

Source: Choi & Kim, arXiv 2606.01717, §3 and Appendix F; docs/theory.md explains each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

__all__ = [
    "conflict_matrix",
    "cosine_space_bound",
    "expected_random_gain",
    "four_tasks",
    "group_gain",
    "loss",
    "measured_gain",
    "nested_split_gain",
    "pairwise_gain",
    "pca_beats_random",
    "pca_gain_bound",
    "pca_signs",
    "predicted_gain",
    "random_split_gain",
    "rank_one_ratio",
    "space_sine",
    "spread_identity",
    "two_group_gain",
]


# ---- the merging gain ------------------------------------------------------------------------------------------------


def loss(theta: np.ndarray, optimum: np.ndarray, hessian: np.ndarray, floor: float = 0.0) -> float:
    """L(θ) = L* + ½(θ−θ*)ᵀH(θ−θ*). Source: §3, the quadratic model.

    Args:
        theta: (d,).
        optimum: θ* (d,).
        hessian: H (d, d), symmetric, positive semi-definite.
        floor: L*.
    """
    away = theta - optimum
    return float(floor + 0.5 * away @ hessian @ away)


def measured_gain(branches: Sequence[float], merged: float, weights: Sequence[float]) -> float:
    """Σ w_k L(θ_k) − L(θ̄): the left side of the merging gain. Source: Theorem 3.1 (F.1).

    Args:
        branches: L(θ_k), (K,).
        merged: L(θ̄).
        weights: w_k ≥ 0, any scale.
    """
    return float(np.average(branches, weights=weights) - merged)


def predicted_gain(displacements: np.ndarray, hessian: np.ndarray, weights: Sequence[float]) -> float:
    """½ Σ_l λ_l Var_w(u_lᵀδ_k) ≥ 0: the right side. Source: Theorem 3.1 (F.1).

    Args:
        displacements: δ_k = θ_k − θ0 (K, d).
        hessian: H (d, d).
        weights: w_k ≥ 0, any scale.
    """
    values, vectors = np.linalg.eigh(hessian)
    along = displacements @ vectors
    mean = np.average(along, axis=0, weights=weights)
    variance = np.average((along - mean) ** 2, axis=0, weights=weights)
    return float(0.5 * values @ variance)


def pairwise_gain(displacements: np.ndarray, hessian: np.ndarray) -> float:
    """1/(4K²) Σ_ij (δ_i−δ_j)ᵀH(δ_i−δ_j): the gain at uniform weights. Source: Theorem 3.1 (F.1), uniform case.

    Args:
        displacements: (K, d).
        hessian: (d, d).
    """
    count = len(displacements)
    pairs = (displacements[i] - displacements[j] for i, j in combinations(range(count), 2))
    return sum(2 * float(pair @ hessian @ pair) for pair in pairs) / (4 * count**2)


def spread_identity(displacements: np.ndarray, weights: Sequence[float]) -> tuple[float, float, float]:
    """Σ w_k‖δ_k‖² = ‖δ̄‖² + Σ w_k‖δ_k − δ̄‖²: its three terms, in this order. Source: Appendix B.

    Args:
        displacements: (K, d).
        weights: w_k ≥ 0, any scale.
    """
    mean = np.average(displacements, axis=0, weights=weights)
    total = np.average((displacements**2).sum(axis=1), weights=weights)
    spread = np.average(((displacements - mean) ** 2).sum(axis=1), weights=weights)
    return float(total), float(mean @ mean), float(spread)


# ---- one step, two groups --------------------------------------------------------------------------------------------


def conflict_matrix(gradients: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """M_ij = g_iᵀHg_j (T, T). Source: Appendix F.2.

    Args:
        gradients: (T, d).
        hessian: (d, d).
    """
    matrix: np.ndarray = gradients @ hessian @ gradients.T
    symmetric: np.ndarray = (matrix + matrix.T) / 2
    return symmetric


def two_group_gain(signs: Sequence[int] | np.ndarray, matrix: np.ndarray, rate: float) -> float:
    """G = (η²/8)(ḡ1−ḡ2)ᵀH(ḡ1−ḡ2) = (η²/2T²) sᵀMs: one step of SGD from θ0 in each of two equal groups. Source: F.2.

    Args:
        signs: (T,) of +1 (group 1) and −1 (group 2), as many of each.
        matrix: M (T, T).
        rate: η.

    Raises:
        ValueError: The groups are not equal in size.
    """
    s = _balanced(signs, len(matrix))
    return float(rate**2 / (2 * len(matrix) ** 2) * s @ matrix @ s)


def nested_split_gain(axes: Sequence[Sequence[int]], matrix: np.ndarray, rate: float) -> float:
    """The gain of the 2^r equal groups that r cuts make: Σ over non-empty sets of cuts of (η²/2T²) sᵀMs, s their product.

    A second cut adds its own term, and one for the product of the two; all terms are ≥ 0. Source: Remark F.13, written out.

    Args:
        axes: r sign vectors (T,); every combination of signs occurs equally often.
        matrix: M (T, T).
        rate: η.

    Raises:
        ValueError: The groups are not equal in size.
    """
    cuts = [np.asarray(axis, dtype=np.float64) for axis in axes]
    chosen = (subset for size in range(1, len(cuts) + 1) for subset in combinations(cuts, size))
    return sum(two_group_gain(np.prod(np.stack(subset), axis=0), matrix, rate) for subset in chosen)


def group_gain(
    groups: Sequence[Sequence[int]],
    sizes: np.ndarray,
    matrix: np.ndarray,
    rate: float,
    merge: np.ndarray | None = None,
) -> float:
    """One step of SGD in groups of any size, then the average: ½ Σ w_k (δ_k−δ̄)ᵀH(δ_k−δ̄) by M alone.

    δ_k = −η Σ_{i∈G_k} s_i g_i / S_k with S_k = Σ_{i∈G_k} s_i, and w_k = M_k / Σ_j M_j with M_k = Σ_{i∈G_k} m_i.
    For equal groups of equal datasets it is :func:`nested_split_gain`. Source: Theorem 3.1 with the displacements of F.2.

    Args:
        groups: Indices of each group's datasets.
        sizes: s_i (T,): how much a dataset weighs in its group.
        matrix: M (T, T).
        rate: η.
        merge: m_i (T,): what a dataset adds to its group's weight in the merge; s_i by default.
    """
    shares = np.zeros((len(groups), len(matrix)))
    for k, group in enumerate(groups):
        shares[k, list(group)] = sizes[list(group)] / sizes[list(group)].sum()
    weights = np.array([(sizes if merge is None else merge)[list(group)].sum() for group in groups])
    weights = weights / weights.sum()
    away = shares - weights @ shares
    return float(0.5 * rate**2 * weights @ np.einsum("ki,ij,kj->k", away, matrix, away))


def random_split_gain(matrix: np.ndarray, rate: float) -> float:
    """E[G] over balanced splits drawn uniformly: (η²/2T²) · (T tr(M) − 1ᵀM1) / (T−1), for any M.

    Where gradients sum to zero, 1ᵀM1 = 0 and this is :func:`expected_random_gain`. Source: Proposition F.10, without its
    assumption.

    Args:
        matrix: M (T, T), T even.
        rate: η.
    """
    count = len(matrix)
    return float(rate**2 / (2 * count**2) * (count * np.trace(matrix) - matrix.sum()) / (count - 1))


def expected_random_gain(matrix: np.ndarray, rate: float) -> float:
    """E[G] = η²/(2T(T−1)) tr(M) over balanced random splits, for gradients that sum to zero. Source: Proposition F.10.

    Args:
        matrix: M (T, T).
        rate: η.
    """
    count = len(matrix)
    return float(rate**2 / (2 * count * (count - 1)) * np.trace(matrix))


def pca_signs(matrix: np.ndarray) -> np.ndarray:
    """The PCA split s = sign(v1) of M's leading eigenvector (T,), ±1; zero entries count as +1. Source: Proposition F.11."""
    vector = np.linalg.eigh(matrix)[1][:, -1]
    return np.where(vector >= 0, 1.0, -1.0)


def pca_gain_bound(matrix: np.ndarray, rate: float) -> float:
    """(η²/2T²) μ1‖v1‖₁², which the split s = sign(v1) reaches at least. Source: Proposition F.11.

    Args:
        matrix: M (T, T), positive semi-definite.
        rate: η.
    """
    values, vectors = np.linalg.eigh(matrix)
    return float(rate**2 / (2 * len(matrix) ** 2) * values[-1] * np.abs(vectors[:, -1]).sum() ** 2)


def pca_beats_random(matrix: np.ndarray) -> bool:
    """Whether μ1‖v1‖₁² > T/(T−1) tr(M): then the PCA split gains more than a random one does on average. Source: F.11."""
    return pca_gain_bound(matrix, 1.0) > expected_random_gain(matrix, 1.0)


def rank_one_ratio(vector: np.ndarray) -> float:
    """(T−1)‖v‖₁²/(T‖v‖₂²): gain of the PCA split over that of a random one where M = μvvᵀ. Source: Corollary F.12.

    It is T − 1 where all |v_i| are equal, and less otherwise: ‖v‖₁² ≤ T‖v‖₂². Where the v_i sum to zero it is at least
    2(T−1)/T, which is above 1.

    Args:
        vector: v (T,).
    """
    count = len(vector)
    return float((count - 1) * np.abs(vector).sum() ** 2 / (count * (vector @ vector)))


def four_tasks(
    curvatures: tuple[float, float], offsets: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Four tasks in the plane: H = diag(λ1, λ2), optima (±α, ±β), θ0 = 0. Source: the example of F.4.

    The splits ``first``, ``second`` and ``crossed`` gain (η²/2)λ1³α², (η²/2)λ2³β² and 0: cubic in the curvature. PCA of the
    gradients picks the first where λ1²α² > λ2²β² (Proposition F.6).

    Args:
        curvatures: (λ1, λ2).
        offsets: (α, β).

    Returns:
        Gradients at θ0 (4, 2), H (2, 2), and the three balanced splits as sign vectors (4,).
    """
    hessian = np.diag(curvatures).astype(np.float64)
    corners = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)], dtype=np.float64)
    gradients = -(corners * offsets) @ hessian
    splits = {"first": corners[:, 0], "second": corners[:, 1], "crossed": corners[:, 0] * corners[:, 1]}
    return gradients, hessian, splits


# ---- cosines instead of gradients -----------------------------------------------------------------------------------


def space_sine(first: np.ndarray, second: np.ndarray, size: int) -> float:
    """sin of the largest angle between the leading ``size``-dimensional eigenspaces of two symmetric matrices (T, T)."""
    one, two = (np.linalg.eigh(matrix)[1][:, -size:] for matrix in (first, second))
    cosines = np.linalg.svd(one.T @ two, compute_uv=False)
    return float(np.sqrt(max(0.0, 1.0 - min(1.0, float(cosines.min())) ** 2)))


def cosine_space_bound(gradients: np.ndarray, size: int) -> float:
    """Bound on :func:`space_sine` between Gram matrices of unit and of raw gradients: 2(2ε+ε²)‖C‖/gap.

    ε = max_i |‖g_i‖/ρ − 1| for the mean norm ρ, and gap = c_size − c_{size+1} of C's eigenvalues: the closer the norms, the
    nearer cosine PCA is to raw-gradient PCA. Source: Theorem F.4, with the constant of Yu, Wang & Samworth (2015).

    Args:
        gradients: (T, d), none zero.
        size: Dimensions of the leading space, below T.
    """
    norms = np.linalg.norm(gradients, axis=1)
    unit = gradients / norms[:, None]
    values = np.linalg.eigvalsh(unit @ unit.T)
    epsilon = float(np.abs(norms / norms.mean() - 1).max())
    gap = float(values[-size] - values[-size - 1])
    return float("inf") if gap <= 0 else 2 * (2 * epsilon + epsilon**2) * float(values[-1]) / gap


def _balanced(signs: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    s = np.asarray(signs, dtype=np.float64)
    if s.shape != (count,) or not (np.abs(s) == 1).all() or s.sum() != 0:
        raise ValueError(f"signs must be {count} of +1 and -1, as many of each; found {s.tolist()}")
    return s
