"""Scores on benchmark suites as a table: tasks × models. It computes nothing."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import RenderableType
from rich.table import Table

from merit.run.suites import SuiteScores

__all__ = ["render"]


def render(scores: Mapping[str, SuiteScores]) -> list[RenderableType]:
    """The table, and what the figures depend on; nothing if there are none."""
    if not scores:
        return []
    table = Table(title="Benchmark suites", title_justify="left")
    for title in ("task", "metric", *scores):
        table.add_column(title, justify="left" if title in ("task", "metric") else "right")
    rows = dict.fromkeys(
        (task, metric) for found in scores.values() for task in found.scores for metric in found.scores[task]
    )
    for task, metric in rows:
        if not metric.endswith("_stderr"):
            values = [found.scores.get(task, {}).get(metric) for found in scores.values()]
            table.add_row(task, metric, *("–" if value is None else f"{value:.3f}" for value in values))
    facts = next(iter(scores.values())).facts
    said = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    limit = "" if facts.limit is None else f", only {facts.limit} examples per task"
    judge = "" if facts.judge is None else f", judge: {facts.judge}"
    return [table, f"{said}; batch size {facts.batch_size}{limit}{judge}"]
