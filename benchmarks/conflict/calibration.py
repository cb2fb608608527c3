"""Are estimated reliabilities true, and what does ``auto`` save? Against really computed gradients of all rows.

Draws are unions of random blocks of 25 examples, so that many samples of every size cost no further gradients. "All rows"
means the at most 1,000 rows that were measured. A draw's quarter-samples are the quarters of its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.conflict.blocks import BLOCK, read_blocks

from merit.conflict.reliability import PARTS, SubSamples, reliability
from merit.conflict.resampling import resampled_grams
from merit.split import pca
from merit.split.components import cosine_matrix
from merit.split.stability import split_stability
from merit.split.view import Groups, MixtureView

SIZES = [25, 50, 100, 200, 300, 500, 700, 1000]
TARGETS = [0.85, 0.9, 0.95, 0.98]
AUTO_STEPS = [50, 75, 100, 150, 200, 275, 375, 525, 750, 1000]
DRAWS = 20


def sub_samples(products: np.ndarray, counts: np.ndarray, population: np.ndarray) -> SubSamples:
    """From inner products of the quarter *sums* (4T, 4T), examples per quarter (T, 4) and rows (T,)."""
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum(axis=1)
    per_example = np.tile(1.0 / total, PARTS)
    with np.errstate(divide="ignore"):
        return SubSamples(
            gram=products * np.outer(per_example, per_example),
            shares=counts / total[:, None],
            q_parts=1.0 / counts,
            q=1.0 / total,
            q_all=1.0 / population,
        )


def sensitivity(work: Path) -> list[dict[str, Any]]:
    """Per dataset and sample size: real cosine to the gradient of all rows, and what the quarters say it is."""
    found = []
    for blocks in read_blocks(work):
        gram, counts, rows = blocks.gram, blocks.examples, int(blocks.rows)
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
                products = gram[pick][:, :, pick].sum(axis=(0, 2))
                real.append(everything[pick].sum() / np.sqrt(products.sum()) / whole_norm)
                parts = sub_samples(products, counts[pick].sum(axis=0)[None], np.array([float(rows)]))
                said.append(float(reliability(parts).expected_cosine[0]))
            found.append(
                {
                    "dataset": blocks.name,
                    "rows": rows,
                    "examples": size,
                    "real": float(np.mean(real)),
                    "estimated": float(np.mean(said)),
                    "rms_error_of_one": float(np.sqrt(np.mean((np.array(said) - np.mean(real)) ** 2))),
                }
            )
    return found


@dataclass(frozen=True)
class Draw:
    """A geometry made of drawn blocks: what a split's stability reads of one."""

    parts: SubSamples
    names: list[str]
    duplicates: Sequence[Sequence[str]] = ()
    unknown: Sequence[str] = ()

    @property
    def gram(self) -> np.ndarray:
        return np.asarray(self.parts.products().sum(axis=(0, 1)))

    @property
    def cosine(self) -> np.ndarray:
        return cosine_matrix(self.gram)

    @property
    def inflation(self) -> np.ndarray:
        return np.ones(len(self.names))

    def resampled(self, replicates: int, seed: int) -> Iterator[np.ndarray]:
        return resampled_grams(self.parts, replicates, seed)


def draws_and_splits(work: Path, draws: int = 8) -> list[dict[str, Any]]:
    """Per scheme (fixed n, or auto to a target): examples used, and how far splits agree with the split from all rows.

    Agreement is the share of datasets in the same group after matching groups, mean over draws; ``predicted`` is the mean
    probability of :func:`split_stability` on the drawn samples alone.
    """
    names: list[str] = []
    sketches, counts, populations = [], [], []
    for blocks in read_blocks(work):
        names.append(blocks.name)
        sketches.append(blocks.sketches)
        counts.append(blocks.examples)
        populations.append(int(blocks.rows))
    weights = np.array(populations, dtype=np.float64)
    full = np.array([s.sum(axis=(0, 1), dtype=np.float64) / n for s, n in zip(sketches, populations, strict=True)])

    def groups(cosine: np.ndarray, gram: np.ndarray, axes: int) -> Groups:
        return pca.split(MixtureView(tuple(names), weights, cosine, gram), axes, 0)

    full_gram = full @ full.T
    possible = [axes for axes in (1, 2, 3) if 2**axes <= len(names)]
    truth = {axes: groups(cosine_matrix(full_gram), full_gram, axes) for axes in possible}
    found = []
    schemes: list[tuple[str, float]] = [("fixed", n) for n in SIZES[:6]] + [("auto", t) for t in TARGETS]
    for kind, setting in schemes:
        agreed: dict[int, list[float]] = {axes: [] for axes in truth}
        predicted: dict[int, list[float]] = {axes: [] for axes in truth}
        used = []
        for draw in range(draws):
            generator = np.random.Generator(np.random.PCG64(draw))
            parts = _draw(kind, setting, sketches, counts, populations, generator)
            used.append((1.0 / parts.q).mean())
            drawn = Draw(parts, names)
            for axes, true in truth.items():
                agreed[axes].append(matched(groups(drawn.cosine, drawn.gram, axes), true))
                if draw < 3:
                    stability = split_stability(drawn, lambda c, g, a=axes: groups(c, g, a), replicates=40)
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


def _draw(kind, setting, sketches, counts, populations, generator) -> SubSamples:  # type: ignore[no-untyped-def]
    quarters, sizes = [], []
    for sketch, count, population in zip(sketches, counts, populations, strict=True):
        order = generator.permutation(len(count))
        steps = [int(setting)] if kind == "fixed" else AUTO_STEPS
        for step in steps:
            pick = order[: max(1, -(-step // BLOCK))]
            sums, size = sketch[pick].sum(axis=0, dtype=np.float64), count[pick].sum(axis=0)
            done = len(pick) == len(order) or step == steps[-1]
            if kind == "auto" and not done:
                parts = sub_samples(sums @ sums.T, size[None], np.array([float(population)]))
                done = reliability(parts).expected_cosine[0] >= setting
            if done:
                break
        quarters.append(sums)
        sizes.append(size)
    flat = np.concatenate([np.array([sums[p] for sums in quarters]) for p in range(PARTS)])
    return sub_samples(flat @ flat.T, np.array(sizes), np.array(populations, dtype=np.float64))


def matched(found: Groups, true: Groups) -> float:
    """Share of datasets in the same group, groups matched by the best assignment."""
    from scipy.optimize import linear_sum_assignment

    overlap = np.array([[len(set(a) & set(b)) for b in true] for a in found])
    rows, columns = linear_sum_assignment(-overlap)
    return float(overlap[rows, columns].sum() / sum(map(len, true)))
