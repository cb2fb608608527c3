"""The figures of the diagnostics, PNG and SVG, from their typed results alone. The only module that needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from merit.diagnostics.alignment import Alignment
from merit.diagnostics.concentration import Concentration
from merit.diagnostics.connectivity import Connectivity
from merit.diagnostics.curvature import Curvature
from merit.diagnostics.displacement import Displacement
from merit.diagnostics.embedding import Embedding
from merit.diagnostics.gain import Gain
from merit.diagnostics.gap import Gap
from merit.diagnostics.perturbation import Perturbation
from merit.diagnostics.result import Diagnosis
from merit.diagnostics.sensitivity import Sensitivity
from merit.diagnostics.surface import Surface
from merit.files import write_bytes

__all__ = ["FIGURES", "draw_all", "save"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's, which colour-blind readers tell apart."""
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.framealpha": 0.75,
    "legend.edgecolor": "none",
    "legend.fontsize": 8,
    "svg.hashsalt": "merit",
    "svg.fonttype": "none",
}
NATS = "nats per target token"


def draw_all(results: Mapping[str, Diagnosis], folder: Path) -> str:
    """Draw every result into ``folder`` as NAME.png and NAME.svg; says where they are."""
    for name, result in results.items():
        with mpl.rc_context(STYLE):
            figure = FIGURES[name](result)
            figure.suptitle(f"{result.title}: {result.verdict}", fontsize=11)
            save(figure, folder / name)
    return f"Figures (PNG and SVG): {folder}" if results else ""


def save(figure: Figure, stem: Path) -> None:
    """Write ``stem``.png and ``stem``.svg; equal figures give equal files."""
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
        write_bytes(stem.with_name(f"{stem.name}.{kind}"), buffer.getvalue())


def _panels(count: int, width: float = 4.2, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)
    return figure, list(axes[0])


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _connectivity(result: Connectivity) -> Figure:
    kinds: dict[str, list[int]] = {"branch to branch": [], "branch to merged": [], "base to branch": []}
    for number, path in enumerate(result.paths):
        kind = "base to branch" if path.start == "base" else "branch to merged" if path.end == "merged" else ""
        kinds[kind or "branch to branch"].append(number)
    shown = {kind: numbers for kind, numbers in kinds.items() if numbers}
    figure, axes = _panels(len(shown))
    for place, (kind, numbers) in zip(axes, shown.items(), strict=True):
        for order, number in enumerate(numbers):
            path = result.paths[number]
            place.plot(
                result.alphas, path.losses, ".-", ms=3, lw=1, color=_colour(order), label=f"{path.start}–{path.end}"
            )
        worst = max(result.paths[number].barrier for number in numbers)
        place.set(title=f"{kind}; largest barrier {worst:.4f}", xlabel="α", ylabel=f"training loss ({NATS})")
        if len(numbers) <= 8:
            place.legend()
    return figure


def _displacement(result: Displacement) -> Figure:
    figure, (bars, profile, cosines) = _panels(3)
    places = np.arange(len(result.models))
    bars.bar(places, [100 * value for value in result.relative], color=[_colour(i) for i in range(len(places))])
    bars.set_xticks(places, result.models, rotation=45, ha="right")
    contraction = "" if result.contraction is None else f"; averaging contracts {result.contraction:.2f} ×"
    bars.set(title=f"displacement{contraction}", ylabel="‖δ‖ / ‖θ0‖ (%)")
    for number, model in enumerate(result.models):
        values = [100 * layer.relative[number] for layer in result.layers]
        profile.plot(range(len(values)), values, ".-", ms=4, lw=1, color=_colour(number), label=model)
    profile.set_xticks(range(len(result.layers)), [layer.layer for layer in result.layers], rotation=45, ha="right")
    profile.set(title="by layer", ylabel="‖δ‖ / ‖θ0‖ (%)")
    profile.legend()
    image = cosines.imshow(np.array(result.cosines), vmin=-1, vmax=1, cmap="RdBu_r")
    cosines.set_xticks(places, result.models, rotation=45, ha="right")
    cosines.set_yticks(places, result.models)
    for i, row in enumerate(result.cosines):
        for j, value in enumerate(row):
            cosines.text(
                j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if abs(value) > 0.6 else "k"
            )
    cosines.set(title="cosines between displacements")
    figure.colorbar(image, ax=cosines, shrink=0.8)
    return figure


