"""A study as plots: what was learned against what was kept, and against unseen tasks; one line per method along its λ.

matplotlib draws them and comes with the extra ``plots``; without it they are left out, and a note says so.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merit.errors import install_hint
from merit.files import write_bytes
from merit.study.figures import StudyResult

__all__ = ["write_plots"]

_AXES = {"kept": "loss on kept sets (← kept more)", "unseen": "loss on unseen tasks (← better)"}
_MARKS = "osD^vP*X<>hp"
_DASHES = ("-", "--", ":", "-.")
_COLOURS = (*(f"C{number}" for number in range(10)), "navy", "gold", "teal", "crimson", "indigo", "sienna", "deeppink")
_INSIDE, _ROWS = 10, 36
"""Lines whose legend fits into the axes, and rows of one that does not."""


def write_plots(result: StudyResult, folder: Path, note: Callable[[str], None]) -> None:
    """Write ``kept.png``, ``kept.svg`` and, if unseen sets were measured, ``unseen.png`` and ``unseen.svg``."""
    if find_spec("matplotlib") is None:
        note(f"plots are left out: matplotlib is not installed ({install_hint('plots')})")
        return
    for part, label in _AXES.items():
        lines = mean_lines(result, part)
        if lines:
            for name, data in _draw(lines, label, result).items():
                write_bytes(folder / f"{part}.{name}", data)


def mean_lines(result: StudyResult, part: str) -> dict[str, list[tuple[float, float, float]]]:
    """Mean over seeds of (λ, learned, loss on ``part``) by method, for methods whose line has both."""
    found = {}
    for method in result.methods:
        runs = [run.line.points for run in result.of(method) if run.line is not None]
        points = []
        for at in zip(*runs, strict=True):
            losses: list[dict[str, float]] = [{str(key): value for key, value in point.losses.items()} for point in at]
            if all(part in item and "mixture" in item for item in losses):
                mean = [sum(item[key] for item in losses) / len(losses) for key in ("mixture", part)]
                points.append((at[0].scale, mean[0], mean[1]))
        if points:
            found[method] = points
    return found


def family_of(method: str, own: str) -> str:
    """What a method shares its colour with: splits of one kind, joint training however trained, the own branches' merges."""
    head, _, merged = method.partition("+")
    if head == own:
        return f"{own}'s branches" if merged else own
    return head.partition("@")[0].partition("-")[0] + (" (searched)" if merged else "")


def _draw(lines: dict[str, list[tuple[float, float, float]]], label: str, result: StudyResult) -> dict[str, bytes]:
    """The plot as a PNG and as an SVG; colours are families, and a long legend stands beside the axes."""
    matplotlib: Any = import_module("matplotlib")
    figure_type: Any = import_module("matplotlib.figure").Figure
    families: dict[str, list[str]] = {}
    for method in lines:
        families.setdefault(family_of(method, result.own), []).append(method)
    others = [name for name in families if name != result.own]
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(others)}
    columns = -(-len(lines) // _ROWS)
    options = {"svg.hashsalt": "merit", "svg.fonttype": "none"}
    with matplotlib.rc_context(options):
        figure = figure_type(figsize=(8 + 2.6 * (columns if len(lines) > _INSIDE else 0), 5.5), layout="constrained")
        axes = figure.add_subplot()
        for family, methods in families.items():
            for number, method in enumerate(methods):
                points, own = lines[method], method == result.own
                axes.plot(
                    [learned for _, learned, _ in points],
                    [other for _, _, other in points],
                    marker=_MARKS[number % len(_MARKS)],
                    color="black" if own else colours[family],
                    linewidth=2.2 if own else 1.1,
                    markersize=6 if own else 4,
                    linestyle=_DASHES[number % len(_DASHES)],
                    zorder=3 if own else 2,
                    label=method,
                )
                for scale, learned, other in points:
                    if scale == 1.0:
                        axes.plot([learned], [other], marker="o", markersize=11, markerfacecolor="none", color="grey")
        axes.set_xlabel("loss on the mixture's test rows (← learned more)")
        axes.set_ylabel(label)
        axes.set_title(
            f"{result.name}: mean of {len(result.seeds)} seeds along θ0 + λ(θ̄ − θ0); circles: λ = 1", fontsize=10
        )
        axes.grid(alpha=0.25)
        if len(lines) > _INSIDE:
            figure.legend(loc="outside right upper", fontsize=7, ncols=columns)
        else:
            axes.legend(fontsize=7)
        made = {}
        for kind, extra in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            stream = io.BytesIO()
            figure.savefig(stream, format=kind, **extra)
            made[kind] = stream.getvalue()
    return made
