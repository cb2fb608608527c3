"""The merge: weights of the branches, and the curve from which the scale was chosen."""

from __future__ import annotations

from collections.abc import Sequence

from merit.merge import MergeResult
from merit.merge.result import Displacements
from merit.merge.searched import WeightSearch
from merit.merge.weights import condense
from merit.progress import duration, size
from merit.report.page import charts
from merit.report.page.data import RunData
from merit.report.page.markup import Cell, Html, Row, details, figure, join, notes, number, paragraph, section, table
from merit.run.round_stages import RoundLine


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
    parts = [paragraph(text), _weights(merge), _displacements(data, merge)]
    if merge.scale_search is not None:
        parts.append(_scale(merge))
    if merge.weight_search is not None:
        parts.append(_searched(merge.weight_search))
    if data.rounds:
        parts.append(_rounds(data.rounds))
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
            details("Weights, as a table", table("weights-table", "Weights of the branches", header, rows)),
        ]
    )


def _displacements(data: RunData, merge: MergeResult) -> Html:
    """How far every branch, the merge and the baselines lie from the base."""
    own = merge.displacements
    if own is None:
        return paragraph("How far the models moved was not measured by the version that merged them.", class_="small")
    names = [branch.name for branch in merge.branches]
    models = [*((name, own, norm) for name, norm in zip(names, own.branches, strict=True)), ("merged", own, own.merged)]
    for other in data.methods[1:]:
        if other.merge is not None and other.merge.displacements is not None:
            models.append((other.name, other.merge.displacements, other.merge.displacements.merged))
    models += [
        (name, found, found.merged) for name, found in _of_evaluation(data) if name not in dict(m[:2] for m in models)
    ]
    rows: list[Row] = [
        [name, number(norm, "{:.4f}" if norm < 10 else "{:,.1f}"), _share(m.relative(norm))] for name, m, norm in models
    ]
    items = [(name, 100 * (m.relative(norm) or 0.0)) for name, m, norm in models]
    title = "How far the models lie from the base"
    drawing = charts.bars(
        title, items, "‖θ − θ₀‖ in percent of ‖θ₀‖", form="{:.3f}" if max(v for _, v in items) < 1 else "{:.2f}"
    )
    rest = own.rest(merge.weights)
    said = "" if rest is None else f"The merge lies {rest:.2f} × as far out as its branches (their root mean square)"
    joint = next((norm for name, _, norm in models if name == "joint"), None)
    if said and joint is not None and own.merged > 0:
        said += f"; joint training lies {joint / own.merged:.2f} × as far out as the merge"
    header = ("model", "‖θ − θ₀‖", "of ‖θ₀‖")
    return join(
        [
            figure("displacements", title, drawing, f"{said}." if said else None),
            details("Displacements, as a table", table("moved", title, header, rows)),
        ]
    )


def _of_evaluation(data: RunData) -> list[tuple[str, Displacements]]:
    """Of models that no merge made: joint training, as the evaluation recorded it."""
    record = data.records.get("evaluation")
    found = {} if record is None else record.facts.get("displacements", {})
    return [(name, Displacements(facts["base"], (), facts["merged"])) for name, facts in found.items()]


def _share(value: float | None) -> Cell:
    return number(None) if value is None else Cell(f"{100 * value:.3f}%", value)


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


def _searched(search: WeightSearch) -> Html:
    """Every measured point, learned against kept; figures of rows that did not choose; the implied mixture."""
    points = [
        charts.Point(f"λ {p.scale:.2f}, weights {', '.join(f'{c:.2f}' for c in p.coefficients)}", p.learned, p.kept, 0)
        for p in search.points
    ]
    chosen = charts.Point("chosen", search.chosen.learned, search.chosen.kept, 1)
    drawing = charts.scatter(
        "Weight search: every measured point",
        [*points, chosen],
        ("loss on the mixture (learned: left)", "kept (less: better)"),
        ["measured", "chosen"],
        named=False,
    )
    note = f"{search.objective}; kept: {search.kept}; measured on {search.rows['choosing']} rows that chose."
    reported: list[Row] = [
        [name, number(losses.learned, "{:.4f}"), number(losses.kept, "{:.4f}")]
        for name, losses in search.reported.items()
    ]
    title = f"On {search.rows['reporting']} rows that did not choose"
    ratios: list[Row] = [
        [
            ratio.dataset,
            ratio.branch,
            number(ratio.share, "{:.2%}"),
            number(ratio.implied, "{:.2%}"),
            Cell(f"{ratio.low:.2%} to {ratio.high:.2%}", ratio.low),
        ]
        for ratio in search.ratios
    ]
    header = ("dataset", "branch", "share of tokens", "implied by the weights", "95 % interval")
    return join(
        [
            figure("weight-search", "Weight search: every measured point", drawing, note),
            table("weights-reported", title, ("model", "learned ↓", "kept ↓"), reported),
            table("ratios", "The mixture that the weights stand for", header, ratios, most=24),
        ]
    )


def _rounds(lines: Sequence[RoundLine]) -> Html:
    rows: list[Row] = [
        [
            Cell(f"round {line.number}", line.number),
            number(line.merged, "{:,}"),
            Cell(", ".join(map(str, line.missing)) or "none"),
            Cell(size(line.bytes_in), float(line.bytes_in)),
            Cell(size(line.bytes_out), float(line.bytes_out)),
            Cell(duration(line.seconds), line.seconds),
        ]
        for line in lines
    ]
    header = ("round", "merged", "missing", "to the merge", "to the branches", "time")
    return table("rounds", "Rounds: what each moved", header, rows)