def _gap(result: Gap) -> Figure:
    figure, (place,) = _panels(1, 6.0)
    places = np.arange(len(result.lines))
    for offset, field, colour in ((-0.2, "train", COLOURS[0]), (0.2, "test", COLOURS[1])):
        values = [getattr(line, field) for line in result.lines]
        bars = place.bar(
            places + offset, values, 0.4, color=colour, label="training rows" if field == "train" else "held out"
        )
        place.bar_label(bars, fmt="%.2f", fontsize=7)
    place.set_xticks(places, [line.model for line in result.lines], rotation=30, ha="right")
    place.set(ylabel=f"loss ({NATS})")
    place.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2)
    return figure


def _perturbation(result: Perturbation) -> Figure:
    kinds = list(dict.fromkeys(curve.noise for curve in result.curves))
    figure, axes = _panels(len(kinds))
    for place, kind in zip(axes, kinds, strict=True):
        for order, curve in enumerate(curve for curve in result.curves if curve.noise == kind):
            place.errorbar(
                (0, *curve.sigmas), (0, *curve.rises), (0, *curve.errors), fmt=".-", capsize=3, color=_colour(order),
                label=f"{curve.model}: AUC {curve.auc:.3g} ± {curve.auc_error:.1g}",
            )  # fmt: skip
        unit = "of every weight" if kind == "absolute" else "relative to the weights' size"
        place.set(title=f"{kind} noise, {result.draws} draws", xlabel=f"σ {unit}", ylabel=f"rise of the loss ({NATS})")
        place.legend()
    return figure


def _surface(result: Surface) -> Figure:
    figure, (place,) = _panels(1, 5.6, 4.6)
    losses = np.array(result.losses)
    filled = place.contourf(result.xs, result.ys, losses, levels=24, cmap="viridis")
    place.contour(result.xs, result.ys, losses, levels=24, colors="white", linewidths=0.3)
    figure.colorbar(filled, ax=place, label=f"training loss ({NATS})")
    for spot in result.places:
        marker = {"base": "s", "average": "*"}.get(spot.model, "o")
        place.plot(spot.x, spot.y, marker, color="white", mec="black", ms=12 if marker == "*" else 7)
        place.annotate(
            spot.model, (spot.x, spot.y), textcoords="offset points", xytext=(6, 6), fontsize=8,
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75},
        )  # fmt: skip
    place.set(xlabel="first direction (L2 norm of weights)", ylabel="second direction", title=result.directions)
    return figure


def _curvature(result: Curvature) -> Figure:
    figure, (place,) = _panels(1, 5.4)
    values = np.array(result.ritz_values)
    colours = [COLOURS[0] if value >= 0 else COLOURS[1] for value in values]
    place.bar(np.arange(1, len(values) + 1), values, color=colours)
    place.axhline(0, color="black", lw=0.6)
    place.set_yscale("symlog", linthresh=max(1e-9, float(np.abs(values).max()) * 1e-3))
    place.set(
        xlabel=f"Ritz value ({result.steps} Lanczos steps, {result.method} products)",
        ylabel="eigenvalue of the Hessian",
        title=f"largest {values.max():.3g}, smallest {values.min():.3g}; {result.parameters:,} weights",
    )
    return figure


def _gain(result: Gain) -> Figure:
    figure, (place,) = _panels(1, 4.8)
    names = ("measured", "predicted\n(curvature at average)", "predicted\n(curvature at base)")
    values = (result.measured, result.predicted, result.predicted_at_base)
    bars = place.bar(names, values, color=[COLOURS[0], COLOURS[1], COLOURS[4]])
    low, high = result.measured_ci95
    reach = [
        [max(0.0, result.measured - low)],
        [max(0.0, high - result.measured)],
    ]  # rounding, where all rows are alike
    place.errorbar([0], [result.measured], reach, fmt="none", ecolor="k", capsize=4)
    place.bar_label(bars, fmt="%.4f", label_type="center", color="white", fontsize=8)
    place.axhline(0, color="black", lw=0.6)
    place.set(ylabel=f"gain ({NATS})", title="Σ w L(θ_k) − L(θ̄), and ½ Σ w (δ_k−δ̄)ᵀH(δ_k−δ̄)")
    return figure


