"""Tables of an evaluation: rows of text for the overview and per dataset, as Markdown or for the terminal.

Pure but for :func:`render`, which reads a finished evaluation's summary and hands it on. It computes nothing and prints
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit.evaluation.verdict import counted
from merit.files import read_json

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["dataset_table", "legend", "markdown", "overview", "render", "terminal"]

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
    """Datasets × models for one metric, with the rows measured; datasets where no model has it are left out.

    Args:
        figures: {model: {dataset: {loss, exact_match, ...}}}.
        models: Column order.
        metric: ``loss`` or ``exact_match``.
    """
    names = list(dict.fromkeys(name for model in models for name in figures.get(model, {})))
    rows = []
    for name in names:
        found = [figures.get(model, {}).get(name, {}) for model in models]
        values = [item.get(metric) for item in found]
        if any(value is not None for value in values):
            examples = next(item["examples"] for item in found if item)
            rows.append([name, f"{examples:,}", *(_cell(value, "{:.3f}") for value in values)])
    return ["dataset", "rows", *models], rows


def _cell(value: Any, form: str) -> str:
    return _NONE if value is None else form.format(value)


def markdown(
    summary: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
    kept: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> str:
    """The whole evaluation as one Markdown page: overview, verdict, answer lengths, every dataset."""
    models = summary["models"]
    lines = ["# Evaluation", "", *_markdown_table(overview(summary))]
    for note in legend(summary):
        lines += ["", note]
    lines += ["", "## Verdict", "", *(f"- {sentence}" for sentence in summary["verdict"])]
    lines += _section("Mixture by answer length", _lengths(summary))
    for title, figures in (("Mixture", results), ("Kept", kept)):
        lines += _section(f"{title}: loss ↓ (nats per target token)", dataset_table(figures, models, "loss"))
        lines += _section(f"{title}: exact match ↑", dataset_table(figures, models, "exact_match"))
    return "\n".join(lines) + "\n"


def legend(summary: Mapping[str, Any]) -> list[str]:
    """What stands under the overview: what the columns that it has mean, then the remarks on models."""
    titles = " ".join(overview(summary)[0])
    shown = [
        ("loss", "Loss: nats per target token, mean over datasets (macro)."),
        ("exact match", "Exact match: share of rows, mean over datasets (macro)."),
        ("drift", "Drift: mean KL(base‖model) in nats per token on the base's own sampled answers."),
        ("target tokens", "Target tokens: those that the model was trained on, all epochs."),
        ("↓", "↓ lower is better."),
        ("↑", "↑ higher is better."),
    ]
    meanings = " ".join(text for word, text in shown if word in titles)
    about = summary.get("about") or {}
    return ([meanings] if meanings else []) + [f"{name}: {remark}." for name, remark in about.items()]


def _lengths(summary: Mapping[str, Any]) -> Table:
    rows = []
    for name in summary["models"]:
        short, long = summary["macro"][name]["short"], summary["macro"][name]["long"]
        if short and long:
            rows.append([name, _cell(short["loss"], "{:.3f}"), _cell(long["loss"], "{:.3f}")])
    if not rows:
        return [], []
    first = summary["macro"][summary["models"][0]]
    counts = [f"{kind}: loss ↓ ({counted(first[kind]['datasets'], 'dataset')})" for kind in ("short", "long")]
    return ["model", *counts], rows


def _section(title: str, table: Table) -> list[str]:
    return ["", f"## {title}", "", *_markdown_table(table)] if table[1] else []


def _markdown_table(table: Table) -> list[str]:
    header, rows = table
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" + "---:|" * (len(header) - 1)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def render(folder: Path) -> list[RenderableType]:
    """What a terminal shows of a finished evaluation, see :func:`terminal`.

    Args:
        folder: The evaluation's folder, with ``summary.json``.

    Raises:
        RunFolderError: ``summary.json`` is missing or damaged.
    """
    return terminal(read_json(folder / "summary.json"))


def terminal(summary: Mapping[str, Any]) -> list[RenderableType]:
    """The overview, what its columns mean, remarks on models, the verdict; readable from 80 columns on."""
    from rich.padding import Padding
    from rich.table import Table as RichTable
    from rich.text import Text

    header, rows = overview(summary)
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(header):  # a word per line: rich would cut figures to fit long titles in 80 columns
        lines = title.replace(" ", "\n").replace("\n↓", " ↓").replace("\n↑", " ↑")
        table.add_column(lines, justify="right" if index else "left", no_wrap=True, vertical="bottom")
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if row[0] == "merged" else None)
    notes = [Text(note, style="dim") for note in legend(summary)]
    sentences = [Text(f"• {sentence}") for sentence in summary["verdict"]]
    return [Padding(table, (1, 0)), *notes, "", *sentences]
