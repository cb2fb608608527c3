"""The curve of a λ search as a drawing, saved next to the merged weights. Pure: points in, SVG out."""

from __future__ import annotations

from html import escape

from merit.merge.weights import Point, ScaleSearch


def trade_off_svg(search: ScaleSearch, title: str = "Learned vs. kept") -> str:
    """The trade-off curve as a self-contained SVG: mixture loss on the x axis, loss on what the base knew on the y axis."""
    points = search.points
    width, height, left, top, right, bottom = 560, 400, 70, 40, 20, 55
    xs, ys = [p.learned for p in points], [p.kept for p in points]

    def place(values: list[float], value: float, start: float, length: float) -> float:
        low, high = min(values), max(values)
        pad = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
        return start + length * (value - low + pad) / (high - low + 2 * pad)

    def at(p: Point) -> tuple[float, float]:
        return (
            place(xs, p.learned, left, width - left - right),
            height - place(ys, p.kept, bottom, height - top - bottom),
        )

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{width / 2}" y="22" text-anchor="middle" font-size="15">{escape(title)}</text>',
        f'<path d="M{left},{top} V{height - bottom} H{width - right}" fill="none" stroke="#888"/>',
        f'<polyline points="{path}" fill="none" stroke="#4878a8" stroke-width="1.5"/>',
    ]
    for p in points:
        (x, y), best = at(p), p.scale == search.chosen
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if best else 3.5}" fill="{"#c44e52" if best else "#4878a8"}"/>'
        )
        label = f"λ = {p.scale:g}, chosen" if best else f"{p.scale:g}"
        parts.append(f'<text x="{x + 8:.1f}" y="{y - 6:.1f}">{label}</text>')
    for value in (min(xs), max(xs)):
        x = place(xs, value, left, width - left - right)
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{value:.4g}</text>')
    for value in (min(ys), max(ys)):
        y = height - place(ys, value, bottom, height - top - bottom)
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    middle = (top + height - bottom) / 2
    parts += [
        f'<text x="{(left + width - right) / 2}" y="{height - 12}" text-anchor="middle">mixture loss (← learned)</text>',
        f'<text transform="translate(16,{middle}) rotate(-90)" text-anchor="middle">loss on old skills (← kept)</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"
