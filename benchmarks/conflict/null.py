"""How often is a split recommended where there is nothing to split? And what is recommended for real mixtures?

    python -m benchmarks.conflict.null --work SCRATCH [--draws 50] [--real BASE MIXTURE]
    python -m benchmarks.conflict.null --many 40

Gradients of single rows are measured once (``SCRATCH`` keeps their inner products). From them, "datasets" are cut at random
out of ONE pool of real rows, so that there is no conflict but all of a real gradient's noise: heavy tails, low rank. Every
draw is judged as the conflict stage judges a mixture. Then the same rows in their own datasets. It also says, on the same
rows, whether plain or corrected cosines give the more stable split. Results: ``benchmarks/results/conflict_null.md``.

Above 200 datasets the null is of 39 mixtures, in single precision. ``--many`` judges the first axis of 204 datasets with
*made-up* gradients: no pool is large enough. Results: ``benchmarks/results/conflict_null_many.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.conflict.blocks import make_recipe
from scipy.optimize import linear_sum_assignment
from tests.conflict import spectrum_cases

from merit.conflict.geometry import gram_matrix
from merit.conflict.gradients import GradientMeter
from merit.conflict.reliability import PARTS, SubSamples, reliability
from merit.conflict.resampling import resampled_grams
from merit.conflict.spectrum import PAPER_AXES, Concentration, spectral_concentration, suggest_axes
from merit.conflict.store import Sums
from merit.demo import write_demo
from merit.hf.base import open_base
from merit.hf.models import load_model
from merit.mixture.found import find_datasets
from merit.mixture.stage import encode_mixture
from merit.recipe.schema import ConflictSettings
from merit.split import pca
from merit.split.components import cosine_matrix
from merit.split.view import MixtureView

RESULTS = Path(__file__).parents[1] / "results"
SKETCH = 2**14
ROWS = 40
DATASETS = 40


@dataclass(frozen=True)
class Pool:
    """Rows of a mixture: inner products of their gradients (n, n) float64, and which dataset each is of."""

    gram: np.ndarray
    labels: np.ndarray

    @classmethod
    def open(cls, file: Path, base: str, mixture: str, rows: int = ROWS, only: int | None = None) -> Pool:
        """Measure ``rows`` rows of every dataset, or read what was measured."""
        if not file.exists():
            torch.set_num_threads(1)
            opened = open_base(base)
            with tempfile.TemporaryDirectory() as scratch:
                found = find_datasets(make_recipe(base, mixture, 512, ["*"]).mixture)
                encoded = encode_mixture(found, opened, Path(scratch), max_length=512).train
                cpu = torch.device("cpu")
                model = load_model(opened, cpu, trainable=True)
                meter = GradientMeter(
                    model, ConflictSettings(sketch_size=SKETCH), seed=0, batcher=opened.batcher, device=cpu
                )
                vectors, labels = [], []
                out = np.zeros((PARTS, SKETCH), np.float32)
                for label, (name, dataset) in enumerate(list(encoded.items())[:only]):
                    for i in np.random.default_rng(label).permutation(len(dataset))[:rows]:
                        meter.measure(name, [dataset[int(i)]], out, Sums())
                        vectors.append(out[0].copy())
                        labels.append(label)
            np.savez(file, gram=gram_matrix(vectors), labels=np.array(labels))
        with np.load(file) as stored:
            return cls(stored["gram"], stored["labels"])

    def mixture(self, members: list[np.ndarray]) -> SubSamples:
        """Quarter-samples of datasets made of the given rows."""
        count = len(members)
        weights = np.zeros((PARTS * count, len(self.gram)))
        sizes = np.zeros((count, PARTS))
        for t, rows in enumerate(members):
            for part in range(PARTS):
                weights[part * count + t, rows[part::PARTS]] = 1.0 / len(rows)
                sizes[t, part] = len(rows[part::PARTS])
        total = sizes.sum(axis=1)
        gram = weights @ self.gram @ weights.T
        with np.errstate(divide="ignore"):
            return SubSamples(gram, sizes / total[:, None], 1.0 / sizes, 1.0 / total, np.zeros(count))


def own_datasets(pool: Pool, generator: np.random.Generator, rows: int | None = None) -> list[np.ndarray]:
    """The pool's rows in their own datasets, in random order; at most ``rows`` of each."""
    return [
        generator.permutation(np.flatnonzero(pool.labels == label))[:rows]
        for label in range(int(pool.labels.max()) + 1)
    ]


