"""Are estimated reliabilities true, and what does ``auto`` save? Against really computed gradients of all rows.

Draws are unions of random blocks of 25 examples, so that many samples of every size cost no further gradients. "All rows"
means the at most 1,000 rows that were measured. The half-samples are the even and odd rows of the blocks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.conflict.blocks import BLOCK

from merit.conflict.compare import compress
from merit.conflict.geometry import gram_matrix
from merit.conflict.reliability import HalfSamples, reliability
from merit.split.components import cosine_matrix
from merit.split.stability import split_stability
from merit.split.stage import split_mixture

SIZES = [25, 50, 100, 200, 300, 500, 700, 1000]
TARGETS = [0.85, 0.9, 0.95, 0.98]
AUTO_STEPS = [50, 75, 100, 150, 200, 275, 375, 525, 750, 1000]
DRAWS = 20


def halves_from(products: np.ndarray, counts: np.ndarray, population: int) -> HalfSamples:
    """From 2×2 inner products of the half *sums* (…, 2, 2), and how many examples each half has (…, 2)."""
    total = counts.sum(axis=-1)
    scaled = products / total[..., None, None] ** 2
    return HalfSamples(
        even_even=scaled[..., 0, 0],
        odd_odd=scaled[..., 1, 1],
        even_odd=scaled[..., 0, 1],
        share_even=counts[..., 0] / total,
        q_even=1.0 / counts[..., 0],
        q_odd=1.0 / counts[..., 1],
        q=1.0 / total,
        q_all=np.full(total.shape, 1.0 / population),
    )


def block_gram(file: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Inner products of a dataset's block halves (blocks, 2, blocks, 2), examples (blocks, 2), rows."""
    facts = json.loads(file.read_text())
    blocks = np.load(file.with_suffix(".npy"), mmap_mode="r")
    flat = blocks.reshape(-1, blocks.shape[-1])
    gram = gram_matrix(list(flat)).reshape(len(blocks), 2, len(blocks), 2)
    return gram, np.array(facts["examples"]), int(facts["rows"])


