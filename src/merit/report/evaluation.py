"""An evaluation's tables and verdict, for the terminal and as one Markdown page. It computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from merit.evaluation.figures import Average, Averages, ByDataset, Metric, Summary
from merit.evaluation.results import Evaluation
from merit.evaluation.verdict import counted

__all__ = ["dataset_table", "legend", "markdown", "overview", "render", "terminal"]

Table = tuple[list[str], list[list[str]]]
"""Header and rows, all text; the first column is a name."""

_NONE = "–"


def _loss(average: Average | None) -> float | None:
    return None if average is None else average.loss


def _match(average: Average | None) -> float | None:
    return None if average is None else average.exact_match


_COLUMNS: tuple[tuple[str, Callable[[Averages], float | None], str], ...] = (
    ("learned loss ↓", lambda a: _loss(a.mixture), "{:.3f}"),
    ("learned exact match ↑", lambda a: _match(a.mixture), "{:.3f}"),
    ("kept loss ↓", lambda a: _loss(a.kept), "{:.3f}"),
    ("kept exact match ↑", lambda a: _match(a.kept), "{:.3f}"),
    ("unseen loss ↓", lambda a: _loss(a.unseen), "{:.3f}"),
    ("unseen exact match ↑", lambda a: _match(a.unseen), "{:.3f}"),
    ("drift ↓", lambda a: None if a.drift is None else a.drift.kl, "{:.4f}"),
    ("target tokens", lambda a: a.trained_target_tokens, "{:,}"),
)


def overview(summary: Summary) -> Table:
    """Models × learned, kept, unseen, training tokens; columns that no model has are left out."""
    averages = summary.macro
    columns = [c for c in _COLUMNS if any(c[1](averages[name]) is not None for name in summary.models)]
    rows = [[name, *(_cell(value(averages[name]), form) for _, value, form in columns)] for name in summary.models]
    return ["model", *(title for title, _, _ in columns)], rows


def dataset_table(figures: Mapping[str, ByDataset], models: Sequence[str], metric: Metric) -> Table:
    """Datasets × models for one metric, with the rows measured; datasets where no model has it are left out.

    Args:
        figures: By model and dataset.
        models: Column order.
        metric: ``loss`` or ``exact_match``.
    """
    names = list(dict.fromkeys(name for model in models for name in figures.get(model, {})))
    rows = []
    for name in names:
        found = [figures.get(model, {}).get(name) for model in models]
        values = [None if item is None else item.loss if metric == "loss" else item.exact_match for item in found]
        if any(value is not None for value in values):
            examples = next(item.examples for item in found if item)
            rows.append([name, f"{examples:,}", *(_cell(value, "{:.3f}") for value in values)])
    return ["dataset", "rows", *models], rows


def _cell(value: float | None, form: str) -> str:
    return _NONE if value is None else form.format(value)


def markdown(evaluation: Evaluation) -> str:
    """The whole evaluation as one Markdown page: overview, verdict, answer lengths, every dataset."""
    summary, models = evaluation.summary, evaluation.summary.models
    lines = ["# Evaluation", "", *_markdown_table(overview(summary))]
    for note in legend(summary):
        lines += ["", note]
    lines += ["", "## Verdict", "", *(f"- {sentence}" for sentence in evaluation.verdict.sentences)]
    lines += _section("Mixture by answer length", _lengths(summary))
    parts = {"Mixture": evaluation.results, "Kept": evaluation.kept, "Unseen": evaluation.unseen}
    for title, figures in parts.items():
        lines += _section(f"{title}: loss ↓ (nats per target token)", dataset_table(figures, models, "loss"))
        lines += _section(f"{title}: exact match ↑", dataset_table(figures, models, "exact_match"))
    return "\n".join(lines) + "\n"


def legend(summary: Summary) -> list[str]:
    """The notes under the overview: what its columns mean, then remarks on models."""
    titles = " ".join(overview(summary)[0])
    shown = [
        ("learned", "Learned: the mixture's test rows."),
        ("kept", "Kept: what the base could already do."),
        ("unseen", "Unseen: tasks that nobody trains on."),
        ("loss", "Loss: nats per target token, mean over datasets (macro)."),
        ("exact match", "Exact match: share of rows, mean over datasets (macro)."),
        ("drift", "Drift: mean KL(base‖model) in nats per token on the base's own sampled answers."),
        ("target tokens", "Target tokens: those that the model was trained on, all epochs."),
        ("↓", "↓ lower is better."),
        ("↑", "↑ higher is better."),
    ]
    meanings = " ".join(text for word, text in shown if word in titles)
    return ([meanings] if meanings else []) + [f"{name}: {remark}." for name, remark in summary.about.items()]


def _lengths(summary: Summary) -> Table:
    rows, counts = [], (0, 0)
    for name in summary.models:
        short, long = summary.macro[name].short, summary.macro[name].long
        if short and long:
            counts = short.datasets, long.datasets
            rows.append([name, f"{short.loss:.3f}", f"{long.loss:.3f}"])
    if not rows:
        return [], []
    titles = [f"{kind}: loss ↓ ({counted(n, 'dataset')})" for kind, n in zip(("short", "long"), counts, strict=True)]
    return ["model", *titles], rows


def _section(title: str, table: Table) -> list[str]:
    return ["", f"## {title}", "", *_markdown_table(table)] if table[1] else []


def _markdown_table(table: Table) -> list[str]:
    header, rows = table
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" + "---:|" * (len(header) - 1)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def render(folder: Path) -> list[RenderableType]:
    """The finished evaluation in ``folder`` for the terminal, see :func:`terminal`.

    Raises:
        RunFolderError: One of its files is missing or damaged.
    """
    return terminal(Evaluation.load(folder))


def terminal(evaluation: Evaluation) -> list[RenderableType]:
    """The overview, what its columns mean, remarks on models, the verdict; readable at 80 columns or more."""
    header, rows = overview(evaluation.summary)
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(header):  # a word per line: rich would cut figures to fit long titles in 80 columns
        lines = title.replace(" ", "\n").replace("\n↓", " ↓").replace("\n↑", " ↑")
        table.add_column(lines, justify="right" if index else "left", no_wrap=True, vertical="bottom")
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if row[0] == "merged" else None)
    notes = [Text(note, style="dim") for note in legend(evaluation.summary)]
    sentences = [Text(f"• {sentence}") for sentence in evaluation.verdict.sentences]
    return [Padding(table, (1, 0)), *notes, "", *sentences]
