"""Before the budget is spent: what a few dozen steps per group, and the curvature at the base, tell about a recipe.

Four questions. Does the base look merge-ready: does the average of briefly trained branches carry over to held-out rows? Is
the rate past the cliff: do branches still fall on their own rows, and no barrier between them? Does the split
separate the branches along curvature: is its gain by Theorem 3.1, from the datasets' own gradients and Hessian products,
above that of random splits of the same balance? And what is to be gained over a random split, in nats, with an interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import psutil

from merit.diagnostics.connectivity import barrier, between, pairs_of
from merit.diagnostics.hessian import Hessian
from merit.diagnostics.lab import BASE, MERGED, Lab
from merit.diagnostics.resampling import resampled
from merit.diagnostics.result import VERDICTS, Diagnosis, Verdict, graded
from merit.evaluation.fixed import FixedBatches, FixedLosses, choose_rows
from merit.progress import size as shown_size
from merit.split.balance import bisect
from merit.split.view import Groups
from merit.theory import group_gain

__all__ = ["Answer", "Probe", "measure", "random_splits"]

BARRIER_READY, BARRIER_DOUBTFUL = 0.01, 0.05
"""Largest barrier between briefly trained branches, as a share of the ends' loss."""
CARRIED_READY, CARRIED_DOUBTFUL = 0.25, 0.0
"""Least held-out gain of the average over the base, as a share of the branches' gain on their own rows."""
PERCENTILE_READY, PERCENTILE_DOUBTFUL = 0.9, 0.5
"""Least share of random splits that the split's predicted gain must exceed."""
RANDOM_SPLITS = 500
IN_INTERVAL = 20
"""How many of them are weighed again in every resample."""
HALVES = 200
"""Resamples of the datasets' halves for the interval of the gain."""
HELD_BYTES = 2 * 4 + 4 + 4 + 2 * 8
"""Per dataset and weight: two half gradients, their mean and its product in float32, the halves again in float64."""
POINTS = 5
"""Points on a path between branches."""


@dataclass(frozen=True)
class Answer:
    """One question's answer."""

    question: str
    verdict: Verdict
    answer: str


@dataclass(frozen=True)
class Probe(Diagnosis):
    """A recipe before it is trained.

    Attributes:
        answers: To the four questions.
        steps: Optimizer steps per group.
        learning_rate: The recipe's peak rate.
        own_gain: Fall of every branch's loss on its own group's rows, per target token, by branch.
        merged_gain: Loss of the base − that of the branches' average.
        merged_gain_ci95: Its interval over rows.
        carried: merged_gain over the branches' fall on their own groups' rows, both per target token of all rows.
        barrier: Largest relative barrier between branches.
        percentile: Share of random splits with a smaller predicted gain; None where there is no prediction, for the
            reason in the answers: few datasets, K not a power of two, or gradients that do not fit in memory.
        ratio: Predicted gain of the split over the mean of random splits; None where one is not above 0.
        measured_gain: Σ w L(θ_k) − L(θ̄) of the probe's branches, on training rows.
        over_random: measured_gain · (1 − 1/ratio): what of it a random split would not give; None without a ratio.
        over_random_ci95: Its interval over rows and over halves of the gradients' samples; None where a resampled gain
            is not above 0, so that a ratio has no meaning.
        judged_on: Rows of ``own_gain``, ``merged_gain`` and ``carried``: held-out, or training where a group has none.
    """

    name: ClassVar[str] = "probe"
    title: ClassVar[str] = "pre-flight"
    rule: ClassVar[str] = (
        f"base: the average's held-out gain over the branches' own is ready from {CARRIED_READY:.0%}, doubtful above 0; "
        f"rate: every branch's own loss falls, and the barrier is ready up to {BARRIER_READY:.0%}, doubtful up to "
        f"{BARRIER_DOUBTFUL:.0%}; split: ready above {PERCENTILE_READY:.0%} of random splits, doubtful above "
        f"{PERCENTILE_DOUBTFUL:.0%}; the verdict is the worse one of base and rate"
    )
    units: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("own_gain", "merged_gain", "measured_gain", "over_random"), "nats per target token"),
        "barrier": "share of the ends' mean loss",
    }

    answers: tuple[Answer, ...]
    steps: int
    learning_rate: float
    own_gain: tuple[float, ...]
    merged_gain: float
    merged_gain_ci95: tuple[float, float]
    carried: float
    barrier: float
    percentile: float | None
    ratio: float | None
    measured_gain: float
    over_random: float | None
    over_random_ci95: tuple[float, float] | None
    judged_on: str