def sensitivity(work: Path) -> list[dict[str, Any]]:
    """Per dataset and sample size: real cosine to the gradient of all rows, and what the halves say it is."""
    found = []
    for file in sorted((work / "blocks").glob("*.json")):
        gram, counts, rows = block_gram(file)
        whole_blocks = np.flatnonzero(counts.sum(axis=1) == BLOCK)
        everything = gram.sum(axis=(1, 3))
        whole_norm = np.sqrt(everything.sum())
        generator = np.random.Generator(np.random.PCG64(0))
        for size in SIZES:
            if size > rows or size // BLOCK > len(whole_blocks):
                continue
            real, said = [], []
            for _ in range(DRAWS):
                pick = generator.permutation(whole_blocks)[: size // BLOCK]
                products = gram[np.ix_(pick, [0, 1], pick, [0, 1])].sum(axis=(0, 2))
                real.append(everything[pick].sum() / np.sqrt(products.sum()) / whole_norm)
                halves = halves_from(products[None], counts[pick].sum(axis=0)[None].astype(float), rows)
                said.append(float(reliability(halves).expected_cosine[0]))
            found.append(
                {
                    "dataset": file.stem,
                    "rows": rows,
                    "examples": size,
                    "real": float(np.mean(real)),
                    "estimated": float(np.mean(said)),
                    "rms_error_of_one": float(np.sqrt(np.mean((np.array(said) - np.mean(real)) ** 2))),
                }
            )
    return found


def draws_and_splits(work: Path, layout: dict[str, int], draws: int = 8) -> list[dict[str, Any]]:
    """Per scheme (fixed n, or auto to a target): examples used, and how far splits agree with the split from all rows.

    Agreement is the share of datasets in the same group after matching groups, mean over draws; ``predicted`` is the mean
    probability of :func:`split_stability` on the drawn samples alone.
    """
    files = sorted((work / "blocks").glob("*.json"))
    sketches, counts, populations = [], [], []
    for file in files:
        facts = json.loads(file.read_text())
        blocks = np.load(file.with_suffix(".npy"), mmap_mode="r")
        flat = blocks.reshape(-1, blocks.shape[-1])
        rows = np.array([compress(vector, layout, "sketch", 2**16, 0) for vector in flat])
        sketches.append(rows.reshape(len(blocks), 2, -1))
        counts.append(np.array(facts["examples"]))
        populations.append(int(facts["rows"]))
    names = [file.stem for file in files]
    weights = np.array(populations, dtype=np.float64)
    full = np.array([s.sum(axis=(0, 1), dtype=np.float64) / n for s, n in zip(sketches, populations, strict=True)])

    def groups(cosine: np.ndarray, gram: np.ndarray, axes: int) -> list[list[str]]:
        return split_mixture("pca", axes, names=names, weights=weights, cosine=cosine, gram=gram).groups

    full_gram = full @ full.T
    truth = {axes: groups(cosine_matrix(full_gram), full_gram, axes) for axes in (1, 2, 3)}
    found = []
    schemes: list[tuple[str, float]] = [("fixed", n) for n in SIZES[:6]] + [("auto", t) for t in TARGETS]
    for kind, setting in schemes:
        agreed: dict[int, list[float]] = {axes: [] for axes in truth}
        predicted: dict[int, list[float]] = {axes: [] for axes in truth}
        used = []
        for draw in range(draws):
            generator = np.random.Generator(np.random.PCG64(draw))
            arrays = _draw(kind, setting, sketches, counts, populations, generator)
            used.append(arrays["examples"].mean())
            arrays["names"] = np.array(names)
            for axes, true in truth.items():
                agreed[axes].append(matched(groups(arrays["cosine"], arrays["gram"], axes), true))
                if draw < 3:
                    stability = split_stability(arrays, lambda c, g, a=axes: groups(c, g, a), replicates=40)
                    predicted[axes].append(stability.mean)
        found.append(
            {
                "scheme": f"{kind} {setting}",
                "examples": float(np.mean(used)),
                **{f"agreement_{a}": float(np.mean(v)) for a, v in agreed.items()},
                **{f"predicted_{a}": float(np.mean(v)) for a, v in predicted.items()},
            }
        )
    return found


def _draw(kind, setting, sketches, counts, populations, generator) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    halves, sizes = [], []
    for sketch, count, population in zip(sketches, counts, populations, strict=True):
        order = generator.permutation(len(count))
        steps = [int(setting)] if kind == "fixed" else AUTO_STEPS
        for step in steps:
            pick = order[: max(1, -(-step // BLOCK))]
            sums, size = sketch[pick].sum(axis=0, dtype=np.float64), count[pick].sum(axis=0).astype(float)
            done = len(pick) == len(order) or step == steps[-1]
            if kind == "auto" and not done:
                products = (sums @ sums.T)[None]
                done = reliability(halves_from(products, size[None], population)).expected_cosine[0] >= setting
            if done:
                break
        halves.append(sums / size.sum())
        sizes.append(size)
    rows, size = np.array(halves), np.array(sizes)
    stacked = np.concatenate([rows[:, 0], rows[:, 1]])
    half_gram, total = stacked @ stacked.T, size.sum(axis=1)
    gradients = rows.sum(axis=1)
    gram = gradients @ gradients.T
    return {
        "half_gram": half_gram,
        "gram": gram,
        "cosine": cosine_matrix(gram),
        "share_even": size[:, 0] / total,
        "q_even": 1 / size[:, 0],
        "q_odd": 1 / size[:, 1],
        "q": 1 / total,
        "q_all": 1 / np.array(populations, dtype=float),
        "examples": total,
    }


def matched(found: list[list[str]], true: list[list[str]]) -> float:
    """Share of datasets in the same group, groups matched by the best assignment."""
    from scipy.optimize import linear_sum_assignment

    overlap = np.array([[len(set(a) & set(b)) for b in true] for a in found])
    rows, columns = linear_sum_assignment(-overlap)
    return float(overlap[rows, columns].sum() / sum(map(len, true)))
