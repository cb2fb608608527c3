"""From per-dataset figures to averages and paired comparisons. Pure: tables in, one summary out; no model, no files.

**Macro average**: the unweighted mean over datasets, so that a large dataset counts no more than a small one. **Pooled
loss**: all target tokens together. **Paired difference**: merged minus the other model, dataset by dataset, with a 95 %
bootstrap interval over datasets and Wilcoxon's signed-rank p. Both speak of other datasets like these; neither says anything
of another training seed. The sentences made from this are in :mod:`merit.evaluation.verdict`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from merit.evaluation.verdict import verdict

__all__ = ["MIN_UNITS", "interval", "macro", "model_order", "paired", "paired_drift", "summarise", "verdict"]

Figures = Mapping[str, Mapping[str, Any]]
"""One model's figures: {dataset: {loss, exact_match, examples, target_tokens}}."""

FORMAT = 1
RESAMPLES = 10_000
"""Bootstrap resamples."""
MIN_UNITS = 6
"""Fewest datasets (or prompts) of a comparison that may be called clear: with fewer, Wilcoxon's two-sided p cannot pass
0.05 whatever the figures, and a bootstrap of so few values is no interval."""

_PARTS = ("mixture", "kept")
_METRICS = ("loss", "exact_match")


def model_order(models: Iterable[str]) -> list[str]:
    """Base, joint, random, other baselines, merged, branches by number."""
    first = {"base": 0, "joint": 1, "random": 2, "merged": 4}

    def place(name: str) -> tuple[int, int, str]:
        branch = re.fullmatch(r"branch-(\d+)", name)
        return (5, int(branch[1]), name) if branch else (first.get(name, 3), 0, name)

    return sorted(models, key=place)


def macro(figures: Figures, only: Collection[str] | None = None) -> dict[str, Any] | None:
    """Averages of one model over datasets; None where there is none.

    Args:
        figures: By dataset.
        only: Datasets to average over; all by default.

    Returns:
        ``loss`` (nats per target token) and ``exact_match`` (share, over the datasets where it was measured, else None),
        both macro; ``pooled_loss``; ``datasets``, ``exact_match_datasets``, ``examples``, ``target_tokens``.
    """
    chosen = [item for name, item in figures.items() if only is None or name in only]
    if not chosen:
        return None
    losses = np.asarray([item["loss"] for item in chosen], dtype=np.float64)
    tokens = np.asarray([item["target_tokens"] for item in chosen], dtype=np.float64)
    matches = [item["exact_match"] for item in chosen if item["exact_match"] is not None]
    return {
        "loss": float(losses.mean()),
        "exact_match": float(np.mean(matches)) if matches else None,
        "pooled_loss": float(losses @ tokens / tokens.sum()),
        "datasets": len(chosen),
        "exact_match_datasets": len(matches),
        "examples": sum(item["examples"] for item in chosen),
        "target_tokens": int(tokens.sum()),
    }


