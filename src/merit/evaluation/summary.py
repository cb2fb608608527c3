"""From figures by dataset to averages and paired comparisons. Pure: tables in, one summary out; no model, no files.

**Macro average**: the unweighted mean over datasets, so that a large dataset counts no more than a small one. **Pooled
loss**: all target tokens together. **Paired difference**: merged minus the other model, dataset by dataset. These
generalise to other datasets like these, not to other training seeds.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from merit.evaluation.figures import (
    PARTS,
    Average,
    Averages,
    ByDataset,
    Difference,
    Drift,
    Figures,
    MeanDrift,
    Metric,
    Outcome,
    Part,
    Summary,
)
from merit.evaluation.statistics import ERROR, MIN_UNITS, Paired, compare, holm

__all__ = ["About", "called", "macro", "model_order", "paired", "paired_drift", "summarise"]


@dataclass(frozen=True)
class About:
    """What is known about the models besides their figures.

    Attributes:
        method: Split method that ``merged`` was made with.
        trained_tokens: Target tokens that each model was trained on, by name.
        remarks: How a model differs from the standard one (``operator ties``, ``without branch 1``), by name.
        missing: Models that were expected but are not included, by name, and why (``unfinished: ...``).
    """

    method: str = "pca"
    trained_tokens: Mapping[str, int] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


def model_order(models: Iterable[str]) -> tuple[str, ...]:
    """Base, joint, random, other baselines, merged, branches by number."""
    first = {"base": 0, "joint": 1, "random": 2, "merged": 4}

    def place(name: str) -> tuple[int, int, str]:
        branch = re.fullmatch(r"branch-(\d+)", name)
        return (5, int(branch[1]), name) if branch else (first.get(name, 3), 0, name)

    return tuple(sorted(models, key=place))


def macro(figures: ByDataset, only: Collection[str] | None = None) -> Average | None:
    """Averages of one model over datasets (all, or those named in ``only``); None if there is none."""
    chosen = [item for name, item in figures.items() if only is None or name in only]
    if not chosen:
        return None
    losses = np.asarray([item.loss for item in chosen], dtype=np.float64)
    tokens = np.asarray([item.target_tokens for item in chosen], dtype=np.float64)
    matches = [item.exact_match for item in chosen if item.exact_match is not None]
    return Average(
        loss=float(losses.mean()),
        exact_match=float(np.mean(matches)) if matches else None,
        pooled_loss=float(losses @ tokens / tokens.sum()),
        datasets=len(chosen),
        exact_match_datasets=len(matches),
        examples=sum(item.examples for item in chosen),
        target_tokens=int(tokens.sum()),
    )


def paired(ours: ByDataset, theirs: ByDataset, metric: Metric, *, seed: int = 0) -> Paired | None:
    """Difference of two models over the datasets for which both have the metric; None if there is none.

    Args:
        ours: The merged model's figures by dataset.
        theirs: The other model's.
        metric: ``loss`` (lower is better) or ``exact_match`` (higher is better).
        seed: Seed of the bootstrap.
    """
    both = [(_value(ours[name], metric), _value(theirs[name], metric)) for name in ours if name in theirs]
    values = np.asarray([a - b for a, b in both if a is not None and b is not None], dtype=np.float64)
    return compare(values, None, lower_is_better=metric == "loss", seed=seed) if len(values) else None


def _value(figures: Figures, metric: Metric) -> float | None:
    return figures.loss if metric == "loss" else figures.exact_match


def paired_drift(ours: Drift, theirs: Drift, *, seed: int = 0) -> Paired:
    """Difference of two models' drift over the same answers of the base; units are answers, weighted by their tokens."""
    tokens = np.asarray(ours.token_counts, dtype=np.float64)
    values = (np.asarray(ours.kl_sums) - np.asarray(theirs.kl_sums)) / tokens
    return compare(values, tokens, lower_is_better=True, seed=seed)


def summarise(
    sets: Mapping[Part, Mapping[str, ByDataset]],
    drift: Mapping[str, Drift],
    about: About | None = None,
    *,
    short: Collection[str] = (),
    seed: int = 0,
) -> Summary:
    """All data for tables and verdict.

    Args:
        sets: {part: {model: {dataset: figures}}}; the mixture's part names every model.
        drift: By model; may be empty.
        about: What else is known about the models.
        short: Names of the mixture's short-answer datasets.
        seed: Seed of the bootstrap.
    """
    about = about or About()
    models = model_order(sets["mixture"])
    datasets = {name for figures in sets["mixture"].values() for name in figures}
    return Summary(
        models=models,
        about={name: about.remarks[name] for name in models if about.remarks.get(name)},
        missing={name: why for name, why in about.missing.items() if name not in models},
        method=about.method,
        seed=seed,
        short_answer_datasets=tuple(sorted(short)),
        macro={
            name: Averages(
                mixture=macro(sets["mixture"][name]),
                kept=macro(sets["kept"].get(name, {})),
                unseen=macro(sets.get("unseen", {}).get(name, {})),
                short=macro(sets["mixture"][name], only=set(short)),
                long=macro(sets["mixture"][name], only=datasets - set(short)),
                drift=_mean(drift.get(name)),
                trained_target_tokens=about.trained_tokens.get(name),
            )
            for name in models
        },
        paired=tuple(_comparisons(models, sets, drift, about.method, seed)),
    )


def _mean(drift: Drift | None) -> MeanDrift | None:
    return None if drift is None else MeanDrift(drift.kl, drift.top1_agreement, drift.tokens, drift.prompts)


def _comparisons(
    models: Collection[str],
    sets: Mapping[Part, Mapping[str, ByDataset]],
    drift: Mapping[str, Drift],
    method: str,
    seed: int,
) -> Iterable[Difference]:
    if "merged" not in models:
        return
    for other in models:
        is_merged = other == "merged" or other == method == "joint"  # a joint run's merged model has both names
        if is_merged or other.startswith("branch-"):
            continue
        measures: dict[tuple[Part, Metric], Paired] = {}
        metrics: tuple[Metric, ...] = ("loss", "exact_match")
        for part in PARTS:
            figures = sets.get(part, {})
            for metric in metrics:
                found = paired(figures.get("merged", {}), figures.get(other, {}), metric, seed=seed)
                if found:
                    measures[part, metric] = found
        if "merged" in drift and other in drift and other != "base":
            measures["kept", "drift"] = paired_drift(drift["merged"], drift[other], seed=seed)
        yield from called(other, measures)


def called(other: str, measures: Mapping[tuple[Part, Metric], Paired]) -> list[Difference]:
    """The outcome of each measure of one comparison; any false call among them has at most 5 % probability.

    Args:
        other: The model that merged is compared with.
        measures: Paired differences by part and metric.
    """
    family = {key: item.p for key, item in measures.items() if item.units >= MIN_UNITS}
    adjusted = dict(zip(family, holm(list(family.values())), strict=True))
    return [
        Difference(
            "merged",
            other,
            *key,
            **vars(item),
            p_holm=adjusted.get(key),
            outcome=_outcome(key[1], item, adjusted.get(key)),
        )
        for key, item in measures.items()
    ]


def _outcome(metric: Metric, item: Paired, p: float | None) -> Outcome:
    if p is None or item.ci95 is None:
        return "few"
    if p > ERROR or item.ci95[0] <= 0 <= item.ci95[1]:
        return "unclear"
    return "better" if (item.difference < 0) == (metric != "exact_match") else "worse"