@dataclass(frozen=True)
class Predicted:
    """The split against random ones, by the datasets' gradients: gains in units of η²."""

    percentile: float
    ratio: float | None  # None where a gain is not above 0: curvature along the gradients is negative
    ratios: np.ndarray | None  # resampled; None where a resampled gain is not above 0


def random_splits(balance: np.ndarray, axes: int, seed: int) -> list[Groups]:
    """Random splits into 2^r groups, balanced by the rule that the recipe's random split uses.

    Args:
        balance: (T,) what the split balances, by dataset.
        axes: r.
        seed: Of the draws.
    """
    rng = np.random.default_rng([seed, len(balance), axes])
    names = [f"{i:05d}" for i in range(len(balance))]
    return [bisect(rng.standard_normal((len(balance), axes)), balance, names) for _ in range(RANDOM_SPLITS)]


def measure(lab: Lab, steps: int, learning_rate: float) -> Probe:
    """Judge briefly trained branches.

    Args:
        lab: The branches are those of the split's groups, in its order.
        steps: Steps that each was trained.
        learning_rate: At which.
    """
    judged, where = _judged(lab)
    names = [BASE, *lab.branches, MERGED]
    found = dict(zip(names, lab.losses([lab.points[name] for name in names], judged), strict=True))
    falls = np.array(
        [
            _own(found[BASE], found[branch], group)
            for branch, group in zip(lab.branches, lab.subject.groups, strict=True)
        ]
    )
    own = tuple(float(fall / count) for fall, count in falls)
    sums = np.stack([found[BASE].sums, found[MERGED].sums])
    counts = found[BASE].counts
    gain = float((sums[0] - sums[1]).sum() / counts.sum())
    gain_ci = resampled(lambda losses: losses[:, 0] - losses[:, 1], sums, counts, lab.subject.seed)
    own_fall, own_count = falls.sum(axis=0)
    carried = gain * float(own_count / own_fall) if own_fall > 0 else 0.0
    height = _barrier(lab)
    measured, measured_draws = _gain(lab)
    predicted = predict(lab)
    over, over_ci = None, None
    if isinstance(predicted, Predicted) and predicted.ratio is not None:
        over = measured * (1 - 1 / predicted.ratio)
        if predicted.ratios is not None:
            draws = measured_draws * (1 - 1 / predicted.ratios)
            over_ci = (float(np.percentile(draws, 2.5)), float(np.percentile(draws, 97.5)))
    answers = (
        _base(gain, gain_ci, carried, where),
        _rate(own, height, learning_rate),
        *_split(predicted, over, over_ci),
    )
    verdict = max((answers[0].verdict, answers[1].verdict), key=VERDICTS.index)
    return Probe(
        verdict,
        f"after {steps} steps at {learning_rate:g} the average gains {gain:+.3f} nats per token on {where} rows, "
        f"{carried:.0%} of what the branches gain on their own; largest barrier {height:.1%}",
        answers,
        steps,
        learning_rate,
        own,
        gain,
        gain_ci,
        carried,
        height,
        predicted.percentile if isinstance(predicted, Predicted) else None,
        predicted.ratio if isinstance(predicted, Predicted) else None,
        measured,
        over,
        over_ci,
        where,
    )


