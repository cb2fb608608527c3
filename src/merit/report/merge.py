"""A merge's result as tables for a terminal."""

from __future__ import annotations

from rich.console import RenderableType
from rich.markup import escape as plain
from rich.table import Table

from merit.merge import MergeResult
from merit.merge.searched import WeightSearch
from merit.merge.weights import ScaleSearch, condense
from merit.progress import count, duration


def render(result: MergeResult) -> list[RenderableType]:
    """Branches with their weights, the curve of the scale if it was searched, and what the user should know."""
    patterns = result.weights_by_pattern
    moved = result.displacements
    columns = ("branch", "weight", *map(plain, patterns), *(("moved by",) if moved else ()))
    table = Table(*columns, title="merged branches", title_justify="left")
    for place, branch in enumerate(result.branches):
        weights = (result.weights[place], *(shares[place] for shares in patterns.values()))
        shown = [f"{weight:.4f}" for weight in weights]
        if moved is not None:
            shown.append(_share(moved.relative(moved.branches[place])))
        table.add_row(plain(branch.name), *shown)
    lines: list[RenderableType] = [table]
    if moved is not None:
        lines.append(f"moved by: ‖θ − θ0‖ over ‖θ0‖; the merged model by {_share(moved.relative(moved.merged))}")
    if result.scale_search is not None:
        lines += _curve(result.scale_search)
    if result.weight_search is not None:
        lines += _searched(result.weight_search)
    lines += [f"[yellow]note:[/] {plain(text)}" for text in condense(result.warnings, len(result.branches))]
    lines.append(f"merged in {duration(result.merge_seconds)}, arithmetic: {result.arithmetic}")
    lines.append(f"Merged model: {plain(str(result.folder))}")
    return lines


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g}%"


def _curve(search: ScaleSearch) -> list[RenderableType]:
    curve = Table("λ", "learned ↓", "kept ↓", "", title="scale search: held-out loss", title_justify="left")
    for point in search.points:
        mark = "← chosen" if point.scale == search.chosen else ""
        curve.add_row(f"{point.scale:g}", f"{point.learned:.4f}", f"{point.kept:.4f}", mark)
    lines: list[RenderableType] = [curve, f"kept: {search.kept}; rule: {search.rule}"]
    if search.rows_shared_with_evaluation:
        shared = count(len(search.rows_shared_with_evaluation), "dataset")
        lines.append(f"[yellow]note:[/] for {shared} λ was chosen on rows that the evaluation also reads.")
    return lines


def _searched(search: WeightSearch) -> list[RenderableType]:
    """What the search found on the rows that did not choose, and the mixture that the weights stand for."""
    said = f"objective: {search.objective}" + ("" if search.objective == "knee" else f", bound {search.bound:g}")
    found = Table("", "learned ↓", "kept ↓", title="weight search", title_justify="left")
    for name, losses in search.reported.items():
        found.add_row(name, f"{losses.learned:.4f}", f"{losses.kept:.4f}")
    mixture = Table(
        "dataset",
        "branch",
        "share",
        "implied",
        "95 %",
        title="mixture that the weights stand for (tokens)",
        title_justify="left",
    )
    for ratio in search.ratios:
        interval = f"{ratio.low:.2%} to {ratio.high:.2%}"
        mixture.add_row(
            plain(ratio.dataset), plain(ratio.branch), f"{ratio.share:.2%}", f"{ratio.implied:.2%}", interval
        )
    lines: list[RenderableType] = [
        found,
        f"{said}; {len(search.points)} points; λ = {search.scale:g}; kept: {search.kept}; chosen on "
        f"{search.rows['choosing']} rows, figures of {search.rows['reporting']} others",
        mixture,
    ]
    if search.left_out:
        lines.append(f"[yellow]note:[/] {len(search.left_out)} datasets have too few different test rows to report on.")
    return lines
