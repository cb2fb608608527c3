"""Was the base ready to be merged from? Every diagnostic's verdict, its rule, the figures that decided, its drawing."""

from __future__ import annotations

import base64
from pathlib import Path

from merit.diagnostics.result import Diagnosis
from merit.report.page.data import RunData
from merit.report.page.markup import Cell, Html, Row, details, figure, paragraph, section, table, tag

_MARKS = {"ready": "good", "not ready": "bad"}
_ORDER = {"ready": 0, "doubtful": 1, "not ready": 2}


def build(data: RunData) -> Html:
    """The table of verdicts and the drawings; nothing if the run was not diagnosed."""
    if not data.diagnoses:
        return Html("")
    rows: list[Row] = [
        [result.title, _verdict(result), result.reason, result.rule] for result in data.diagnoses.values()
    ]
    drawings = [_drawing(name, result, data.run / "diagnostics") for name, result in data.diagnoses.items()]
    return section(
        "diagnostics",
        "Merge-readiness",
        paragraph(
            "Whether base, learning rate and split are in the regime that merging needs. A verdict follows from its rule "
            "alone; the thresholds are conventions, not laws."
        ),
        table("diagnoses", "Diagnostics", ("what is looked at", "verdict", "figures", "rule"), rows),
        details("Drawings", *(drawing for drawing in drawings if drawing)),
    )


def _verdict(result: Diagnosis) -> Cell:
    word = tag("strong", result.verdict, class_=_MARKS.get(result.verdict))
    return Cell(word, _ORDER[result.verdict])


def _drawing(name: str, result: Diagnosis, folder: Path) -> Html:
    """The drawing as an image, in which nothing can run; nothing if it was not drawn."""
    file = folder / f"{name}.svg"
    if not file.is_file():
        return Html("")
    source = f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"
    picture = tag("img", src=source, alt=f"{result.title}: {result.reason}", class_="drawing")
    return figure(f"diagnosis-{name}", result.title, picture, f"{result.verdict}: {result.reason}")