def _judged(lab: Lab) -> tuple[FixedBatches, str]:
    """Held-out rows where every group has some, else training rows; and which."""
    held_out = {name for name, dataset in lab.subject.test.items() if (dataset.target_counts > 0).any()}
    if all(held_out.intersection(group) for group in lab.subject.groups):
        return lab.test, "held-out"
    return lab.train, "training"


def _own(base: FixedLosses, branch: FixedLosses, group: Sequence[str]) -> tuple[float, int]:
    """Fall of the summed loss on a group's rows, and their target tokens."""
    rows = np.isin(base.owners, [number for number, name in enumerate(base.names) if name in group])
    return float((base.sums - branch.sums)[rows].sum()), int(base.counts[rows].sum())


def _barrier(lab: Lab) -> float:
    """Largest relative barrier between branches."""
    alphas = np.linspace(0, 1, POINTS)
    pairs = [pair for pair in pairs_of(lab.branches) if BASE not in pair and MERGED not in pair]
    points = [between(lab.points[a], lab.points[b], float(alpha)) for a, b in pairs for alpha in alphas]
    losses = np.array([found.mean for found in lab.losses(points, lab.train)]).reshape(len(pairs), POINTS)
    return float((barrier(losses, alphas) / losses[:, [0, -1]].mean(axis=1)).max()) if pairs else 0.0


def _gain(lab: Lab) -> tuple[float, np.ndarray]:
    """Measured merging gain on training rows, and resampled values of it."""
    points = [*(lab.points[name] for name in lab.branches), lab.average]
    found = lab.losses(points, lab.train)
    factors = np.append(lab.weights, -1.0)
    per_row = factors @ np.stack([losses.sums for losses in found])
    counts = found[0].counts
    rng = np.random.default_rng([lab.subject.seed, 7])
    times = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=HALVES)
    return float(per_row.sum() / counts.sum()), (times @ per_row) / (times @ counts)


def predict(lab: Lab) -> Predicted | str:
    """The split's gain and random splits' by Theorem 3.1, with H at the base; or the reason why there is none.

    Random splits balance what the recipe's split balances, and all groups weigh by their tokens, as they do
    in the merge by default.
    Gradients are of rows drawn for this alone, so the noise of those that made the split does not favour it. Every
    dataset's sample has two halves; the interval draws for each dataset how much of either half counts.
    """
    subject = lab.subject
    names = [name for group in subject.groups for name in group]
    axes = max(1, len(subject.groups).bit_length() - 1)
    if len(subject.groups) < 2 or len(names) <= len(subject.groups):
        return "too few datasets or groups to say"
    if len(subject.groups) != 2**axes:
        return f"random splits have 2, 4, 8, ... groups and this one has {len(subject.groups)}: nothing to compare with"
    hessian = Hessian(lab, lab.hessian_rows, method=lab.settings.products)
    needed, free = HELD_BYTES * len(names) * hessian.size, psutil.virtual_memory().available
    if needed > free:
        return f"the datasets' gradients need {shown_size(needed)} of memory, {shown_size(free)} are free"
    half, products = _derivatives(lab, names, hessian)
    places = {name: i for i, name in enumerate(names)}
    groups = [[places[name] for name in group] for group in subject.groups]
    rows, tokens, targets = (
        np.array([float(count(subject.train[name])) for name in names])
        for count in (len, lambda dataset: dataset.lengths.sum(), lambda dataset: dataset.target_counts.sum())
    )
    others = random_splits(targets if subject.balance == "tokens" else rows, axes, subject.seed)
    matrix = _symmetric(half.mean(axis=1) @ products.T)

    def gains(splits: Sequence[Sequence[Sequence[int]]], of: np.ndarray) -> np.ndarray:
        return np.array([group_gain(split, rows, of, 1.0, tokens) for split in splits])

    gain, other = float(gains([groups], matrix)[0]), gains(others, matrix)
    noise = (half[:, 0] - half[:, 1]) / 2  # of a dataset's mean gradient, as its halves show it
    cross = noise @ products.T  # first order: ⟨noise_i, H g_j⟩
    rng = np.random.default_rng([subject.seed, len(names)])
    drawn = [matrix + _symmetric(2 * rng.standard_normal(len(names))[:, None] * cross) for _ in range(HALVES)]
    pairs = np.array([(gains([groups], m)[0], gains(others[:IN_INTERVAL], m).mean()) for m in drawn])
    mean = float(other.mean())
    return Predicted(
        float((other < gain).mean()),
        gain / mean if gain > 0 and mean > 0 else None,
        pairs[:, 0] / pairs[:, 1] if (pairs > 0).all() else None,
    )