def interval(values: np.ndarray, weights: np.ndarray | None = None, *, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a (weighted) mean over units that are drawn with replacement.

    The expanded percentile interval: the percentiles are moved outward so that for n units it is as wide as Student's
    interval where that one is right; plain percentiles are too narrow for the few datasets of a mixture.
    Source: Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69 (2015), 371-386.

    Args:
        values: (n,) float64, n ≥ 2.
        weights: (n,) weight of each unit in the mean, drawn along with it; None: 1.
        seed: Seed of the resampling.
    """
    from scipy import stats

    n = len(values)
    weights = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    rng = np.random.default_rng([seed, n])
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 500):
        drawn = rng.integers(0, n, size=(min(500, RESAMPLES - start), n))
        w = weights[drawn]
        means[start : start + len(drawn)] = (values[drawn] * w).sum(axis=1) / w.sum(axis=1)
    tail = float(stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf(0.025, n - 1)))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired(ours: Figures, theirs: Figures, metric: str, *, seed: int = 0) -> dict[str, Any] | None:
    """Difference of two models over the datasets at which both have the metric; None where there is none.

    Args:
        ours: The merged model's figures by dataset.
        theirs: The other model's.
        metric: ``loss`` (lower is better) or ``exact_match`` (higher is better).
        seed: Seed of the bootstrap.

    Returns:
        ``difference`` (mean of ours − theirs), ``ci95`` ([low, high] or None below two units), ``wilcoxon_p`` (two-sided),
        ``units`` (datasets), ``wins``/``losses``/``ties`` of ours, ``outcome``: better, worse, unclear or few.
    """
    names = [
        name for name in ours if name in theirs and ours[name][metric] is not None and theirs[name][metric] is not None
    ]
    if not names:
        return None
    values = np.asarray([ours[name][metric] - theirs[name][metric] for name in names], dtype=np.float64)
    return _compare(values, None, lower_is_better=metric == "loss", seed=seed)


def paired_drift(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, seed: int = 0) -> dict[str, Any]:
    """Difference of two models' drift over the same answers of the base; units are answers, weighed by their tokens."""
    tokens = np.asarray(ours["token_counts"], dtype=np.float64)
    values = (np.asarray(ours["kl_sums"]) - np.asarray(theirs["kl_sums"])) / tokens
    return _compare(values, tokens, lower_is_better=True, seed=seed)


def _compare(values: np.ndarray, weights: np.ndarray | None, *, lower_is_better: bool, seed: int) -> dict[str, Any]:
    from scipy import stats

    gains = -values if lower_is_better else values
    changed = values[values != 0]  # Wilcoxon leaves out zeros; without them scipy's exact p is quick
    p = float(stats.wilcoxon(changed).pvalue) if len(changed) else 1.0
    ci = interval(values, weights, seed=seed) if len(values) >= 2 else None
    if len(values) < MIN_UNITS or ci is None:
        outcome = "few"
    elif ci[0] <= 0 <= ci[1]:
        outcome = "unclear"
    else:
        outcome = "better" if (ci[1] < 0) == lower_is_better else "worse"
    return {
        "difference": float(np.average(values, weights=weights)),
        "ci95": list(ci) if ci else None,
        "wilcoxon_p": p,
        "units": len(values),
        "wins": int((gains > 0).sum()),
        "losses": int((gains < 0).sum()),
        "ties": int((gains == 0).sum()),
        "outcome": outcome,
    }


def summarise(
    results: Mapping[str, Figures],
    kept: Mapping[str, Figures],
    drift: Mapping[str, Mapping[str, Any]],
    *,
    short: Collection[str] = (),
    method: str = "pca",
    seed: int = 0,
    trained_tokens: Mapping[str, int] | None = None,
    about: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything that tables and verdict show.

    Args:
        results: {model: {dataset: figures}} over the mixture's held-out rows.
        kept: The same over the kept sets (empty dicts where there are none).
        drift: {model: figures of :func:`merit.evaluation.drift.measure_drift`}; may be empty.
        short: Names of the mixture's short-answer datasets.
        method: The run's own split method (what ``merged`` was made with).
        seed: Seed of the bootstrap.
        trained_tokens: Target tokens trained, by model.
        about: Short remark by model on how it was made, where that is not the plain way.

    Returns:
        ``models`` in order; ``about`` (remarks on these models); ``macro`` {model: {mixture, kept, short, long:
        :func:`macro` or None; drift: {kl, top1_agreement, tokens, prompts} or None; trained_target_tokens}};
        ``paired``: one entry per (other model, part, metric); ``verdict``: sentences.
    """
    models = model_order(results)
    datasets = {name for figures in results.values() for name in figures}
    averages = {}
    for name in models:
        moved = drift.get(name)
        averages[name] = {
            "mixture": macro(results[name]),
            "kept": macro(kept.get(name, {})),
            "short": macro(results[name], only=set(short)),
            "long": macro(results[name], only=datasets - set(short)),
            "drift": moved and {key: moved[key] for key in ("kl", "top1_agreement", "tokens", "prompts")},
            "trained_target_tokens": (trained_tokens or {}).get(name),
        }
    summary = {
        "format": FORMAT,
        "models": models,
        "about": {name: about[name] for name in models if about and about.get(name)},
        "method": method,
        "seed": seed,
        "short_answer_datasets": sorted(short),
        "macro": averages,
        "paired": _comparisons(models, results, kept, drift, method, seed),
    }
    return summary | {"verdict": verdict(summary)}


def _comparisons(
    models: list[str],
    results: Mapping[str, Figures],
    kept: Mapping[str, Figures],
    drift: Mapping[str, Mapping[str, Any]],
    method: str,
    seed: int,
) -> list[dict[str, Any]]:
    if "merged" not in models:
        return []
    found = []
    for other in models:
        is_merged = other == "merged" or other == method == "joint"  # a joint run's merged model goes by both names
        if is_merged or other.startswith("branch-"):
            continue
        for part, tables in zip(_PARTS, (results, kept), strict=True):
            for metric in _METRICS:
                item = paired(tables.get("merged", {}), tables.get(other, {}), metric, seed=seed)
                if item:
                    found.append({"model": "merged", "other": other, "part": part, "metric": metric, **item})
        if "merged" in drift and other in drift and other != "base":
            item = paired_drift(drift["merged"], drift[other], seed=seed)
            found.append({"model": "merged", "other": other, "part": "kept", "metric": "drift", **item})
    return found
