"""A study's cost and tables: on the terminal, as Markdown, CSV, LaTeX and JSON. It computes only means and deviations."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import RenderableType
from rich.table import Table as RichTable

from merit.files import write_text
from merit.progress import duration, size
from merit.report.plots import write_plots
from merit.study.compare import equal_learning
from merit.study.cost import Cost
from merit.study.figures import Column, Difference, Place, StudyResult, Surgery

__all__ = ["cost_tables", "csv_text", "latex", "markdown", "render", "tables", "write"]

Table = tuple[list[str], list[list[str]]]
"""Header and rows, all text; the first column is a name."""

TITLES: dict[Column, str] = {
    "learned": "learned ↓",
    "kept": "kept ↓",
    "unseen": "unseen ↓",
    "learned_match": "learned, exact ↑",
    "kept_match": "kept, exact ↑",
    "unseen_match": "unseen, exact ↑",
    "drift": "drift ↓",
}
"""Other columns are benchmark scores, and named by task and metric."""
_NONE = "–"
_LEGEND = (
    "learned, kept, unseen: mean over datasets of the held-out loss, nats per target token, on the mixture's test rows, on "
    "what the base could do, and on tasks that nobody trains on; exact: share of greedy answers that match; drift: from the "
    "base, nats per token; other columns: scores of benchmark suites. Mean ± standard deviation over seeds."
)
_ABOUT_SURGERY = (
    "What PCGrad takes at a step over all datasets of the mixture (GradNorm: the same without projections); where a step "
    "has fewer rows than there are datasets, only those with rows in it are worked on. The second line is the paper's count "
    "(§5), which makes that more than 17 days per epoch."
)
_ABOUT_P = (
    "p: one-sided Wilcoxon signed-rank test over seeds that the method is better than the baseline; Holm: corrected for all "
    "methods and columns of the table; brackets: 95 % bootstrap interval over seeds."
)


def cost_tables(cost: Cost) -> list[RenderableType]:
    """What a study will cost."""
    table = RichTable(title=f"Cost of the study, {cost.seeds} seeds", title_justify="left")
    for title in ("branches of", "branches", "steps", "tokens", "left"):
        table.add_column(title, justify="left" if title == "branches of" else "right")
    for item in cost.items:
        numbers = (item.branches, item.steps, item.tokens, item.left)
        table.add_row(item.source, *(f"{number:,}" for number in numbers))
    left = sum(item.left for item in cost.items)
    table.add_row(
        "all", f"{sum(item.branches for item in cost.items):,}", *(f"{n:,}" for n in (cost.steps, cost.tokens, left))
    )
    said = (
        f"About {duration(cost.seconds)} of training and gradients with {cost.jobs} in parallel "
        f"({1e6 * cost.seconds_per_token:,.0f} µs per token, from {cost.note}); then {cost.models:,} models are measured on "
        f"held-out rows, most of them at {cost.points} points of their lines. {size(cost.disk_bytes)} of disk."
        + (" Not in the time: what gradient surgery adds to a step." if cost.surgery else "")
        + (f" Not in the time: {cost.searches} searches of weights." if cost.searches else "")
    )
    return [table, said, *([_rich("Gradient surgery", _ABOUT_SURGERY, _surgery(cost.surgery))] if cost.surgery else [])]


# ---- tables ---------------------------------------------------------------------------------------------------------


def overview(result: StudyResult) -> Table:
    """Methods × columns, mean ± sd over seeds."""
    columns = result.columns()
    rows = []
    for method in result.methods:
        runs = result.of(method)
        values = [[run.values[column] for run in runs if column in run.values] for column in columns]
        tokens = fmean(run.target_tokens for run in runs)
        rows.append([method, *map(_mean_sd, values), f"{tokens:,.0f}"])
    return ["method", *map(_title, columns), "target tokens"], rows


def equal(result: StudyResult) -> Table:
    """Methods × kept and unseen loss at the own method's learned loss, mean ± sd over the seeds that reach it."""
    found = equal_learning(result.runs, result.own)
    columns: tuple[Column, ...] = tuple(c for c in ("kept", "unseen") if any(c in v for v in found.values()))
    rows = []
    for method in result.methods:
        if not columns or all(run.line is None for run in result.of(method)):
            continue
        mine = [found[method, seed] for seed in result.seeds if (method, seed) in found]
        rows.append([method, *(_mean_sd([v[c] for v in mine]) for c in columns), f"{len(mine)} of {len(result.seeds)}"])
    return ["method", *map(_title, columns), "seeds that reach it"], rows


def differences(result: StudyResult, place: Place, *, short: bool = False) -> Table:
    """Methods × columns, difference from the baseline; unless ``short`` with its interval and p-values."""
    items = [item for item in result.differences if item.place == place]
    columns = [column for column in result.columns() if any(item.column == column for item in items)]
    rows = []
    for method in result.methods:
        mine = {item.column: item for item in items if item.method == method}
        if mine:
            rows.append([method, *(_difference(mine.get(column), short=short) for column in columns)])
    return ["method", *map(_title, columns)], rows