def _derivatives(lab: Lab, names: Sequence[str], hessian: Hessian) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of both halves of every dataset's sample (T, 2, d) float64, and products of their means (T, d) float32."""
    rows = choose_rows(lab.subject.train, lab.settings.task_examples, lab.subject.seed, "probe")
    halves, products = [], []
    for done, name in enumerate(names):
        parts = [rows[name][0::2], rows[name][1::2] or rows[name]]
        halves.append([Hessian(lab, lab.fixed({name: part})).gradient() for part in parts])
        lab.progress(done + 1, 2 * len(names))
    for done, gradient in enumerate(np.array(halves).mean(axis=1)):
        products.append(hessian.product(gradient))
        lab.progress(len(names) + done + 1, 2 * len(names))
    return np.array(halves, dtype=np.float64), np.array(products)


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    half: np.ndarray = (matrix + matrix.T) / 2
    return half


def _base(gain: float, ci: tuple[float, float], carried: float, where: str) -> Answer:
    verdict = graded(-carried, -CARRIED_READY, -CARRIED_DOUBTFUL) if gain > 0 else "not ready"
    interval = f"{ci[0]:+.3f} to {ci[1]:+.3f}"
    text = (
        f"on {where} rows the average gains {gain:+.3f} nats per token ({interval}), {carried:.0%} of the branches' own"
    )
    return Answer("Does the base look merge-ready?", verdict, text)


def _rate(own: Sequence[float], height: float, rate: float) -> Answer:
    falling = min(own) > 0
    verdict = graded(height, BARRIER_READY, BARRIER_DOUBTFUL) if falling else "not ready"
    fall = f"{min(own):.3f} to {max(own):.3f}"
    text = f"at {rate:g} the branches' own losses fall by {fall} nats per token, and the barrier is {height:.1%}"
    return Answer("Is the rate below the cliff?", verdict, text)


def _split(predicted: Predicted | str, over: float | None, ci: tuple[float, float] | None) -> tuple[Answer, Answer]:
    questions = "Does the split separate the branches along curvature?", "What is to be gained over a random split?"
    if isinstance(predicted, str):
        return Answer(questions[0], "doubtful", predicted), Answer(questions[1], "doubtful", predicted)
    if over is None:
        why = "the curvature along the datasets' gradients is not positive, so Theorem 3.1 predicts no gain"
        return Answer(questions[0], "not ready", why), Answer(questions[1], "not ready", why)
    first = graded(-predicted.percentile, -PERCENTILE_READY, -PERCENTILE_DOUBTFUL)
    second: Verdict = "doubtful" if ci is None or ci[0] <= 0 < ci[1] else "ready" if ci[0] > 0 else "not ready"
    interval = "no interval: resampled gains are not all above 0" if ci is None else f"{ci[0]:+.4f} to {ci[1]:+.4f}"
    return (
        Answer(
            questions[0],
            first,
            f"its predicted gain is {predicted.ratio:.2f} × that of random splits, above {predicted.percentile:.0%} of them",
        ),
        Answer(
            questions[1],
            second,
            f"{over:+.4f} nats per token so far ({interval}); in our trials this did not rank outcomes",
        ),
    )
