"""How often the verdict calls a difference between models that do not differ, and how often one that is there.

``python -m benchmarks.evaluation.verdict`` writes ``benchmarks/results/verdict.md``; ten minutes or so on one core.

A comparison has up to seven measures: loss and exact match of the mixture, of the kept sets and of the unseen tasks, and
drift. Under a null every unit's difference is drawn with mean zero; made-up measures are independent of each other, which is
the worst case. Real nulls are made from ``losses.json`` (:mod:`benchmarks.evaluation.losses`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from benchmarks.report import RESULTS, machine, table

from merit.evaluation import statistics
from merit.evaluation.figures import Metric, Part
from merit.evaluation.summary import called
from merit.files import write_text

DRAWS = 6000
OLD_MIN_UNITS = 6
Key = tuple[Part, Metric]
Sizes = tuple[int, int, int, int]
"""Mixture datasets, kept sets, unseen tasks, answers."""
Family = dict[Key, np.ndarray]
Sampler = Callable[[np.random.Generator, int], np.ndarray]

SIZES: tuple[Sizes, ...] = (
    (8, 8, 8, 32),
    (12, 12, 12, 32),
    (16, 16, 16, 32),
    (29, 16, 12, 32),
    (70, 70, 70, 64),
)
NULLS: dict[str, Sampler] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy tails (t, 3 degrees)": lambda rng, n: rng.standard_t(3, size=n),
    "skewed (exponential)": lambda rng, n: rng.exponential(size=n) - 1,
    "very skewed (lognormal)": lambda rng, n: rng.lognormal(size=n) - np.exp(0.5),
}


def made_up(sampler: Sampler, sizes: Sizes, rng: np.random.Generator, shift: float = 0.0) -> Family:
    """Seven independent measures, all that a verdict compares; ``shift`` moves the mixture's loss."""
    mixture, kept, unseen, answers = sizes
    return {
        ("mixture", "loss"): sampler(rng, mixture) + shift,
        ("mixture", "exact_match"): sampler(rng, mixture),
        ("kept", "loss"): sampler(rng, kept),
        ("kept", "exact_match"): sampler(rng, kept),
        ("unseen", "loss"): sampler(rng, unseen),
        ("unseen", "exact_match"): sampler(rng, unseen),
        ("kept", "drift"): sampler(rng, answers),
    }


Losses = dict[str, dict[str, dict[str, list[list[float]]]]]
"""{part: {dataset: {model: [[loss, target tokens] of each row]}}}"""


def per_token(rows: np.ndarray) -> float:
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def halves(losses: Losses, rng: np.random.Generator) -> Family:
    """One model against itself: each dataset's rows in two random halves."""
    family: Family = {}
    for part in ("mixture", "kept"):
        differences = []
        for models in losses[part].values():
            rows = rng.permutation(np.asarray(models["seed 1"]))
            differences.append(per_token(rows[::2]) - per_token(rows[1::2]))
        family[part, "loss"] = np.asarray(differences)
    return family


def seeds(losses: Losses, rng: np.random.Generator, *, centred: bool) -> Family:
    """Two trainings with different seeds, datasets drawn with replacement; centred: their mean difference taken out."""
    family: Family = {}
    for part in ("mixture", "kept"):
        pairs = [(models["seed 1"], models["seed 2"]) for models in losses[part].values()]
        differences = np.asarray([per_token(np.asarray(a)) - per_token(np.asarray(b)) for a, b in pairs])
        differences -= differences.mean() if centred else 0
        family[part, "loss"] = rng.choice(differences, size=len(differences))
    return family


def rates(families: Iterator[Family], wanted: Key | None = None) -> tuple[float, float]:
    """Share of comparisons with any call (or with ``wanted`` called): by one interval per measure, as until 0.1; now."""
    before = now = count = 0
    for family in families:
        count += 1
        measures = {
            key: statistics.compare(values, None, lower_is_better=key[1] != "exact_match", seed=count)
            for key, values in family.items()
        }
        old = {
            key
            for key, item in measures.items()
            if item.units >= OLD_MIN_UNITS and item.ci95 is not None and not item.ci95[0] <= 0 <= item.ci95[1]
        }
        new = {(item.part, item.metric) for item in called("other", measures) if item.outcome in ("better", "worse")}
        before += bool(old) if wanted is None else wanted in old
        now += bool(new) if wanted is None else wanted in new
    return before / count, now / count


def percent(found: tuple[float, float]) -> list[str]:
    return [f"{100 * share:.1f} %" for share in found]


def main() -> None:
    started, facts = time.process_time(), machine()
    statistics.RESAMPLES, statistics.FLIPS = 500, 1000  # for speed; the package's own are twenty times as many
    rng = np.random.default_rng(0)
    losses: Losses = json.loads(Path(__file__).with_name("losses.json").read_text(encoding="utf-8"))
    nulls, power = [], []
    for name, sampler in NULLS.items():
        for sizes in SIZES:
            found = rates(made_up(sampler, sizes, rng) for _ in range(DRAWS))
            nulls.append([name, "{} + {} + {}, {} answers".format(*sizes), *percent(found)])
    counts = " + ".join(str(len(losses[part])) for part in ("mixture", "kept"))
    real = {
        "real: one model, rows in random halves": (halves(losses, rng) for _ in range(DRAWS)),
        "real: two seeds, mean difference taken out": (seeds(losses, rng, centred=True) for _ in range(DRAWS)),
    }
    nulls += [[name, counts, *percent(rates(families))] for name, families in real.items()]
    as_they_are = rates(seeds(losses, rng, centred=False) for _ in range(DRAWS))
    for sizes in SIZES[1:]:
        for shift in (0.8, 1.5):
            families = (made_up(NULLS["normal"], sizes, rng, shift) for _ in range(DRAWS // 2))
            power.append([f"{shift} sd", str(sizes[0]), *percent(rates(families, ("mixture", "loss")))])
    lines = [
        "# False calls of the verdict",
        "",
        f"`python -m benchmarks.evaluation.verdict`, {facts['date']}, {facts['processor']}, "
        f"{time.process_time() - started:.0f} CPU seconds. {DRAWS:,} comparisons per line "
        f"(standard error {100 * (0.05 * 0.95 / DRAWS) ** 0.5:.1f} points at 5 %) of models that do not differ. Until 0.1: "
        "one 95 % interval per measure, at least six units. Now: the larger p of sign flips and a skewness-adjusted t, "
        "Holm's correction over the comparison's measures, at least "
        f"{statistics.MIN_UNITS} units.",
        "",
        table(["differences", "datasets (mixture + kept + unseen)", "any false call until 0.1", "now"], nulls),
        "",
        "## Two seeds of one method, as they are",
        "",
        "These two models do differ, on these datasets; the method does not. A call here is right about the models and "
        f"would be wrong about methods: until 0.1 in {100 * as_they_are[0]:.0f} % of draws, now in "
        f"{100 * as_they_are[1]:.0f} %. No correction over datasets can mend that, so a verdict on one seed speaks of these "
        "models only.",
        "",
        "## Differences that are there",
        "",
        "How often the mixture's loss is called when its mean differs by so many standard deviations of the datasets' "
        "differences.",
        "",
        table(["difference", "mixture datasets", "called until 0.1", "now"], power),
    ]
    write_text(RESULTS / "verdict.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
