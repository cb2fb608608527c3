"""The conflict stage's results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table

from merit.conflict.compare import Comparison
from merit.conflict.result import Geometry
from merit.conflict.spectrum import Concentration


def render(geometry: Geometry, comparison: Sequence[Comparison] | None = None) -> list[RenderableType]:
    """Per-dataset table, a summary of the geometry, and the comparison of representations if there is one."""
    summary = geometry.summary
    titles = ("dataset", "sample", "rows", "loss", "norm", "relia-\nbility", "expected\ncosine")
    table = _table("gradients at the base", titles)
    for item in geometry.datasets:
        cells = (item.loss_per_token, item.norm, item.reliability, item.expected_cosine)
        table.add_row(item.name, f"{item.examples:,}", f"{item.rows:,}", *map(_number, cells))
    lines: list[RenderableType] = [
        table,
        "sample: examples drawn from the dataset's rows; expected cosine: between this gradient and that of all these rows; "
        "reliability: agreement of the quarter samples, extrapolated to the whole sample.",
    ]
    if summary.most_conflicting:  # two datasets or more
        shares = ", ".join(f"{share:.0%}" for share in summary.explained_variance[:3])
        lines.append(
            f"cosines: {summary.cosine.min:.2f} to {summary.cosine.max:.2f}, mean {summary.cosine.mean:.2f}; "
            f"{summary.negative_share:.0%} of the pairs are negative. Variance on the first axes: {shares}.",
        )
        worst = "; ".join(f"{p.a} / {p.b} {p.cosine:.2f}" for p in summary.most_conflicting[:3])
        lines.append(f"most conflicting: {worst}")
    if summary.spectral_concentration:
        lines.append(_axes(summary.spectral_concentration))
        lines.append(
            "signal: share of a cut's gain confirmed on examples that did not choose it; null: the largest in mixtures "
            "without conflict, generated from the measured noise."
        )
    lines.append(f"suggested axes: {summary.suggestion}")
    lines += [f"[yellow]note:[/] {warning}" for warning in summary.warnings]
    lines += [f"[yellow]left out:[/] {why}" for why in summary.left_out.values()]
    if comparison:
        lines.append(_comparison(comparison))
    return lines


def _axes(concentration: Sequence[Concentration]) -> Table:
    """Every figure, with the value it reaches without conflict."""
    titles = (
        "axis",
        "signal",
        "null",
        "balanced\nratio",
        "null",
        "sign-cut\nratio",
        "null",
        "ratio on\nother examples",
    )
    table = _table("cuts along principal axes, against chance", titles)
    for item in concentration:
        figures = (item.signal, item.signal_null, item.ratio, item.ratio_null, item.sign_cut_ratio)
        table.add_row(str(item.axis), *map(_number, (*figures, item.sign_cut_ratio_null, item.held_out_ratio)))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    """A table without frame, so that dataset names of 20 characters fit into 80 columns; figures flush right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _comparison(rows: Sequence[Comparison]) -> Table:
    titles = ("representation", "setting", "bytes per\ndataset", "Pearson", "Spearman", "MAE", "RMSE")
    table = _table("cosines against exact gradients", titles)
    for row in rows:
        found = row.agreement
        figures = (f"{value:.5f}" for value in (found.pearson, found.spearman, found.mae, found.rmse))
        table.add_row(row.representation, str(row.setting), f"{row.bytes:,}", *figures)
    return table


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"
