"""The groups: how balanced they are, who is in them, what they have in common."""

from __future__ import annotations

import numpy as np

from merit.conflict.result import Geometry
from merit.report.page import charts
from merit.report.page.data import RunData
from merit.report.page.markup import Cell, Html, Row, figure, join, notes, number, paragraph, section, table


def build(data: RunData) -> Html:
    """Balance in samples and tokens, members, cosines within and across."""
    split = data.own.split
    if split is None:
        return section("groups", "Groups", paragraph("The mixture is not split yet."))
    counts = {item.name: item for item in data.counts}
    rows: list[Row] = []
    shared: list[Row] = []
    samples, tokens = [], []
    for k, group in enumerate(split.groups):
        known = [counts[name] for name in group if name in counts]
        samples.append((f"group {k}", float(sum(item.rows for item in known))))
        tokens.append((f"group {k}", float(sum(item.tokens for item in known))))
        inside, across = _cosines(data.geometry, group)
        targets = sum(item.target_tokens for item in known)
        members: list[str | Html] = []
        for name in group:
            members += [", "] if members else []
            members.append(f"{name}?" if name in split.open else name)
        rows.append(
            [
                Cell(f"group {k}", k),
                number(len(group), "{:,}"),
                number(samples[-1][1], "{:,.0f}"),
                number(tokens[-1][1], "{:,.0f}"),
                number(targets, "{:,}"),
                number(targets / samples[-1][1] if samples[-1][1] else None, "{:,.1f}"),
                number(inside),
                number(across),
            ]
        )
        shared.append([Cell(f"group {k}", k), _typical(data.geometry, group) or "–", Cell(join(members), group[0])])
    header = (
        *("group", "datasets", "rows", "tokens", "target tokens", "target tokens per row", "cosine within"),
        "cosine across",
    )
    parts = [
        paragraph(
            f"Split by {split.method} into {len(split.groups)} groups, balanced by {split.balance}. Cosine within: mean "
            "over the pairs of the group; across: with all other datasets. Most typical: the member with the highest mean "
            "cosine to the others."
        ),
        table("groups-table", "The groups", header, rows),
        table("members", "Members of the groups", ("group", "most typical", "members"), shared),
    ]
    if split.open:
        parts.append(paragraph("? Another calibration sample may move this dataset to another group.", class_="small"))
    if len(split.groups) > 1 and counts:
        for key, word, items in (("rows", "rows", samples), ("tokens", "tokens", tokens)):
            equal = sum(value for _, value in items) / len(items)
            drawing = charts.bars(
                f"Training {word} per group", items, f"{word}; dashed: an equal share", form="{:,.0f}", mark=equal
            )
            parts.append(figure(f"balance-{key}", f"Training {word} per group", drawing))
    return section("groups", "Groups", *parts, notes(split.warnings))


def _typical(geometry: Geometry | None, group: list[str]) -> str | None:
    """The member whose gradient is most like those of the others; None in a group of fewer than three."""
    place = {name: i for i, name in enumerate(geometry.names)} if geometry is not None else {}
    own = [name for name in group if name in place]
    if geometry is None or len(own) < 3:
        return None
    index = [place[name] for name in own]
    return own[int(np.argmax(geometry.cosine[np.ix_(index, index)].sum(axis=1)))]


def _cosines(geometry: Geometry | None, group: list[str]) -> tuple[float | None, float | None]:
    if geometry is None:
        return None, None
    place = {name: i for i, name in enumerate(geometry.names)}
    own = [place[name] for name in group if name in place]
    other = sorted(set(place.values()) - set(own))
    inside = geometry.cosine[np.ix_(own, own)]
    pairs = inside[np.triu_indices(len(own), 1)]
    across = geometry.cosine[np.ix_(own, other)]
    return (float(pairs.mean()) if pairs.size else None), (float(across.mean()) if across.size else None)
