"""What to use, and how sure that is: the first thing on the page."""

from __future__ import annotations

from collections.abc import Sequence

from merit.evaluation.calls import Comparison
from merit.evaluation.figures import Difference, Metric, Part
from merit.report import evaluation
from merit.report.page.data import RunData
from merit.report.page.markup import Cell, Html, Row, details, join, notes, number, paragraph, section, table, tag

_PARTS = {"mixture": "learned", "kept": "kept", "unseen": "unseen"}
_MARKS = {"better": "good", "worse": "bad"}


def build(data: RunData) -> Html:
    """The verdict's first sentence, the overview of all models, the other sentences; of a study alone its first sentence."""
    if data.evaluation is None and data.study is not None:
        return section("verdict", "Verdict", paragraph(data.study.verdict[0], class_="verdict"))
    if data.evaluation is None:
        text = "Nothing is measured yet: the run has no finished evaluation."
        return section(
            "verdict",
            "Verdict",
            paragraph(text, class_="verdict"),
            paragraph("merit evaluate RUN measures every model."),
        )
    summary = data.evaluation.summary
    first, *others = data.evaluation.verdict.sentences
    header, rows = evaluation.overview(summary)
    cells: list[Row] = [[row[0], *(number(_value(cell), _form(cell)) for cell in row[1:])] for row in rows]
    return section(
        "verdict",
        "Verdict",
        paragraph(first, class_="verdict"),
        table("overview", "All models: learned, kept, unseen", header, cells),
        join([paragraph(note, class_="small") for note in evaluation.legend(summary)]),
        _compared(data.evaluation.verdict.comparisons),
        details("How sure is that, in words", notes(others)),
    )


def _compared(found: Sequence[Comparison]) -> Html:
    """Merged minus every other model, measure by measure; nothing if there is nothing to compare with."""
    measures = list(dict.fromkeys((item.part, item.metric) for one in found for item in one.differences))
    if not measures:
        return Html("")
    by_model = [{(item.part, item.metric): item for item in one.differences} for one in found]
    rows: list[Row] = [
        [_name(part, metric), *(_difference(items.get((part, metric))) for items in by_model)]
        for part, metric in measures
    ]
    note = (
        "Merged minus the other model, mean over datasets (drift: over answers), with the measure's own 95 % interval. "
        "▲ merged is better, ▼ worse, corrected for the number of measures of a comparison (any false call: at most 5 %); "
        "without an arrow there is no clear difference, or too little to compare."
    )
    header = ("merged minus ...", *(one.other for one in found))
    return join([table("compared", "How sure is that?", header, rows), paragraph(note, class_="small")])


def _name(part: Part, metric: Metric) -> str:
    if metric == "drift":
        return "drift ↓"
    return f"{_PARTS[part]} {metric.replace('_', ' ')} {'↓' if metric == 'loss' else '↑'}"


def _difference(item: Difference | None) -> Cell:
    if item is None:
        return number(None)
    form = "{:+.4f}" if item.metric == "drift" else "{:+.3f}"
    ends = "no interval" if item.ci95 is None else f"{form.format(item.ci95[0])} to {form.format(item.ci95[1])}"
    shown = join([form.format(item.difference), tag("span", f" {ends}", class_="interval")])
    return Cell(shown, item.difference, _MARKS.get(item.outcome, ""))


def _value(cell: str) -> float | None:
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return None


def _form(cell: str) -> str:
    if "," in cell or "." not in cell:
        return "{:,.0f}"
    return f"{{:.{len(cell.partition('.')[2])}f}}"
