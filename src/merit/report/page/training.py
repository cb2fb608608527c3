"""Training: loss curves of branches and datasets, throughput, tokens, time and memory."""

from __future__ import annotations

import math

import numpy as np

from merit.progress import duration, size
from merit.report.page import charts
from merit.report.page.data import Branch, RunData
from merit.report.page.markup import Cell, Html, Row, details, figure, join, number, paragraph, section, table

_POINTS = 40
_POINTS_OF_DATASET = 24
_MOST_LINES = 40


def build(data: RunData) -> Html:
    """Curves and the table of branches."""
    trained = [(method, branch) for method in data.methods for branch in method.branches]
    if not trained:
        return section("training", "Training", paragraph("No branch is trained yet."))
    rows: list[Row] = []
    series = []
    for number_, method in enumerate(data.methods):
        for branch in method.branches:
            label = f"branch {branch.k}" if number_ == 0 else f"{method.name} {branch.k}"
            rows.append(_row(label, branch))
            if branch.log and (number_ == 0 or method.name == "joint"):
                at, loss = charts.thin(np.array([step.loss for step in branch.log]), _POINTS)
                x = ((at + 1) / len(branch.log)).tolist()
                colour = branch.k if number_ == 0 else 7
                series.append(
                    charts.Series(label if number_ == 0 else method.name, x, loss.tolist(), colour, dashed=number_ > 0)
                )
    header = (
        "branch",
        "steps",
        "rows",
        "tokens",
        "target tokens",
        "last loss",
        "target tokens/s",
        "time",
        "peak memory",
        "resumed",
    )
    parts = [table("branches", "Every branch", header, rows, most=24)]
    if series:
        drawing = charts.lines("Training loss", series, "share of the branch's steps", "nats per target token")
        parts.insert(0, figure("loss", "Training loss", drawing, "Means over equal stretches of steps."))
    curves = [_by_dataset(branch) for branch in data.own.branches if branch.log]
    if curves:
        parts.append(details("Training loss of every dataset", join(curves)))
    return section("training", "Training", *parts)


def _row(label: str, branch: Branch) -> Row:
    result = branch.result
    rate = result.target_tokens / result.seconds if result.seconds else None
    return [
        label,
        number(result.steps, "{:,}"),
        number(result.samples, "{:,}"),
        number(result.tokens, "{:,}"),
        number(result.target_tokens, "{:,}"),
        number(result.final_loss),
        number(rate, "{:,.0f}"),
        Cell(duration(result.seconds), result.seconds),
        Cell(size(result.peak_memory_bytes), float(result.peak_memory_bytes)),
        Cell(", ".join(f"step {step:,}" for step in result.resumed_from) or "no"),
    ]


def _by_dataset(branch: Branch) -> Html:
    """One line per dataset: loss per target token over equal stretches of the branch's steps."""
    names = sorted({name for step in branch.log for name in step.datasets})
    stretches = min(_POINTS_OF_DATASET, len(branch.log))
    sums = np.zeros((len(names), stretches))
    counts = np.zeros((len(names), stretches))
    place = {name: i for i, name in enumerate(names)}
    for index, step in enumerate(branch.log):
        at = index * stretches // len(branch.log)
        for name, (loss, targets) in step.datasets.items():
            sums[place[name], at] += loss
            counts[place[name], at] += targets
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums / counts
    series = []
    x = [(k + 0.5) / stretches for k in range(stretches)]
    for name in names[:_MOST_LINES]:
        y = means[place[name]].tolist()
        series.append(charts.Series(name, x, [v if math.isfinite(v) else math.nan for v in y], place[name]))
    title = f"Branch {branch.k}: training loss of every dataset"
    rest = len(names) - len(series)
    note = f"{rest} more datasets are in log.jsonl." if rest > 0 else None
    return figure(
        f"loss-{branch.k}",
        title,
        charts.lines(title, series, "share of the branch's steps", "nats per target token"),
        note,
    )
