"""A finished run's figures under plain names, for experiment trackers: conflict, groups, branches, merge, evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from merit.evaluation.figures import PARTS
from merit.report.page.data import RunData

__all__ = ["tracked_figures"]

_PARTS = {"mixture": "learned"}


def tracked_figures(data: RunData) -> dict[str, float]:
    """Every figure that is known: ``conflict/mean_cosine``, ``group_0/rows``, ``evaluation/merged/learned_loss`` ..."""
    found = [*_conflict(data), *_groups(data), *_merge(data), *_evaluation(data)]
    return {name: float(value) for name, value in found if value is not None and value == value}


def _conflict(data: RunData) -> Iterator[tuple[str, float | None]]:
    if data.geometry is None:
        return
    summary = data.geometry.summary
    yield "conflict/datasets", summary.datasets
    yield "conflict/mean_cosine", summary.cosine.mean
    yield "conflict/min_cosine", summary.cosine.min
    yield "conflict/negative_share", summary.negative_share
    yield "conflict/suggested_axes", summary.suggested_axes
    for axis, share in enumerate(summary.explained_variance, 1):
        yield f"conflict/variance_axis_{axis}", share
    for item in summary.spectral_concentration:
        yield f"conflict/signal_axis_{item.axis}", item.signal
        yield f"conflict/signal_null_axis_{item.axis}", item.signal_null


def _groups(data: RunData) -> Iterator[tuple[str, float | None]]:
    counts = {item.name: item for item in data.counts}
    for k, group in enumerate(data.own.split.groups if data.own.split else []):
        known = [counts[name] for name in group if name in counts]
        yield f"group_{k}/datasets", len(group)
        yield f"group_{k}/rows", sum(item.rows for item in known)
        yield f"group_{k}/tokens", sum(item.tokens for item in known)
        yield f"group_{k}/target_tokens", sum(item.target_tokens for item in known)
    for branch in data.own.branches:
        yield f"branch_{branch.k}/final_loss", branch.result.final_loss
        yield f"branch_{branch.k}/seconds", branch.result.seconds
        yield f"branch_{branch.k}/peak_memory_bytes", branch.result.peak_memory_bytes


def _merge(data: RunData) -> Iterator[tuple[str, float | None]]:
    if data.own.merge is None:
        return
    yield "merge/scale", data.own.merge.scale
    for k, weight in enumerate(data.own.merge.weights):
        yield f"merge/weight_{k}", weight
    moved = data.own.merge.displacements
    if moved is not None:
        for k, norm in enumerate(moved.branches):
            yield f"merge/displacement_{k}", moved.relative(norm)
        yield "merge/displacement_merged", moved.relative(moved.merged)


def _evaluation(data: RunData) -> Iterator[tuple[str, float | None]]:
    if data.evaluation is None:
        return
    for model, averages in data.evaluation.summary.macro.items():
        for part in PARTS:
            average = averages.of(part)
            if average is not None:
                yield f"evaluation/{model}/{_PARTS.get(part, part)}_loss", average.loss
                yield f"evaluation/{model}/{_PARTS.get(part, part)}_exact_match", average.exact_match
        if averages.drift is not None:
            yield f"evaluation/{model}/drift", averages.drift.kl
