"""What to use, and how sure that is: the first thing on the page."""

from __future__ import annotations

from merit.report import evaluation
from merit.report.page.data import RunData
from merit.report.page.markup import Html, Row, details, join, notes, number, paragraph, section, table


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
        details("How sure is that?", notes(others), open_=True),
    )


def _value(cell: str) -> float | None:
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return None


def _form(cell: str) -> str:
    if "," in cell or "." not in cell:
        return "{:,.0f}"
    return f"{{:.{len(cell.partition('.')[2])}f}}"
