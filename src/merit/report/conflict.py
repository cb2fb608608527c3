"""The conflict stage's results as tables for a terminal. It reads the stage's files and computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merit.files import read_json


def render(folder: Path, comparison: Sequence[Mapping[str, Any]] | None = None) -> list[Any]:
    """Per-dataset table, what the geometry says, and the comparison of representations where there is one.

    Args:
        folder: The conflict stage's folder.
        comparison: From :func:`merit.conflict.compare.compare_representations`.
    """
    summary, datasets = read_json(folder / "summary.json"), read_json(folder / "datasets.json")
    titles = ("dataset", "sample", "rows", "loss", "norm", "relia-\nbility", "expected\ncosine")
    table = _table("gradients at the base", titles)
    for item in datasets:
        cells = (item["loss_per_token"], item["norm"], item["reliability"], item["expected_cosine"])
        table.add_row(item["name"], f"{item['examples']:,}", f"{item['rows']:,}", *map(_number, cells))
    cosine, variance = summary["cosine"], summary["explained_variance"]
    shares = ", ".join(f"{share:.0%}" for share in variance[:3])
    lines = [
        table,
        "sample: examples drawn of the dataset's rows; expected cosine: of this gradient to the one of all these rows; "
        "reliability: of one half sample's to the other's, raised to the whole sample.",
        f"suggested axes: {summary['suggestion']}",
        *(f"[yellow]note:[/] {warning}" for warning in summary["warnings"]),
    ]
    lines += [f"[yellow]left out:[/] {why}" for why in summary["left_out"].values()]
    if summary["most_conflicting"]:  # two datasets or more
        lines.insert(
            2,
            f"cosines: {cosine['min']:.2f} to {cosine['max']:.2f}, mean {cosine['mean']:.2f}; "
            f"{summary['negative_share']:.0%} of the pairs are negative. Variance on the first axes: {shares}.",
        )
        worst = "; ".join(f"{p['a']} / {p['b']} {p['cosine']:.2f}" for p in summary["most_conflicting"][:3])
        lines.insert(3, f"most conflicting: {worst}")
    if comparison:
        lines.append(_comparison(comparison))
    return lines


def _table(title: str, columns: Sequence[str]) -> Any:
    """A table without frame, so that dataset names of 20 characters fit into 80 columns; figures flush right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _comparison(rows: Sequence[Mapping[str, Any]]) -> Any:
    titles = ("representation", "setting", "bytes per\ndataset", "Pearson", "Spearman", "MAE", "RMSE")
    table = _table("cosines against exact gradients", titles)
    for row in rows:
        figures = (f"{row[key]:.5f}" for key in ("pearson", "spearman", "mae", "rmse"))
        table.add_row(row["representation"], str(row["setting"]), f"{row['bytes']:,}", *figures)
    return table


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"
