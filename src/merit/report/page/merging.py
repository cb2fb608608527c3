"""The merge: weights of the branches, and the curve from which the scale was chosen."""

from __future__ import annotations

from merit.merge import MergeResult
from merit.merge.weights import condense
from merit.report.page import charts
from merit.report.page.data import RunData
from merit.report.page.markup import Cell, Html, Row, figure, join, notes, number, paragraph, section, table


def build(data: RunData) -> Html:
    """Weights, scale and the searches."""
    merge = data.own.merge
    if merge is None:
        return section("merge", "Merge", paragraph("The branches are not merged yet."))
    text = (
        f"{len(merge.branches)} branches, operator {merge.operator}, scale {merge.scale:g}; weights: {merge.counted}."
    )
    if merge.excluded:
        text += f" Left out: {', '.join(merge.excluded)}."
    parts = [paragraph(text), _weights(merge)]
    if merge.scale_search is not None:
        parts.append(_scale(merge))
    return section("merge", "Merge", *parts, notes(condense(merge.warnings, len(merge.branches))))


def _weights(merge: MergeResult) -> Html:
    items = [(branch.name, weight) for branch, weight in zip(merge.branches, merge.weights, strict=True)]
    equal = 1 / len(items)
    drawing = charts.bars("Weights of the branches", items, "weight; dashed: an equal share", form="{:.3f}", mark=equal)
    rows: list[Row] = [
        [name, number(weight, "{:.4f}"), Cell(f"{count:,}", float(count))]
        for (name, weight), count in zip(items, merge.counts, strict=True)
    ]
    header = ("branch", "weight", merge.counted or "given")
    return join(
        [
            figure("weights", "Weights of the branches", drawing),
            table("weights-table", "Weights of the branches", header, rows),
        ]
    )


def _scale(merge: MergeResult) -> Html:
    search = merge.scale_search
    assert search is not None
    series = charts.Series(
        "scale λ", [p.learned for p in search.points], [p.kept for p in search.points], 0, marks=True
    )
    drawing = charts.lines(
        "Learned against kept along the scale", [series], "loss on the mixture (learned: left)", "loss on kept sets"
    )
    rows: list[Row] = [
        [
            Cell(f"{p.scale:g}" + (" (chosen)" if p.scale == search.chosen else ""), p.scale),
            number(p.learned, "{:.4f}"),
            number(p.kept, "{:.4f}"),
        ]
        for p in search.points
    ]
    grid = table("scales", "Scale search: held-out loss", ("λ", "learned ↓", "kept ↓"), rows)
    words = paragraph(f"Kept is measured by {search.kept}; rule: {search.rule}.", class_="small")
    return join([figure("trade-off", "Learned against kept along the scale", drawing), grid, words])
