"""Lines, points and bars as SVG. Pure: numbers in, markup out; colours come from the page's style sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merit.report.page.markup import Child, Html, tag

__all__ = ["Line", "Point", "Series", "bars", "chart", "dots", "lines", "scatter", "thin"]

COLOURS = 8
_WIDTH, _HEIGHT = 720, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 12, 48
_SHAPES = 6
_MOST_TICKS = 8
"""Names that fit under an axis."""
_BARS = 540
"""Width of bars: with a length that a phone shows whole, none looks shorter than it is."""


@dataclass(frozen=True)
class Series:
    """One line of a chart: (n,) x and y; ``colour`` counts from 0, ``dashed`` for what it is compared with."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    dashed: bool = False
    marks: bool = False


@dataclass(frozen=True)
class Point:
    """One point of a scatter plot; ``error`` is a half width in x and in y."""

    name: str
    x: float
    y: float
    group: int
    error: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """A straight line from one place to another, in data units."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class _Scale:
    """From data to pixels."""

    low: float
    high: float
    start: float
    stop: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, stop: float, *, pad: float = 0.04) -> _Scale:
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        room = (high - low) * pad or abs(high) * 0.1 or 1.0
        return cls(low - room, high + room, start, stop)

    def __call__(self, value: float) -> float:
        return self.start + (self.stop - self.start) * (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        """About five round numbers."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
        first = math.ceil(self.low / step)
        return [step * k for k in range(first, math.floor(self.high / step) + 1)]


