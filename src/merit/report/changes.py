"""The statement of `merit add` and `merit remove` on the terminal."""

from __future__ import annotations

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from merit.progress import duration
from merit.run.change import Statement


def render(statement: Statement) -> list[RenderableType]:
    """Its sentences, and the records' checksums before and after."""
    table = Table("record", "before", "after", title="Checksums of the records", title_justify="left")
    for folder, (before, after) in statement.retrained.items():
        table.add_row(folder, _short(before), _short(after))
    for folder, checksum in statement.unchanged.items():
        table.add_row(folder, _short(checksum), "the same")
    trained = f"Trained for it: {statement.target_tokens:,} target tokens, {duration(statement.seconds)}."
    return [*(escape(sentence) for sentence in statement.sentences), trained, table]


def _short(checksum: str | None) -> str:
    return checksum[:16] if checksum else "none"
