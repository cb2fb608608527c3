"""`merit split` on the terminal: the groups."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from merit.split.result import Split


def render(split: Split) -> list[RenderableType]:
    """The groups of a split."""
    table = Table("group", split.balance, "datasets", title=f"{split.method} split", title_justify="left")
    for k, (group, weight) in enumerate(zip(split.groups, split.weights, strict=True)):
        table.add_row(str(k), f"{weight:,.0f}", ", ".join(group))
    return [table]
