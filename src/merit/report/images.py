"""The images of a mixture, for the terminal: what there is, and what cannot be used."""

from __future__ import annotations

from collections import Counter

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from merit.mixture.image_check import ImageReport
from merit.progress import count

_SHOWN = 40


def render(report: ImageReport) -> list[RenderableType]:
    """The report as something that rich can print."""
    sizes = Table(
        "dataset",
        "rows",
        "with images",
        "images",
        "different",
        "pixels",
        "bad",
        title="Images",
        title_justify="left",
    )
    for item in report.datasets:
        spread = " / ".join(f"{item.pixels[key]:,}" for key in ("min", "p50", "max")) if item.pixels else "-"
        counts = (item.rows, item.rows_with_images, item.images, item.distinct)
        sizes.add_row(item.name, *(f"{number:,}" for number in counts), spread, f"{sum(item.bad.values()):,}")
    sizes.caption = "pixels: smallest / median / largest, over different images"
    notes = [
        f"[yellow]note:[/] {item.name}: {count(item.renamed, 'image file')} not in the format that the name says (such as "
        f"{escape(item.renamed_first)}): read by content."
        for item in report.datasets
        if item.renamed
    ]
    if not report.bad:
        return [sizes, *notes, "Every image can be used."]
    wrong = Table("dataset", title="Images that cannot be used", title_justify="left")
    for column in ("row", "what is wrong"):
        wrong.add_column(column, overflow="fold")
    for entry in report.bad[:_SHOWN]:
        wrong.add_row(entry.dataset, escape(entry.place), escape(f"{entry.detail} ({entry.reason})"))
    rest = len(report.bad) - _SHOWN
    reasons = Counter(entry.reason for entry in report.bad)
    counted = ", ".join(f"{reason} {times:,}" for reason, times in sorted(reasons.items()))
    lines = [f"{count(len(report.bad), 'image')} cannot be used: {counted}."]
    if rest > 0:
        lines[0] += f" {rest:,} more not shown; --json lists all."
    lines.append(
        "mixture.images.bad is error: a run stops at the first of them. Correct the rows, or set it to drop."
        if report.fatal
        else "mixture.images.bad is drop: their rows are left out and counted."
    )
    return [sizes, wrong, *notes, *lines]