def _surgery(count: Surgery) -> Table:
    """Ours and the paper's."""
    paper = Surgery(136, 3_000_000_000, 136, 9180, 816 * 10**9)
    rows = [
        [name, *(f"{n:,}" for n in (item.datasets, item.parameters, item.backward, item.projections)), size(item.bytes)]
        for name, item in (("this base and mixture", count), ("3B, 136 datasets", paper))
    ]
    return ["of", "datasets", "trained parameters", "backward passes", "projections", "gradients in fp16"], rows


def _title(column: Column) -> str:
    return TITLES.get(column, f"{column} ↑")


def _mean_sd(values: Sequence[float]) -> str:
    if not values:
        return _NONE
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _difference(item: Difference | None, *, short: bool) -> str:
    if item is None:
        return _NONE
    if short:
        return f"{item.mean:+.3f} ({item.wins}/{item.seeds})"
    between = "" if item.ci95 is None else f" [{item.ci95[0]:+.3f}, {item.ci95[1]:+.3f}]"
    return f"{item.mean:+.3f}{between} p {item.p:.3f} (Holm {item.p_holm:.3f}), {item.wins}/{item.seeds}"


def tables(result: StudyResult, *, short: bool = False) -> list[tuple[str, str, Table]]:
    """Title, note, header and rows of every table that has rows; ``short`` leaves intervals and p-values out."""
    baseline, own = result.baseline, result.own
    about = "In brackets: seeds in which the method is better. Intervals and p-values: table.md." if short else _ABOUT_P
    chosen = [
        (f"Methods, {len(result.seeds)} seeds", _LEGEND, overview(result)),
        (
            f"At equal learning: at {own}'s learned loss of the same seed",
            "Every method is read off along its line θ0 + λ(θ̄ − θ0), where it first reaches that loss; joint's line is "
            "WiSE-FT.",
            equal(result),
        ),
        (f"Differences from {baseline}", about, differences(result, "end", short=short)),
        (f"Differences from {baseline} at equal learning", about, differences(result, "equal", short=short)),
    ]
    if result.surgery is not None:
        chosen.append(("Gradient surgery", _ABOUT_SURGERY, _surgery(result.surgery)))
    return [item for item in chosen if item[2][1]]


def render(result: StudyResult) -> list[RenderableType]:
    """Verdict and tables for the terminal."""
    shown: list[RenderableType] = [result.verdict[0], ""]
    shown += [_rich(*item) for item in tables(result, short=True)]
    return [*shown, *result.verdict[1:]]


def _rich(title: str, note: str, content: Table) -> RichTable:
    table = RichTable(title=title, title_justify="left", caption=note, caption_justify="left")
    for number, name in enumerate(content[0]):
        table.add_column(name, justify="right" if number else "left")
    for row in content[1]:
        table.add_row(*row)
    return table


def markdown(result: StudyResult) -> str:
    """Verdict and all tables as one page."""
    lines = [result.verdict[0], "", f"# Study: {result.name}"]
    for title, note, (header, rows) in tables(result):
        lines += ["", f"## {title}", "", note, "", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *result.verdict[1:], ""])


def csv_text(result: StudyResult) -> str:
    """One line per method and seed, with every column."""
    columns = result.columns()
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "seed", *columns, "scale", "displacement", "target_tokens", "tokens"])
    for run in result.runs:
        moved = "" if run.line is None else run.line.displacement
        values = [run.values.get(column, "") for column in columns]
        writer.writerow([run.method, run.seed, *values, run.scale, moved, run.target_tokens, run.tokens])
    return stream.getvalue()


def latex(result: StudyResult) -> str:
    """The overview as a LaTeX table (booktabs)."""
    header, rows = overview(result)
    marks = {
        "_": r"\_",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "±": r"$\pm$",
        "–": "--",
        "%": r"\%",
        "@": "@",
        "λ": r"$\lambda$",
    }

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(marks.get(sign, sign) for sign in cell) for cell in cells) + r" \\"

    body = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", line(header), r"\midrule"]
    body += [line(row) for row in rows]
    comment = f"% {result.name}: {len(result.seeds)} seeds, mean and standard deviation. Needs the package booktabs."
    return "\n".join([comment, *body, r"\bottomrule", r"\end{tabular}", ""])


def write(result: StudyResult, folder: Path, note: Callable[[str], None]) -> None:
    """Write ``table.md``, ``table.csv``, ``table.tex`` and the plots next to ``study.json``.

    Args:
        result: A finished study.
        folder: Its ``study`` folder.
        note: Is told what could not be written.
    """
    write_text(folder / "table.md", markdown(result))
    write_text(folder / "table.csv", csv_text(result))
    write_text(folder / "table.tex", latex(result))
    write_plots(result, folder, note)


def facts(result: StudyResult, folder: Path) -> dict[str, Any]:
    """The answer for scripts: verdict and means; the whole is in study.json."""
    means = {
        method: {
            column: fmean(run.values[column] for run in result.of(method))
            for column in result.columns()
            if all(column in run.values for run in result.of(method))
        }
        for method in result.methods
    }
    return {"study": str(folder), "verdict": list(result.verdict), "seeds": list(result.seeds), "means": means}
