"""Runs of any size for the page: typed results of random figures, without a folder or a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from merit.conflict import geometry as maths
from merit.conflict.reliability import SubSamples, noise_corrected_cosine, reliability
from merit.conflict.result import Arrays, DatasetFacts, Geometry, Pair, Spread, Summary
from merit.evaluation.figures import PARTS, Figures
from merit.evaluation.results import Evaluation
from merit.evaluation.summary import About, summarise
from merit.mixture.result import DatasetCounts
from merit.recipe.schema import Recipe
from merit.report.page.data import Branch, Method, RunData, Step
from merit.run.record import Record
from merit.run.scope import Scope
from merit.split.balance import bisect
from merit.split.components import cosine_matrix, principal_components
from merit.split.result import Split
from merit.study.compare import compare_methods
from merit.study.figures import Line, Point, Run, StudyResult
from merit.train.result import BranchResult

MODELS = ("base", "joint", "merged", "branch-0", "branch-1", "branch-2", "branch-3")


class LoggedBranch(Branch):
    """A branch whose log is given instead of read."""

    steps: list[Step]

    @property
    def log(self) -> list[Step]:  # type: ignore[override]
        return self.steps


def make_geometry(names: list[str], seed: int = 0, width: int = 48) -> Geometry:
    """A geometry of random quarter-samples around two directions."""
    rng = np.random.default_rng(seed)
    count = len(names)
    means = rng.normal(size=(count, 2)) @ rng.normal(size=(2, width)) + 0.5 * rng.normal(size=width)
    quarters = (means[None] + 0.6 * rng.normal(size=(4, count, width))).reshape(4 * count, width) / 4
    product = quarters @ quarters.T
    parts = SubSamples(
        product, np.full((count, 4), 0.25), np.full((count, 4), 1 / 12), np.full(count, 1 / 48), np.full(count, 1 / 200)
    )
    gram = product.reshape(4, count, 4, count).sum(axis=(0, 2))
    noise = reliability(parts)
    cosine = cosine_matrix(gram)
    column, double, raw = (
        principal_components(cosine, 6),
        principal_components(cosine, 6, "double"),
        principal_components(gram, 6),
    )
    arrays = Arrays(
        np.array(names),
        gram,
        cosine,
        noise_corrected_cosine(gram, noise),
        product,
        np.full(count, 48),
        np.full(count, 200),
        np.sqrt(np.diag(gram)),
        column.scores,
        column.explained_variance,
        double.scores,
        double.explained_variance,
        raw.scores,
        raw.explained_variance,
        noise.unbiased_squared_norm,
        noise.noise,
        noise.reliability,
        noise.expected_cosine,
        parts.shares,
        parts.q_parts,
        parts.q,
        parts.q_all,
        np.array(0),
    )
    facts = [
        DatasetFacts(
            n,
            200,
            48,
            480,
            2.0,
            2.1,
            float(arrays.norm[i]),
            1.0,
            float(arrays.reliability[i]),
            float(arrays.expected_cosine[i]),
        )
        for i, n in enumerate(names)
    ]
    upper = np.triu_indices(count, 1)
    off, order = cosine[upper], np.argsort(cosine[upper])
    pairs = [Pair(names[upper[0][i]], names[upper[1][i]], float(off[i])) for i in order]
    summary = Summary(
        count,
        {},
        2,
        "r = 2 (4 groups): because.",
        [],
        column.explained_variance.tolist(),
        [],
        [],
        dict(maths.norm_concentration(arrays.norm)),
        Spread.of(off),
        float((off < 0).mean()),
        pairs[:10],
        pairs[::-1][:5],
        Spread.of(arrays.expected_cosine),
        Spread.of(np.full(count, 48.0)),
        48 * count,
        "exact",
        [],
        ["a warning"],
    )
    return Geometry(arrays, facts, summary)


def make_record(stage: str) -> Record:
    return Record(
        format=2,
        stage=stage,
        fingerprint="ab" * 32,
        settings={},
        inputs={},
        seed=0,
        versions={"merit-tuning": "1", "torch": "2"},
        host={"name": "box", "cores": 2},
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:00:09+00:00",
        seconds=9.0,
        outputs={},
        checksum="",
    )


def make_run(folder: Path, names: list[str], steps: int = 60) -> RunData:
    """A finished run of ``names`` in four groups; only sample answers come from ``folder``."""
    rng = np.random.default_rng(1)
    geometry = make_geometry(names)
    groups = bisect(geometry.arrays.scores[:, :2], np.ones(len(names)), names)
    members = [[names[i] for i in group] for group in groups]
    split = Split(
        "pca", 2, "samples", members, [float(len(g)) for g in members], [], [], dict.fromkeys(names, 0.95), names[:1]
    )
    recipe = Recipe.model_validate({"name": "case", "model": {"base": "org/base"}, "mixture": {"folder": "data"}})
    branches = []
    for k, group in enumerate(members):
        result = BranchResult(folder, 1000, 5000, 400, steps, 1.0, 400, 3.0, 10**8, 1.5, 1, 1, "cpu")
        branch = LoggedBranch(k, folder, make_record(f"branch {k}"), result)
        logged = [Step(i + 1, 3.0 / (i + 1), 20, {group[i % len(group)]: (40.0 / (i + 1), 20)}) for i in range(steps)]
        object.__setattr__(branch, "steps", logged)
        branches.append(branch)
    sets = {
        part: {m: {n: Figures(float(rng.uniform(1, 3)), float(rng.uniform()), 12, 60) for n in names} for m in MODELS}
        for part in PARTS
    }
    summary = summarise(sets, {}, About("pca", dict.fromkeys(MODELS, 1000), {}))
    counts = tuple(DatasetCounts(n, rows=200, tokens=4000, target_tokens=800) for n in names)
    own = Method("pca", Scope(folder), split, tuple(branches), None)
    records = {"mixture": make_record("mixture"), "gradients": make_record("gradients")}
    return RunData(folder, recipe, counts, geometry, (own,), Evaluation(sets, {}, summary), {}, None, (), records)


def make_study(methods: tuple[str, ...] = ("base", "joint", "random-4", "own"), seeds: int = 3) -> StudyResult:
    """A study of random figures whose lines go from the base to each method's end."""
    rng = np.random.default_rng(2)
    runs = []
    for method in methods:
        for seed in range(seeds):
            learned, kept = float(rng.uniform(0.5, 1)), float(rng.uniform(0.3, 0.6))
            points = tuple(
                Point(k / 4, {"mixture": 2.0 + (learned - 2.0) * k / 4, "kept": 0.1 + (kept - 0.1) * k / 4})
                for k in range(6)
            )
            line = None if method == "base" else Line(points, 1.0)
            runs.append(Run(method, seed, {"learned": learned, "kept": kept}, 1000, 5000, line=line))
    differences = compare_methods(runs, "joint", "own")
    verdict = ("Own does better than joint <here>.", "Second sentence.")
    return StudyResult("case", "own", "joint", tuple(range(seeds)), methods, tuple(runs), differences, verdict, 10**6)
