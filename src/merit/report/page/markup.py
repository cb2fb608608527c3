"""HTML that cannot be broken by what it shows: text is escaped unless a function of this module made it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = [
    "Cell", "Html",
    "Row", "details", "figure", "join", "notes", "number", "page_data", "paragraph", "section", "table", "tag",
]  # fmt: skip


class Html(str):
    """Finished markup; every other text is escaped when it is put into a tag."""

    __slots__ = ()


Child = str | Html | None
_VOID = frozenset({"br", "img", "meta", "input", "circle", "rect", "line", "path", "polyline", "polygon"})
_DASH = "–"


def tag(element: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element. In attribute names ``_`` stands for ``-``, a trailing one is dropped; None and False: absent."""
    shown = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        text = key.rstrip("_").replace("_", "-")
        shown.append(text if value is True else f'{text}="{escape(_plain(value))}"')
    opening = f"<{' '.join([element, *shown])}"
    if element in _VOID and not children:
        return Html(f"{opening}/>")
    return Html(f"{opening}>{join(children)}</{element}>")


def join(children: Iterable[Child]) -> Html:
    """Markup and text one after another; text is escaped."""
    return Html(
        "".join(item if isinstance(item, Html) else escape(_clean(item)) for item in children if item is not None)
    )


def _plain(value: str | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _clean(str(value))


def _clean(text: str) -> str:
    """Text without control characters, which HTML does not allow."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text)


def paragraph(*children: Child, class_: str | None = None) -> Html:
    """A paragraph."""
    return tag("p", *children, class_=class_)


def notes(texts: Iterable[str]) -> Html:
    """A list of remarks; nothing if there are none."""
    items = [tag("li", text) for text in texts]
    return tag("ul", *items, class_="notes") if items else Html("")


def section(key: str, title: str, *children: Child) -> Html:
    """A section with its heading; ``key`` is its address in the page."""
    return tag("section", tag("h2", title, id=f"{key}-title"), *children, id=key, aria_labelledby=f"{key}-title")


def details(summary: str, *children: Child, open_: bool = False) -> Html:
    """Something that is folded away until it is asked for."""
    return tag("details", tag("summary", summary), *children, open=open_)


@dataclass(frozen=True)
class Cell:
    """A table cell: what is shown, and what it sorts by.

    Attributes:
        text: Shown.
        value: Sorts; None sorts last.
        mark: ``good`` or ``bad``: said by an arrow next to the figure, never by colour alone.
    """

    text: str | Html
    value: float | str | None = None
    mark: str = ""


Row = list[Cell | str | Html]
"""Cells of one row of a table."""

_ARROWS = {"good": ("▲", "better"), "bad": ("▼", "worse")}


def number(value: float | None, form: str = "{:.3f}", mark: str = "") -> Cell:
    """A figure in a table; None and NaN are a dash."""
    if value is None or value != value:
        return Cell(_DASH)
    return Cell(form.format(value), value, mark)


def table(
    key: str,
    caption: str,
    header: Sequence[str],
    rows: Sequence[Row],
    *,
    most: int | None = None,
) -> Html:
    """A table that sorts by any column and saves as CSV. The first column is the row's name.

    Args:
        key: Its id, and the name of the saved file.
        caption: What it shows.
        header: Column titles.
        rows: Cells; plain text sorts as text.
        most: Height in rows above which it scrolls.
    """
    figures = [column > 0 and all(_is_figure(row[column]) for row in rows) for column in range(len(header))]
    head = [
        tag("th", tag("button", title, type="button", class_="sort"), scope="col", aria_sort="none", class_=kind)
        for title, kind in zip(header, ("number" if right else None for right in figures), strict=True)
    ]
    body = [tag("tr", *(_cell(cell, first=not index) for index, cell in enumerate(row))) for row in rows]
    long = most is not None and len(rows) > most
    grid = tag(
        "table", tag("caption", tag("span", caption)), tag("thead", tag("tr", *head)), tag("tbody", *body), id=key
    )
    save = tag(
        "button", "CSV", type="button", class_="save", data_csv=key, aria_label=f"Save the table {caption} as CSV"
    )
    around = tag(
        "div",
        grid,
        class_="scroll tall" if long else "scroll",
        tabindex="0",
        role="region",
        aria_label=f"Table: {caption}",
    )
    return tag("div", around, tag("div", save, class_="tools"), class_="table")


def _is_figure(cell: Cell | str | Html) -> bool:
    return isinstance(cell, Cell) and (isinstance(cell.value, int | float) or cell.text == _DASH)


def _cell(cell: Cell | str | Html, *, first: bool) -> Html:
    if not isinstance(cell, Cell):
        cell = Cell(cell)
    sorts = None if cell.value is None else f"{cell.value:.10g}" if isinstance(cell.value, float) else str(cell.value)
    text: list[Child] = [cell.text]
    if cell.mark:
        arrow, word = _ARROWS[cell.mark]
        text += [" ", tag("span", arrow, class_=cell.mark, role="img", aria_label=word)]
    kind = "number" if _is_figure(cell) else None
    if first:
        return tag("th", *text, scope="row", data_v=sorts)
    return tag("td", *text, class_=kind, data_v=sorts)


def figure(key: str, title: str, drawing: Html, note: Child = None, *, cells: bool = False) -> Html:
    """A drawing with its caption, and buttons that save it as SVG and PNG; a heatmap (``cells``) also as CSV."""
    buttons = (
        [
            tag(
                "button",
                "CSV",
                type="button",
                class_="save",
                data_cells=key,
                aria_label=f"Save the figures of {title} as CSV",
            )
        ]
        if cells
        else []
    )
    buttons += [
        tag("button", kind, type="button", class_="save", data_figure=key, data_kind=kind.lower(),
            aria_label=f"Save the figure {title} as {kind}")
        for kind in ("SVG", "PNG")
    ]  # fmt: skip
    words = [tag("strong", title), *([" ", note] if note else [])]
    caption = tag("figcaption", *words)
    around = tag("div", drawing, class_="scroll", tabindex="0", role="region", aria_label=f"Figure: {title}")
    return tag("figure", caption, around, tag("div", *buttons, class_="tools"), id=key)


def page_data(key: str, value: Mapping[str, object]) -> Html:
    """Data for the page's script; no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    safe = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Html(f'<script type="application/json" id="{escape(key)}">{safe}</script>')