def thin(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most ``count`` equal stretches of (n,) values, and the middle index of each."""
    edges = np.linspace(0, len(values), min(count, len(values)) + 1).astype(int)
    pairs = list(itertools.pairwise(edges))
    return np.array([(a + b - 1) / 2 for a, b in pairs]), np.array([float(np.mean(values[a:b])) for a, b in pairs])


def chart(title: str, *children: Child, width: float = _WIDTH, height: float = _HEIGHT) -> Html:
    """An SVG of fixed proportions whose title is read aloud."""
    return tag(
        "svg",
        tag("title", title),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        class_="chart",
        role="img",
        viewBox=f"0 0 {width:g} {height:g}",
        aria_label=title,
        style=f"min-width:{min(width - 220, 520):g}px;max-width:{width:g}px",
    )


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _text(x: float, y: float, words: str, anchor: str = "middle", **more: str) -> Html:
    return tag("text", words, x=round(x, 1), y=round(y, 1), text_anchor=anchor, **more)


def _axes(xs: _Scale, ys: _Scale, x_title: str, y_title: str, height: float = _HEIGHT) -> list[Html]:
    bottom = height - _BOTTOM
    marks: list[Html] = []
    for value in ys.ticks:
        y = round(ys(value), 1)
        marks += [tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid")]
        marks += [_text(_LEFT - 6, y + 4, _minus(f"{value:.4g}"), "end")]
    for value in xs.ticks:
        x = round(xs(value), 1)
        marks += [
            tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"),
            _text(x, bottom + 18, _minus(f"{value:.4g}")),
        ]
    middle = (_TOP + bottom) / 2
    return [
        *marks,
        tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="axis"),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, height - 8, x_title, class_="title"),
        tag("text", y_title, transform=f"translate(15,{middle:.0f}) rotate(-90)", text_anchor="middle", class_="title"),
    ]


def _legend(names: Sequence[tuple[str, str]], top: float, *, shapes: bool = False) -> tuple[list[Html], float]:
    """Names under a chart, wrapped; each is (name, class). And the height that they take."""
    x, y, found = float(_LEFT), top + 12, []
    for index, (name, kind) in enumerate(names):
        wide = 40 + 7 * len(name)
        if x + wide > _WIDTH - _RIGHT and x > _LEFT:
            x, y = float(_LEFT), y + 18
        sign = (
            _mark(index, x + 9, y - 4, kind)
            if shapes
            else tag("line", x1=x, x2=x + 18, y1=y - 4, y2=y - 4, class_=f"line {kind}")
        )
        found += [sign, _text(x + 23, y, name, "start")]
        x += wide
    return found, y - top + 8


def lines(title: str, series: Sequence[Series], x_title: str, y_title: str) -> Html:
    """Lines over a common axis, with a legend."""
    xs = _Scale.over([v for s in series for v in s.x], _LEFT, _WIDTH - _RIGHT, pad=0.01)
    ys = _Scale.over([v for s in series for v in s.y], _HEIGHT - _BOTTOM, _TOP)
    drawn = []
    for item in series:
        kind = f"c{item.colour % COLOURS}{' dashed' if item.dashed else ''}"
        points = [(xs(x), ys(y)) for x, y in zip(item.x, item.y, strict=True) if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        marks = [tag("circle", cx=round(x, 1), cy=round(y, 1), r=3, class_=f"fill {kind}") for x, y in points]
        line = tag("polyline", points=path, class_=f"line {kind}")
        drawn.append(tag("g", tag("title", item.name), line, *(marks if item.marks else ())))
    names = [(s.name, f"c{s.colour % COLOURS}{' dashed' if s.dashed else ''}") for s in series]
    legend, more = _legend(names, _HEIGHT) if len(series) > 1 else ([], 0.0)
    return chart(title, *_axes(xs, ys, x_title, y_title), *drawn, *legend, height=_HEIGHT + more)


def _mark(shape: int, x: float, y: float, kind: str) -> Html:
    """One of six shapes, so that groups differ without colour."""
    kind = f"fill {kind}"
    x, y = round(x, 1), round(y, 1)
    outlines = (
        None,
        ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        ((0, -5.5), (5, 4), (-5, 4)),
        ((0, -6), (5, 0), (0, 6), (-5, 0)),
        ((0, 5.5), (5, -4), (-5, -4)),
        ((-5, -2), (-2, -5), (2, -5), (5, -2), (5, 2), (2, 5), (-2, 5), (-5, 2)),
    )
    corners = outlines[shape % _SHAPES]
    if corners is None:
        return tag("circle", cx=x, cy=y, r=4.5, class_=kind)
    return tag("polygon", points=" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners), class_=kind)


def scatter(
    title: str,
    points: Sequence[Point],
    titles: tuple[str, str],
    groups: Sequence[str],
    cuts: Sequence[Line] = (),
    *,
    named: bool = True,
) -> Html:
    """Points with error bars and names on hover, a shape and colour per group, and the lines that divide them."""
    xs = _Scale.over(_reach(points, 0), _LEFT, _WIDTH - _RIGHT)
    ys = _Scale.over(_reach(points, 1), _HEIGHT - _BOTTOM, _TOP)
    drawn: list[Html] = []
    for line in cuts:
        x1, x2 = (min(max(xs(v), _LEFT), _WIDTH - _RIGHT) for v in (line.x1, line.x2))
        y1, y2 = (min(max(ys(v), _TOP), _HEIGHT - _BOTTOM) for v in (line.y1, line.y2))
        drawn.append(tag("line", x1=round(x1, 1), y1=round(y1, 1), x2=round(x2, 1), y2=round(y2, 1), class_="cut"))
    for p in points:
        x, y, kind, marks = xs(p.x), ys(p.y), f"c{p.group % COLOURS}", []
        if p.error:
            (left, right), (low, high) = (
                (xs(p.x + s * p.error[0]) for s in (-1, 1)),
                (ys(p.y + s * p.error[1]) for s in (-1, 1)),
            )
            marks = [
                tag(
                    "line",
                    x1=round(left, 1),
                    x2=round(right, 1),
                    y1=round(y, 1),
                    y2=round(y, 1),
                    class_=f"error {kind}",
                ),
                tag(
                    "line", x1=round(x, 1), x2=round(x, 1), y1=round(low, 1), y2=round(high, 1), class_=f"error {kind}"
                ),
            ]
        where = f"{p.name}: {groups[p.group]}, {p.x:.3f}, {p.y:.3f}" if groups else f"{p.name}: {p.x:.3f}, {p.y:.3f}"
        drawn.append(tag("g", tag("title", where), *marks, _mark(p.group, x, y, kind), class_="point"))
    drawn += _names([(xs(p.x), ys(p.y), p.name) for p in points]) if named else []
    names = [(name, f"c{k % COLOURS}") for k, name in enumerate(groups)]
    legend, more = _legend(names, _HEIGHT, shapes=True) if len(groups) > 1 else ([], 0.0)
    return chart(title, *_axes(xs, ys, *titles), *drawn, *legend, height=_HEIGHT + more)


def _names(places: Sequence[tuple[float, float, str]]) -> list[Html]:
    """Names next to points, on a side where they cover no point and no other name; none where there is no such side."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in places]
    found = []
    for x, y, name in places:
        text = name if len(name) <= 24 else f"{name[:23]}…"
        wide = 5.6 * len(text)
        sides = (
            (7, 3.5),
            (7, -6),
            (-7 - wide, 3.5),
            (-7 - wide, -6),
            (7, 13),
            (-7 - wide, 13),
            (-wide / 2, -9),
            (-wide / 2, 17),
        )
        for right, down in sides:
            box = (x + right, y + down - 9, x + right + wide, y + down + 2)
            inside = box[0] >= _LEFT and box[2] <= _WIDTH and box[1] >= 0 and box[3] <= _HEIGHT - _BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                found.append(_text(box[0], y + down, text, "start", class_="name"))
                break
    return found


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _reach(points: Sequence[Point], axis: int) -> list[float]:
    found = []
    for p in points:
        error = p.error[axis] if p.error else 0.0
        found += [(p.x, p.y)[axis] - error, (p.x, p.y)[axis] + error]
    return found


def bars(
    title: str, items: Sequence[tuple[str, float]], x_title: str, *, form: str = "{:.3g}", mark: float | None = None
) -> Html:
    """Horizontal bars with their values; ``mark`` is a value to compare them with, drawn as a line."""
    left = min(24 + 6.6 * max((len(name) for name, _ in items), default=0), 240)
    height = 22 * len(items) + 38
    reach = [0.0, *(value for _, value in items), *([mark] if mark is not None else [])]
    low, high = min(reach), max(reach)
    scale = _Scale(low, high if high > low else low + 1.0, left, _BARS - 64)
    zero = scale(0.0)
    drawn: list[Html] = []
    figures: list[Html] = []
    for index, (name, value) in enumerate(items):
        y, end = 8 + 22 * index, scale(value)
        figures.append(_text(max(end, zero) + 6, y + 14, _minus(form.format(value)), "start"))
        drawn += [
            _text(left - 8, y + 13, name if len(name) <= 36 else f"{name[:35]}…", "end"),
            tag(
                "rect",
                x=round(min(zero, end), 1),
                y=y + 2,
                width=round(abs(end - zero), 1),
                height=15,
                class_=f"fill c{0 if value >= 0 else 1}",
            ),
        ]
    bottom = 8 + 22 * len(items)
    drawn.append(tag("line", x1=round(zero, 1), x2=round(zero, 1), y1=4, y2=bottom, class_="axis"))
    if mark is not None:
        at = round(scale(mark), 1)
        drawn.append(tag("line", x1=at, x2=at, y1=4, y2=bottom, class_="cut"))
    drawn.append(
        _text(min((left + _BARS - 64) / 2, _BARS - 4 - 3.1 * len(x_title)), height - 8, x_title, class_="title")
    )
    return chart(title, *drawn, *figures, width=_BARS, height=height)


def dots(
    title: str,
    columns: Sequence[tuple[str, Sequence[float | None]]],
    names: Sequence[str],
    y_title: str,
    x_title: str = "",
) -> Html:
    """One column of points per name, a shape and colour per series; names on hover."""
    values = [v for _, series in columns for v in series if v is not None]
    xs = _Scale(-0.5, max(len(names), 1) - 0.5, _LEFT, _WIDTH - _RIGHT)
    ys = _Scale.over(values, _HEIGHT - _BOTTOM, _TOP)
    bottom, drawn = _HEIGHT - _BOTTOM, []
    for value in ys.ticks:
        y = round(ys(value), 1)
        drawn += [
            tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"),
            _text(_LEFT - 6, y + 4, _minus(f"{value:.4g}"), "end"),
        ]
    for k, (label, series) in enumerate(columns):
        for index, point in enumerate(series):
            value = math.nan if point is None else point
            if math.isfinite(value):
                words = tag("title", f"{names[index]}: {label} {value:.3f}")
                drawn.append(tag("g", words, _mark(k, xs(index), ys(value), f"c{k % COLOURS}"), class_="point"))
    middle = (_TOP + bottom) / 2
    if len(names) <= _MOST_TICKS:
        drawn += [_text(xs(index), bottom + 18, name) for index, name in enumerate(names)]
    drawn += [
        tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="axis"),
        _text(
            (_LEFT + _WIDTH - _RIGHT) / 2,
            _HEIGHT - 16,
            x_title or f"{len(names)} datasets, in the order of the table below",
            class_="title",
        ),
        tag("text", y_title, transform=f"translate(15,{middle:.0f}) rotate(-90)", text_anchor="middle", class_="title"),
    ]
    legend, more = _legend([(label, f"c{k % COLOURS}") for k, (label, _) in enumerate(columns)], _HEIGHT, shapes=True)
    return chart(title, *drawn, *legend, height=_HEIGHT + more)
