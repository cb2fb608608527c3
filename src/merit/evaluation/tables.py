"""Tables of an evaluation: rows of text for the overview and per dataset, as Markdown or for the terminal.

It formats a summary and per-dataset figures (or reads them from a finished evaluation's folder). It computes nothing and
prints nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit.run_folder import read_json

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["dataset_table", "markdown", "overview", "render"]

Table = tuple[list[str], list[list[str]]]
"""Header and rows, all text; the first column is a name."""

_NONE = "–"
_COLUMNS = (
    ("mixture loss ↓", lambda a: _of(a["mixture"], "loss"), "{:.3f}"),
    ("mixture exact match ↑", lambda a: _of(a["mixture"], "exact_match"), "{:.3f}"),
    ("kept loss ↓", lambda a: _of(a["kept"], "loss"), "{:.3f}"),
    ("kept exact match ↑", lambda a: _of(a["kept"], "exact_match"), "{:.3f}"),
    ("drift ↓", lambda a: _of(a["drift"], "kl"), "{:.4f}"),
    ("target tokens", lambda a: a["trained_target_tokens"], "{:,}"),
)


def _of(block: Mapping[str, Any] | None, key: str) -> Any:
    return None if block is None else block[key]


def overview(summary: Mapping[str, Any]) -> Table:
    """Models × what was learned, what was kept, what it took; columns that no model has are left out."""
    averages = summary["macro"]
    columns = [c for c in _COLUMNS if any(c[1](averages[name]) is not None for name in summary["models"])]
    rows = [[name, *(_cell(value(averages[name]), form) for _, value, form in columns)] for name in summary["models"]]
    return ["model", *(title for title, _, _ in columns)], rows


def dataset_table(figures: Mapping[str, Mapping[str, Mapping[str, Any]]], models: Sequence[str], metric: str) -> Table:
    """Datasets × models for one metric; datasets where no model has it are left out.

    Args:
        figures: {model: {dataset: {loss, exact_match, ...}}}.
        models: Column order.
        metric: ``loss`` or ``exact_match``.
    """
    names = list(dict.fromkeys(name for model in models for name in figures.get(model, {})))
    rows = []
    for name in names:
        values = [figures.get(model, {}).get(name, {}).get(metric) for model in models]
        if any(value is not None for value in values):
            rows.append([name, *(_cell(value, "{:.3f}") for value in values)])
    return ["dataset", *models], rows


def _cell(value: Any, form: str) -> str:
    return _NONE if value is None else form.format(value)


def markdown(
    summary: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
    kept: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> str:
    """The whole evaluation as one Markdown page: overview, verdict, answer lengths, every dataset."""
    models = summary["models"]
    lines = ["# Evaluation", "", *_markdown_table(overview(summary)), "", LEGEND, "", "## Verdict", ""]
    lines += [f"- {sentence}" for sentence in summary["verdict"]]
    lines += _section("Mixture by answer length", _lengths(summary))
    for title, figures in (("Mixture", results), ("Kept", kept)):
        lines += _section(f"{title}: loss ↓ (nats per target token)", dataset_table(figures, models, "loss"))
        lines += _section(f"{title}: exact match ↑", dataset_table(figures, models, "exact_match"))
    return "\n".join(lines) + "\n"


LEGEND = (
    "Loss in nats per target token and exact match as a share of rows, both averaged over datasets (macro). Drift: mean "
    "KL(base‖model) in nats per token on the base's own sampled answers. ↓ lower is better, ↑ higher is better."
)
"""What the overview's columns mean."""


def _lengths(summary: Mapping[str, Any]) -> Table:
    rows = []
    for name in summary["models"]:
        short, long = summary["macro"][name]["short"], summary["macro"][name]["long"]
        if short and long:
            rows.append([name, _cell(short["loss"], "{:.3f}"), _cell(long["loss"], "{:.3f}")])
    if not rows:
        return [], []
    first = summary["macro"][summary["models"][0]]
    counts = [f"{kind}: loss ↓ ({first[kind]['datasets']} datasets)" for kind in ("short", "long")]
    return ["model", *counts], rows


def _section(title: str, table: Table) -> list[str]:
    return ["", f"## {title}", "", *_markdown_table(table)] if table[1] else []


def _markdown_table(table: Table) -> list[str]:
    header, rows = table
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" + "---:|" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def render(folder: Path) -> list[RenderableType]:
    """What a terminal shows of a finished evaluation: the overview, what its columns mean, the verdict.

    Args:
        folder: The evaluation's folder, with ``summary.json``.

    Raises:
        RunFolderError: ``summary.json`` is missing or damaged.
    """
    from rich.padding import Padding
    from rich.table import Table as RichTable
    from rich.text import Text

    summary = read_json(folder / "summary.json")
    header, rows = overview(summary)
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(header):
        table.add_column(title, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if row[0] == "merged" else None)
    sentences = [Text(f"• {sentence}") for sentence in summary["verdict"]]
    return [Padding(table, (1, 0)), Text(LEGEND, style="dim"), "", *sentences]