def random_datasets(
    pool: Pool, generator: np.random.Generator, *, uneven: bool, count: int = DATASETS
) -> list[np.ndarray]:
    """The pool's rows dealt to datasets at random: of one size, or of 8 rows to six times as many."""
    rows = generator.permutation(len(pool.gram))
    if not uneven:
        return list(rows[: len(rows) // count * count].reshape(count, -1))
    share = generator.uniform(1, 6, count)
    ends = np.cumsum(8 + np.floor(share / share.sum() * (len(rows) - 8 * count))).astype(int)
    return np.split(rows, ends[:-1])


def judge(parts: SubSamples, weights: np.ndarray) -> tuple[int, str, list[Concentration]]:
    names = [f"d{i:03}" for i in range(len(weights))]
    found = spectral_concentration(parts, weights, names, PAPER_AXES)
    return *suggest_axes(found, len(names)), found


def draw_nulls(pool: Pool, draws: int, *, uneven: bool, count: int = DATASETS) -> dict[str, Any]:
    """Recommended r over ``draws`` mixtures without conflict."""
    suggested, signals, limits = Counter[int](), [], []
    for draw in range(draws):
        members = random_datasets(pool, np.random.default_rng([draw, uneven]), uneven=uneven, count=count)
        axes, _, found = judge(pool.mixture(members), np.array([len(rows) for rows in members], dtype=float))
        suggested[axes] += 1
        signals.append([item.signal for item in found])
        limits.append([item.signal_null for item in found])
    return {
        "draws": draws,
        "recommended": draws - suggested[0],
        "two_or_more_axes": sum(number for axes, number in suggested.items() if axes > 1),
        "signal": np.mean(signals, axis=0).tolist(),
        "limit": np.mean(limits, axis=0).tolist(),
    }


def labels_of(gram: np.ndarray, factors: np.ndarray, weights: np.ndarray, axes: int) -> np.ndarray:
    names = tuple(f"d{i:03}" for i in range(len(gram)))
    cosine = cosine_matrix(gram) * np.outer(factors, factors)
    np.fill_diagonal(cosine, 1.0)
    labels = np.zeros(len(gram), dtype=int)
    for k, group in enumerate(pca.split(MixtureView(names, weights, cosine, gram), axes, 0)):
        labels[group] = k
    return labels


def agreement(one: np.ndarray, two: np.ndarray) -> tuple[float, np.ndarray]:
    """Share of datasets in the same group after matching groups, and which ones."""
    overlap = np.zeros((one.max() + 1, two.max() + 1))
    np.add.at(overlap, (one, two), 1)
    rows, columns = linear_sum_assignment(-overlap)
    matched = dict(zip(columns.tolist(), rows.tolist(), strict=True))
    same = np.array([matched[int(k)] for k in two]) == one
    return float(same.mean()), same


def cosine_stability(pool: Pool, pairs: int = 30) -> list[dict[str, Any]]:
    """Agreement of the splits from two disjoint halves of every dataset's rows, with plain and with corrected cosines."""
    table = []
    for axes in (1, 2, 3):
        found: dict[str, list[float]] = {"plain": [], "corrected": []}
        for pair in range(pairs):
            members = own_datasets(pool, np.random.default_rng(pair))
            # Unequal samples, as in mixtures with small datasets: the noise differs between datasets.
            sizes = np.random.default_rng(1000 + pair).uniform(0.3, 1.0, len(members))
            halves = [
                [rows[k::2][: max(8, int(s * len(rows) / 2))] for rows, s in zip(members, sizes, strict=True)]
                for k in (0, 1)
            ]
            weights = np.ones(len(members))
            for kind, splits in found.items():
                labels = []
                for half in halves:
                    parts = pool.mixture(half)
                    gram = parts.products().sum(axis=(0, 1))
                    unbiased = reliability(parts).unbiased_squared_norm
                    factors = np.sqrt(np.diag(gram) / np.where(unbiased > 0, unbiased, np.diag(gram)))
                    labels.append(
                        labels_of(gram, factors if kind == "corrected" else np.ones(len(gram)), weights, axes)
                    )
                splits.append(agreement(*labels)[0])
        table.append({"axes": axes, **{kind: float(np.mean(values)) for kind, values in found.items()}})
    return table


def stability_calibration(pool: Pool, draws: int = 12) -> list[dict[str, Any]]:
    """Per-dataset stability said from one sample of 24 rows, and how often other samples put the dataset in that group."""
    table = []
    for axes in (1, 2, 3):
        said, seen = [], []
        for draw in range(draws):
            generator = np.random.default_rng(draw)
            members = own_datasets(pool, generator, 24)
            parts, weights, ones = pool.mixture(members), np.ones(len(members)), np.ones(len(members))
            own = labels_of(parts.products().sum(axis=(0, 1)), ones, weights, axes)
            replicates = [
                agreement(own, labels_of(gram, ones, weights, axes))[1] for gram in resampled_grams(parts, 60, draw)
            ]
            others = []
            for _ in range(20):
                fresh = pool.mixture(own_datasets(pool, generator, 24)).products().sum(axis=(0, 1))
                others.append(agreement(own, labels_of(fresh, ones, weights, axes))[1])
            said.append(np.mean(replicates, axis=0))
            seen.append(np.mean(others, axis=0))
        a, b = np.concatenate(said), np.concatenate(seen)
        firm = a >= 0.9
        table.append(
            {
                "axes": axes,
                "said": float(a.mean()),
                "seen": float(b.mean()),
                "correlation": float(np.corrcoef(a, b)[0, 1]),
                "firm": float(firm.mean()),
                "seen_where_firm": float(b[firm].mean()) if firm.any() else None,
                "seen_where_open": float(b[~firm].mean()) if (~firm).any() else None,
            }
        )
    return table


def draw_many(draws: int, spread: float, *, uneven: bool, count: int = 204) -> list[object]:
    """A row of the table: mixtures of one made-up gradient, whose examples scatter around it in few strong directions."""
    names, above, suggested, signals, limits = [f"d{i:03}" for i in range(count)], 0, 0, [], []
    for seed in range(draws):
        sizes = np.random.default_rng([seed, 7]).integers(8, 40, count) if uneven else 12
        parts = spectrum_cases.mixture(
            spectrum_cases.planted(count), spread * spectrum_cases.low_rank_noise(60), sizes, seed
        )
        found = spectral_concentration(parts, np.ones(count), names, 1)
        suggested += suggest_axes(found, count)[0] > 0
        above += (found[0].signal or 0.0) > (found[0].signal_null or 0.0)
        signals.append(found[0].signal or 0.0)
        limits.append(found[0].signal_null or 0.0)
    noise = float(parts.products().trace(axis1=2, axis2=3).sum()) / count - 1
    sizes_said = "8 to 39" if uneven else 12
    means = (f"{np.mean(values):.2f}" for values in (signals, limits))
    return [f"{max(noise, 0) ** 0.5:.1f}", sizes_said, draws, suggested, above, *means]


def report_many(draws: int) -> str:
    """The results as a table."""
    cases = ((0.1, False), (0.3, False), (0.3, True), (1.0, False))
    rows = [draw_many(draws, spread, uneven=uneven) for spread, uneven in cases]
    head = ("noise", "examples", "draws", "a split recommended", "signal above its limit", "signal", "limit")
    return (
        "# Splits recommended without conflict, above 200 datasets\n\n"
        f"`python -m benchmarks.conflict.null --many {draws}`. 204 datasets of one made-up gradient; noise: its length in "
        "a dataset's mean gradient, in lengths of that gradient (root mean square, last draw). Signal and limit (the "
        "largest of 39 mixtures without conflict) are means over draws, for the first axis; by chance alone signal would "
        f"be above its limit in one draw of 40.\n\n{_table(head, rows)}\n"
    )


def report(facts: dict[str, Any]) -> str:
    """The results as tables."""
    draws = next(iter(facts["pools"].values()))["even"]["draws"]
    intro = (
        f"`python -m benchmarks.conflict.null --work SCRATCH --draws {draws} --real BASE MIXTURE`. "
        f"{DATASETS} datasets dealt at random from one pool of real rows; recommended "
        "= `suggested_axes` above 0. Signal and limit (the largest of 99 mixtures without conflict, made from the measured "
        "noise) are means over draws, for axes 1 / 2 / 3."
    )
    cosines = (
        "Agreement of splits from two disjoint halves of the rows, of unequal sizes (share of datasets in one group):"
    )
    calibration = (
        "Stability per dataset from 24 rows each: what one sample says, and what 20 other samples do (drawn from the same "
        "40 rows, so they overlap):"
    )
    nulls, own, plain, firm = [], [], [], []
    for pool, values in facts["pools"].items():
        for sizes in ("even", "uneven"):
            null = values[sizes]
            signal, limit = (" / ".join(f"{x:.2f}" for x in null[key]) for key in ("signal", "limit"))
            counts = (null["draws"], null["recommended"], null["two_or_more_axes"])
            nulls.append((pool, sizes, *counts, signal, limit))
        own.append(f"- {pool}, {values['datasets']} datasets: {values['suggestion']}")
        for item in values["axes"]:
            shown = [
                f"{name} {item[key]:.2f} (limit {item[key + '_null']:.2f})"
                for name, key in (("signal", "signal"), ("ratio", "ratio"), ("sign cut", "sign_cut_ratio"))
            ]
            own.append(
                f"  - axis {item['axis']}: {', '.join(shown)}, ratio on other examples {item['held_out_ratio']:.2f}"
            )
        plain += [(pool, row["axes"], f"{row['plain']:.3f}", f"{row['corrected']:.3f}") for row in values["cosines"]]
        for row in values["stability"]:
            figures = [
                row[key] for key in ("said", "seen", "correlation", "firm", "seen_where_firm", "seen_where_open")
            ]
            firm.append((pool, row["axes"], *("–" if figure is None else f"{figure:.3f}" for figure in figures)))
    parts = [
        "# Splits recommended without conflict, and for real mixtures",
        intro,
        _table(("pool", "sizes", "draws", "a split recommended", "two axes or more", "signal", "limit"), nulls),
        "The same rows in their own datasets:",
        "\n".join(own),
        cosines,
        _table(("pool", "axes", "plain", "corrected"), plain),
        calibration,
        _table(("pool", "axes", "said", "seen", "correlation", "called firm", "seen where firm", "where open"), firm),
        f"{facts['seconds']:.0f} s of one core, without the gradients of the single rows.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for measured gradients")
    parser.add_argument("--many", type=int, help="instead: so many draws of 204 made-up datasets")
    parser.add_argument("--draws", type=int, default=50, help="mixtures without conflict, per pool and kind of sizes")
    parser.add_argument("--real", nargs=2, metavar=("BASE", "MIXTURE"), help="another base and mixture folder")
    arguments = parser.parse_args()
    if arguments.many:
        (RESULTS / "conflict_null_many.md").write_text(report_many(arguments.many))
        return
    if arguments.work is None:
        parser.error("--work FOLDER is needed")
    arguments.work.mkdir(parents=True, exist_ok=True)
    demo = arguments.work / "demo"
    write_demo(demo)
    sources = {"demo": (str(demo / "base"), str(demo / "mixture"))}
    if arguments.real:
        sources["real"] = tuple(arguments.real)
    started, pools = time.process_time(), {}
    for name, (base, mixture) in sources.items():
        pool = Pool.open(arguments.work / f"{name}.npz", base, mixture)
        members = own_datasets(pool, np.random.default_rng(0))
        axes, why, found = judge(pool.mixture(members), np.array([len(rows) for rows in members], dtype=float))
        pools[name] = {
            "datasets": len(members),
            "suggested_axes": axes,
            "suggestion": why,
            "axes": [vars(item) for item in found],
            "even": draw_nulls(pool, arguments.draws, uneven=False),
            "uneven": draw_nulls(pool, arguments.draws, uneven=True),
            "cosines": cosine_stability(pool),
            "stability": stability_calibration(pool),
        }
        print(name, json.dumps(pools[name]), flush=True)
    facts = {"seconds": time.process_time() - started, "pools": pools}
    (RESULTS / "conflict_null.json").write_text(json.dumps(facts, indent=2) + "\n")
    (RESULTS / "conflict_null.md").write_text(report(facts))


if __name__ == "__main__":
    main()