def _alignment(result: Alignment) -> Figure:
    figure, axes = _panels(len(result.variants), 4.6, 3.0)
    for place, variant in zip(axes, result.variants, strict=True):
        cosines = np.array(variant.cosines)
        image = place.imshow(cosines, vmin=0, vmax=max(0.3, float(cosines.max())), cmap="magma", aspect="auto")
        place.set_xticks(range(cosines.shape[1]), [str(i + 1) for i in range(cosines.shape[1])])
        place.set_yticks(range(len(cosines)), [str(i + 1) for i in range(len(cosines))])
        place.set(
            xlabel="eigenvector of the Hessian", ylabel="conflict axis",
            title=f"{variant.variant}: largest |cos| {variant.largest:.3f}, z = {variant.z:.0f}",
        )  # fmt: skip
        figure.colorbar(image, ax=place, label="|cos|")
    return figure


def _concentration(result: Concentration) -> Figure:
    figure, (place,) = _panels(1, max(5.0, 0.22 * len(result.norms)))
    order = np.argsort(result.norms)[::-1]
    place.bar(range(len(order)), [result.norms[i] for i in order], color=COLOURS[0])
    place.axhline(result.mean, color=COLOURS[1], lw=1, label=f"mean {result.mean:.3g}")
    place.set_xticks(range(len(order)), [result.datasets[i] for i in order], rotation=90, fontsize=7)
    text = f"CV {result.cv:.2f}, trimmed 5 % {result.cv_trimmed_5:.2f}, 10 % {result.cv_trimmed_10:.2f}"
    place.set(ylabel="norm of the gradient", title=text)
    place.legend()
    return figure


def _sensitivity(result: Sensitivity) -> Figure:
    figure, (place,) = _panels(1, 5.0)
    for item in result.sizes:
        place.plot([item.examples] * len(item.cosines), item.cosines, ".", color=COLOURS[7], ms=5)
    place.plot(
        [item.examples for item in result.sizes],
        [item.mean for item in result.sizes],
        "o-",
        color=COLOURS[0],
        label="mean",
    )
    place.set_xscale("log")
    place.set_xticks([item.examples for item in result.sizes], [str(item.examples) for item in result.sizes])
    place.minorticks_off()
    place.set(
        xlabel="examples of a dataset", ylabel="cosine with the largest sample's gradient",
        title=f"{len(result.datasets)} datasets of up to {max(result.largest):,} examples", ylim=(None, 1.0),
    )  # fmt: skip
    place.legend()
    return figure


def _embedding(result: Embedding) -> Figure:
    figure, (left, right) = _panels(2, 4.8, 4.2)
    x, y = (f"axis {a + 1} ({share:.0%} of the variance)" for a, share in enumerate(result.explained))
    for place, points, title in ((left, result.pca, "PCA of the cosines"), (right, result.tsne, "t-SNE of 1 − cos")):
        for group in sorted(set(result.groups)):
            inside = [point for point, owner in zip(points, result.groups, strict=True) if owner == group]
            label = f"group {group}" if group >= 0 else "no group"
            xs, ys = zip(*inside, strict=True)
            place.scatter(xs, ys, color=_colour(group), s=24, label=label)
        for name, point in zip(result.datasets, points, strict=True):
            place.annotate(name, point, textcoords="offset points", xytext=(3, 3), fontsize=5.5)
        place.set(title=title)
    left.set(xlabel=x, ylabel=y)
    right.set_xticks([])
    right.set_yticks([])
    left.legend()
    return figure


FIGURES: Mapping[str, Callable[..., Figure]] = {
    "connectivity": _connectivity,
    "displacement": _displacement,
    "gap": _gap,
    "perturbation": _perturbation,
    "surface": _surface,
    "curvature": _curvature,
    "gain": _gain,
    "alignment": _alignment,
    "concentration": _concentration,
    "sensitivity": _sensitivity,
    "embedding": _embedding,
}
"""By diagnostic."""
