"""The diagnostics on one screen: a verdict per line, the figures that decided, and where figures and numbers are."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from merit.diagnostics.probe import Probe
from merit.diagnostics.result import VERDICTS, Diagnosis

__all__ = ["render", "render_probe"]

COLOURS = {"ready": "green", "doubtful": "yellow", "not ready": "red"}


def render(results: Mapping[str, Diagnosis], left_out: Mapping[str, str]) -> list[RenderableType]:
    """The table, and what was left out."""
    table = Table(
        title="merge-readiness", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    for column in ("diagnostic", "verdict", "figures"):
        table.add_column(column, no_wrap=column != "figures", overflow="fold")
    for name, result in results.items():
        table.add_row(name, f"[{COLOURS[result.verdict]}]{result.verdict}[/]", escape(result.reason))
    for name, why in left_out.items():
        table.add_row(name, "–", escape(f"left out: {why}"))
    counts = [(verdict, sum(result.verdict == verdict for result in results.values())) for verdict in VERDICTS]
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts if count)
    return [table, f"{summary}. Rules and figures: docs/diagnostics.md"]


def render_probe(probe: Probe) -> list[RenderableType]:
    """The pre-flight's questions and answers."""
    title = f"pre-flight: {probe.steps} steps per group at {probe.learning_rate:g}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in ("question", "verdict", "answer"):
        table.add_column(column, no_wrap=column == "verdict", overflow="fold")
    for item in probe.answers:
        table.add_row(item.question, f"[{COLOURS[item.verdict]}]{item.verdict}[/]", item.answer)
    return [table, f"Altogether: {probe.verdict}. How far such forecasts can be trusted: docs/diagnostics.md"]
