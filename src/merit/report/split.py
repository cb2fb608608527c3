"""`merit split` on the terminal: the groups."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from merit.split.result import Split


def render(split: Split) -> list[RenderableType]:
    """The groups of a split; datasets whose group is not stable are marked."""
    table = Table("group", split.balance, "datasets", title=f"{split.method} split", title_justify="left")
    for k, (group, weight) in enumerate(zip(split.groups, split.weights, strict=True)):
        table.add_row(str(k), f"{weight:,.0f}", ", ".join(f"{name}?" if name in split.open else name for name in group))
    if split.stability is None:
        return [table]
    firm = len(split.stability) - len(split.open)
    return [
        table,
        f"stable: {firm} of {len(split.stability)} datasets keep their group in at least nine of ten resampled geometries; "
        "the others (?) are uncertain: another calibration sample may move them.",
    ]
