"""What a search measured as a drawing, saved next to the merged weights. Pure: points in, SVG out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from merit.merge.searched import WeightSearch
from merit.merge.weights import Losses, ScaleSearch

__all__ = ["trade_off_svg", "weights_svg"]

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 560, 400, 70, 40, 20, 55
_BLUE, _RED, _GREY = "#4878a8", "#c44e52", "#9aa5b1"


@dataclass(frozen=True)
class _Dot:
    """One point: where it is, and how it is drawn."""

    at: Losses
    label: str = ""
    color: str = _BLUE
    radius: float = 3.5


def trade_off_svg(search: ScaleSearch, title: str = "Learned vs. kept") -> str:
    """The trade-off curve as a self-contained SVG: mixture loss on the x axis, loss on what the base knew on the y axis."""
    dots = [
        _Dot(p, f"λ = {p.scale:g}, chosen", _RED, 6) if p.scale == search.chosen else _Dot(p, f"{p.scale:g}")
        for p in search.points
    ]
    return _drawing(dots, title, line=True)


def weights_svg(search: WeightSearch, title: str = "Learned vs. kept: searched merge weights") -> str:
    """Every measured point as a self-contained SVG; base, token-weighted merge and the chosen point are named."""
    base, plain = search.points[:2]
    dots = [_Dot(p, "", _GREY, 2.5) for p in search.points if p not in (base, plain, search.chosen)]
    named = {"base": base, "by tokens": plain}
    dots += [_Dot(p, label) for label, p in named.items() if p != search.chosen]
    weights = ", ".join(f"{w:.2f}" for w in search.weights)
    dots.append(_Dot(search.chosen, f"chosen: λ = {search.scale:.2f}, w = {weights}", _RED, 6))
    return _drawing(dots, title, line=False)


def _drawing(dots: Sequence[_Dot], title: str, *, line: bool) -> str:
    xs, ys = [dot.at.learned for dot in dots], [dot.at.kept for dot in dots]

    def place(values: list[float], value: float, start: float, length: float) -> float:
        low, high = min(values), max(values)
        pad = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
        return start + length * (value - low + pad) / (high - low + 2 * pad)

    def at(p: Losses) -> tuple[float, float]:
        return (
            place(xs, p.learned, _LEFT, _WIDTH - _LEFT - _RIGHT),
            _HEIGHT - place(ys, p.kept, _BOTTOM, _HEIGHT - _TOP - _BOTTOM),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_WIDTH / 2}" y="22" text-anchor="middle" font-size="15">{escape(title)}</text>',
        f'<path d="M{_LEFT},{_TOP} V{_HEIGHT - _BOTTOM} H{_WIDTH - _RIGHT}" fill="none" stroke="#888"/>',
    ]
    if line:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(dot.at) for dot in dots))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_BLUE}" stroke-width="1.5"/>')
    for dot in dots:
        x, y = at(dot.at)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{dot.radius}" fill="{dot.color}"/>')
        if dot.label:
            left = x > _WIDTH - 8 * len(dot.label)  # a long label would leave the frame
            side = f'x="{x - 8:.1f}" text-anchor="end"' if left else f'x="{x + 8:.1f}"'
            parts.append(f'<text {side} y="{y - 6:.1f}">{escape(dot.label)}</text>')
    for value in (min(xs), max(xs)):
        x = place(xs, value, _LEFT, _WIDTH - _LEFT - _RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:.4g}</text>')
    for value in (min(ys), max(ys)):
        y = _HEIGHT - place(ys, value, _BOTTOM, _HEIGHT - _TOP - _BOTTOM)
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts += [
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">mixture loss (← learned)</text>',
        f'<text transform="translate(16,{middle}) rotate(-90)" text-anchor="middle">loss on old skills (← kept)</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"
