"""`merit split` on the terminal: the groups."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table


def render(facts: dict[str, Any]) -> list[RenderableType]:
    """The groups of a split."""
    table = Table("group", facts["balance"], "datasets", title=f"{facts['method']} split", title_justify="left")
    for k, (group, weight) in enumerate(zip(facts["groups"], facts["weights"], strict=True)):
        table.add_row(str(k), f"{weight:,.0f}", ", ".join(group))
    return [table]
