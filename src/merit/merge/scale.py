"""Search the scale λ along θ0 + λ(θ̄ − θ0) in memory: what is learned against what is kept, as a curve.

One merge at λ = 1 is enough: ``line_points`` moves a loaded model along the line without writing a checkpoint per point, and
the caller's function measures it. The chosen λ is then merged by ``plan_merge(..., scale=λ)``, which rounds once from the
branches; a point here interpolates the already rounded θ̄, so the two differ by at most one rounding of the model's dtype
(none at λ = 0 and 1). Not covered: choosing the held-out data, evaluating (the caller does both).

Source: the line: Wortsman et al., Robust fine-tuning of zero-shot models, arXiv:2109.01903, eq. 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from merit.errors import MergeError

if TYPE_CHECKING:
    import torch

__all__ = ["GRID", "Point", "Rule", "as_record", "line_points", "pick_scale", "search_scale", "trade_off_svg"]

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Default grid of λ."""

Rule = Literal["balanced", "learned", "keep"]


@dataclass(frozen=True)
class Point:
    """One point of the line.

    Attributes:
        scale: λ.
        learned: Held-out loss on the mixture (lower is better).
        kept: Held-out loss on what the base knew before (lower is better).
    """

    scale: float
    learned: float
    kept: float


def line_points(
    model: torch.nn.Module,
    base: Mapping[str, torch.Tensor],
    merged: Mapping[str, torch.Tensor],
    scales: Sequence[float],
) -> Iterator[float]:
    """Set the model's parameters and buffers in place to θ0 + λ(θ̄ − θ0), one λ after another, and yield λ.

    Args:
        model: The model to move; any state before. Afterwards it stays at the last λ.
        base: θ0: ``state_dict()`` of a model loaded from the base folder, as clones (not the moved model's own tensors).
        merged: θ̄: the same of the merged folder.
        scales: The λ in order.

    Yields:
        λ, each time the model is at its point. λ = 0 and λ = 1 are θ0 and θ̄ exactly; in between the sum is float32 (float64
        for float64 tensors), rounded once to the tensor's dtype.

    Raises:
        MergeError: Names or shapes of the states differ, or ``base`` shares memory with the model.
    """
    import torch

    targets = model.state_dict()
    for name, state in (("base", base), ("merged", merged)):
        odd = sorted(targets.keys() ^ state.keys()) or [n for n in targets if targets[n].shape != state[n].shape]
        if odd:
            raise MergeError(f"{odd[0]} does not agree between the model and the {name} state.")
        if any(targets[n].data_ptr() == state[n].data_ptr() != 0 for n in targets):
            raise MergeError(f"The {name} state shares memory with the model that is to be moved; pass clones.")
    for scale in scales:
        with torch.no_grad():
            for name, tensor in targets.items():
                zero, one = base[name].to(tensor.device), merged[name].to(tensor.device)
                if scale in (0, 1) or not tensor.is_floating_point():
                    tensor.copy_(zero if scale == 0 else one)
                    continue
                wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
                tensor.copy_(torch.lerp(zero.to(wide), one.to(wide), float(scale)))
        yield float(scale)


def search_scale(
    model: torch.nn.Module,
    base: Mapping[str, torch.Tensor],
    merged: Mapping[str, torch.Tensor],
    evaluate: Callable[[torch.nn.Module], tuple[float, float]],
    scales: Sequence[float] = GRID,
) -> list[Point]:
    """Measure every λ of the grid.

    Args:
        model, base, merged: See ``line_points``.
        evaluate: model → (held-out loss on the mixture, held-out loss on what the base knew).
        scales: The grid, rising; should hold 0 (the base, against which keeping is judged) and 1 (the plain merge).
    """
    return [Point(scale, *evaluate(model)) for scale in line_points(model, base, merged, scales)]


def pick_scale(points: Sequence[Point], rule: Rule = "balanced", tolerance: float = 0.05) -> Point:
    """Choose a point.

    Args:
        points: Measured points, at least one.
        rule: ``balanced``: the smallest of max(regret learned, regret kept), each regret scaled to 0 (best of the grid) … 1
            (worst). ``learned``: the smallest loss on the mixture. ``keep``: the smallest loss on the mixture among points
            whose kept loss is at most ``tolerance`` above that of the smallest λ.
        tolerance: For ``keep``, in nats per token: absolute, since a divergence from the base is 0 at the base.

    Returns:
        The point; among equals the one nearest to λ = 1, the plain merge.

    Raises:
        MergeError: No points, or a loss is not finite.
    """
    import math

    if not points:
        raise MergeError("There are no points to pick a scale from.")
    for p in points:
        if not (math.isfinite(p.learned) and math.isfinite(p.kept)):
            raise MergeError(f"The loss at scale {p.scale:g} is not finite ({p.learned}, {p.kept}).")

    def regret(values: list[float], value: float) -> float:
        low, high = min(values), max(values)
        return (value - low) / (high - low) if high > low else 0.0

    learned, kept = [p.learned for p in points], [p.kept for p in points]
    if rule == "balanced":
        return min(points, key=lambda p: (max(regret(learned, p.learned), regret(kept, p.kept)), abs(p.scale - 1)))
    allowed = list(points)
    if rule == "keep":
        limit = min(points, key=lambda p: abs(p.scale)).kept + tolerance
        allowed = [p for p in points if p.kept <= limit]
    elif rule != "learned":
        raise MergeError(f"The rule must be balanced, learned or keep; found {rule!r}.")
    return min(allowed, key=lambda p: (p.learned, abs(p.scale - 1)))


def as_record(points: Sequence[Point], chosen: Point, rule: str) -> dict[str, Any]:
    """Plain JSON values for the merge record."""
    return {"rule": rule, "chosen": chosen.scale, "points": [asdict(p) for p in points]}


def trade_off_svg(points: Sequence[Point], chosen: Point | None = None, title: str = "Learned against kept") -> str:
    """The trade-off curve as a self-contained SVG: mixture loss to the right, loss on what the base knew upwards."""
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
        (x, y), best = at(p), p == chosen
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
