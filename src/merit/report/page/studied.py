"""A study: methods over seeds, at the end and at equal learning, and their lines of learned against kept and unseen."""

from __future__ import annotations

import re
from collections.abc import Sequence

from merit.report.page import charts
from merit.report.page.data import RunData
from merit.report.page.markup import Cell, Html, Row, figure, notes, paragraph, section, table
from merit.report.plots import mean_lines
from merit.report.study import tables
from merit.study.figures import StudyResult

_AXES = {"kept": "loss on kept sets (kept more: down)", "unseen": "loss on unseen tasks (better: down)"}
_FIRST = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def build(data: RunData) -> Html:
    """Verdict, tables and plots of the study in the run folder; nothing if there is none."""
    result = data.study
    if result is None:
        return Html("")
    parts = [paragraph(result.verdict[0])] if data.evaluation is not None else []
    parts += [notes(result.verdict[1:])]
    parts += [_lines(result, part, title) for part, title in _AXES.items()]
    for number, (title, note, (header, rows)) in enumerate(tables(result)):
        parts += [
            table(f"study-{number}", title, header, [_row(row) for row in rows], most=24),
            paragraph(note, class_="small"),
        ]
    return section("study", "Study", *parts)


def _row(cells: Sequence[str]) -> Row:
    """A table's row; figures sort by their first number."""
    found: Row = [cells[0]]
    for text in cells[1:]:
        first = _FIRST.search(text.replace("−", "-"))
        found.append(Cell(text, float(first[0].replace(",", ""))) if first else Cell(text))
    return found


def _lines(result: StudyResult, part: str, title: str) -> Html:
    lines = mean_lines(result, part)
    if not lines:
        return Html("")
    series = [
        charts.Series(
            method, [learned for _, learned, _ in points], [other for _, _, other in points], number,
            dashed=number >= charts.COLOURS, marks=True,
        )
        for number, (method, points) in enumerate(lines.items())
    ]  # fmt: skip
    drawing = charts.lines(
        f"Learned against {part}", series, "loss on the mixture's test rows (learned more: left)", title
    )
    note = f"Mean of {len(result.seeds)} seeds along the base + λ (model − base)."
    return figure(f"study-{part}", f"Learned against {part}", drawing, note)
