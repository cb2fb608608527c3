"""What conflicts with what: the geometry of the datasets' gradients at the base."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from merit.conflict.result import Geometry
from merit.diagnostics.embedding import tsne
from merit.report.page import charts
from merit.report.page.data import RunData
from merit.report.page.heatmap import heatmap
from merit.report.page.markup import Cell, Html, Row, details, figure, join, notes, number, paragraph, section, table
from merit.split.components import cosine_matrix, principal_components
from merit.split.result import Split

_REPLICATES = 40
_MOST_WITH_ERRORS = 300
"""Datasets above which the scatter has no error bars: every replicate costs an eigenproblem of that size."""
_MOST_MAPPED = 400
"""Datasets above which there is no t-SNE: it would take longer than the rest of the page."""
_DASH = "–"


def build(data: RunData) -> Html:
    """Heatmap, scatter with cuts, scree, reliability, and the table of datasets."""
    geometry = data.geometry
    if geometry is None:
        return section("conflict", "What conflicts with what", paragraph("No gradients were measured in this run."))
    split = data.own.split
    order, sizes = _order(geometry, split)
    names = [geometry.names[i] for i in order]
    summary = geometry.summary
    matrix = geometry.cosine[np.ix_(order, order)]
    parts = [
        paragraph(_headline(geometry)),
        figure(
            "cosines",
            "Cosines of the datasets' gradients",
            heatmap("cosines", f"Cosines of {len(names)} datasets, ordered by group", matrix, names, sizes),
            "Ordered by group; blue pulls in the same direction, orange in opposite ones.",
            cells=True,
        ),
        _pairs(geometry),
    ]
    if geometry.arrays.scores.shape[1] >= 2:
        parts += [_scatter(geometry, split, data.recipe.seed), _map(geometry, split, data.recipe.seed)]
    parts += [_scree(geometry), _reliability(geometry, names), _datasets(geometry, split)]
    return section("conflict", "What conflicts with what", *parts, notes(summary.warnings))


def _headline(geometry: Geometry) -> str:
    summary = geometry.summary
    text = f"{summary.datasets} datasets, one gradient each over {summary.examples_in_all:,} examples in all."
    if summary.negative_share is not None and summary.cosine.mean is not None:
        text += (
            f" {summary.negative_share:.0%} of the pairs have a negative cosine; the mean is {summary.cosine.mean:.2f}."
        )
    return f"{text} Suggested axes: {summary.suggestion}"


def _order(geometry: Geometry, split: Split | None) -> tuple[list[int], list[int]]:
    """Indices by group and, within it, along the first axis; and the groups' sizes."""
    place = {name: i for i, name in enumerate(geometry.names)}
    first = geometry.arrays.scores[:, 0] if geometry.arrays.scores.shape[1] else np.zeros(len(place))
    groups = split.groups if split else [list(geometry.names)]
    found = [sorted((place[n] for n in group if n in place), key=lambda i: first[i]) for group in groups]
    rest = sorted(set(place.values()) - {i for group in found for i in group})
    blocks = [*(group for group in found if group), *([rest] if rest else [])]
    return [i for block in blocks for i in block], [len(block) for block in blocks]


def _pairs(geometry: Geometry) -> Html:
    rows: list[Row] = [
        [pair.a, pair.b, number(pair.cosine, "{:.3f}")]
        for pair in [*geometry.summary.most_conflicting, *reversed(geometry.summary.most_aligned)]
    ]
    if not rows:
        return Html("")
    grid = table("pairs", "The most conflicting and the most aligned pairs", ("dataset", "dataset", "cosine"), rows)
    return details("The most conflicting and the most aligned pairs, as a table", grid)


def _scatter(geometry: Geometry, split: Split | None, seed: int) -> Html:
    scores = geometry.arrays.scores[:, :2]
    errors = _errors(geometry, scores, seed) if len(scores) <= _MOST_WITH_ERRORS else None
    groups = split.groups if split else []
    member = {name: k for k, group in enumerate(groups) for name in group}
    points = [
        charts.Point(
            name, float(x), float(y), member.get(name, 0), None if errors is None else (float(e[0]), float(e[1]))
        )
        for name, (x, y), e in zip(geometry.names, scores, errors if errors is not None else scores, strict=True)
    ]
    labels = [f"group {k}" for k in range(len(groups))]
    shares = geometry.arrays.explained_variance
    note = "Every point is a dataset"
    note += (
        "; bars: how far another calibration sample would move it (one standard deviation)."
        if errors is not None
        else "."
    )
    cuts = _cuts(scores, [[geometry.names.index(n) for n in group if n in member] for group in groups])
    drawing = charts.scatter(
        "Datasets on the first two conflict axes",
        points,
        (f"axis 1 ({shares[0]:.0%} of the variance)", f"axis 2 ({shares[1]:.0%})"),
        labels,
        cuts,
    )
    return figure(
        "scatter", "Datasets on the first two conflict axes", drawing, note + (" Dashed: the cuts." if cuts else "")
    )


def _map(geometry: Geometry, split: Split | None, seed: int) -> Html:
    """t-SNE of the distances 1 − cos; nothing for fewer than four datasets or too many to wait for."""
    count = len(geometry.names)
    if not 4 <= count <= _MOST_MAPPED:
        return Html("")
    distances = np.maximum(1.0 - (geometry.cosine + geometry.cosine.T) / 2, 0.0)
    np.fill_diagonal(distances, 0.0)
    groups = split.groups if split else []
    member = {name: k for k, group in enumerate(groups) for name in group}
    places = tsne(distances, seed)
    points = [
        charts.Point(name, float(x), float(y), member.get(name, 0))
        for name, (x, y) in zip(geometry.names, places, strict=True)
    ]
    title = "Map of the datasets' gradients (t-SNE)"
    drawing = charts.scatter(title, points, ("no unit", "no unit"), [f"group {k}" for k in range(len(groups))])
    return figure("map", title, drawing, "Neighbours have similar gradients; distances across the map mean nothing.")


def _errors(geometry: Geometry, scores: np.ndarray, seed: int) -> np.ndarray | None:
    """Standard deviation of the first two scores over geometries as other calibration samples would have given them."""
    found = []
    for gram in geometry.resampled(_REPLICATES, seed):
        if not (np.diag(gram) > 0).all():
            continue
        other = principal_components(cosine_matrix(gram), scores.shape[1]).scores
        left, _, right = np.linalg.svd(other.T @ scores)
        found.append(other @ (left @ right) - scores)  # the rotation nearest to the measured scores
    return np.sqrt(np.mean(np.square(found), axis=0)) if len(found) > 1 else None


def _cuts(scores: np.ndarray, groups: Sequence[Sequence[int]]) -> list[charts.Line]:
    """Where the split cut along axes 1 and 2; none for a method that cuts in another way."""
    if len(groups) < 2 or len(groups) & (len(groups) - 1):
        return []
    low, high = scores.min(axis=0) - 9, scores.max(axis=0) + 9
    half = len(groups) // 2
    sides = [[i for group in part for i in group] for part in (groups[:half], groups[half:])]
    at = _between(scores[sides[0], 0], scores[sides[1], 0])
    if at is None:
        return []
    found = [charts.Line(at, float(low[1]), at, float(high[1]))]
    if len(groups) < 4:
        return found
    for number_, part in enumerate((groups[:half], groups[half:])):
        lower = [i for group in part[: half // 2] for i in group]
        upper = [i for group in part[half // 2 :] for i in group]
        across = _between(scores[lower, 1], scores[upper, 1])
        left_is_first = scores[sides[0], 0].mean() < scores[sides[1], 0].mean()
        if across is not None:
            ends = (float(low[0]), at) if (number_ == 0) == bool(left_is_first) else (at, float(high[0]))
            found.append(charts.Line(ends[0], across, ends[1], across))
    return found


def _between(one: np.ndarray, other: np.ndarray) -> float | None:
    if not len(one) or not len(other):
        return None
    if one.max() <= other.min():
        return float(one.max() + other.min()) / 2
    if other.max() <= one.min():
        return float(other.max() + one.min()) / 2
    return None


def _scree(geometry: Geometry) -> Html:
    summary = geometry.summary
    items = [(f"axis {k + 1}", float(share)) for k, share in enumerate(summary.explained_variance[:10])]
    if not items:
        return Html("")
    drawing = charts.bars("Variance of the cosines on each axis", items, "share of the variance", form="{:.1%}")
    parts = [figure("scree", "Variance of the cosines on each axis", drawing)]
    judged = summary.spectral_concentration
    if judged:
        header = (
            "axis",
            "signal",
            "null",
            "balanced ratio",
            "null",
            "sign-cut ratio",
            "null",
            "ratio on other examples",
        )
        rows: list[Row] = []
        for c in judged:
            cut = (
                c.signal,
                c.signal_null,
                c.ratio,
                c.ratio_null,
                c.sign_cut_ratio,
                c.sign_cut_ratio_null,
                c.held_out_ratio,
            )
            rows.append([Cell(f"axis {c.axis}", c.axis), *map(number, cut)])
        named = [f"axis {c.axis}" for c in judged]
        bands = [
            ("signal", [c.signal for c in judged]),
            ("null: largest without conflict", [c.signal_null for c in judged]),
        ]
        drawing = charts.dots("Signal of every cut against its null", bands, named, "share confirmed", "axes in order")
        parts.append(
            figure("signal", "Signal of every cut against its null", drawing, "A cut counts only above its null.")
        )
        parts.append(table("axes", "Cuts along the axes, against chance", header, rows))
        parts.append(
            paragraph(
                "Signal: share of a cut's gain that is confirmed on examples that did not choose it. Null: the largest "
                "value in mixtures without conflict, made from the measured noise; a figure below its null says nothing.",
                class_="small",
            )
        )
    return join(parts)


def _reliability(geometry: Geometry, names: Sequence[str]) -> Html:
    by_name = {item.name: item for item in geometry.datasets}
    columns = [
        ("reliability", [by_name[n].reliability for n in names]),
        ("cosine with the gradient of all rows", [by_name[n].expected_cosine for n in names]),
    ]
    if not any(v is not None for _, series in columns for v in series):
        return Html("")
    drawing = charts.dots("How well each gradient is known", columns, names, "expected cosine")
    return figure(
        "reliability", "How well each gradient is known", drawing, "1: another sample would give the same direction."
    )


def _datasets(geometry: Geometry, split: Split | None) -> Html:
    member = {name: k for k, group in enumerate(split.groups if split else []) for name in group}
    stable = (split.stability if split else None) or {}
    order, _ = _order(geometry, split)
    place = {geometry.names[i]: rank for rank, i in enumerate(order)}
    header = ("dataset", "group", "keeps its group", "rows", "sample", "loss", "norm", "reliability", "expected cosine")
    rows: list[Row] = []
    for item in sorted(geometry.datasets, key=lambda item: place.get(item.name, len(place))):
        group = member.get(item.name)
        rows.append(
            [
                item.name,
                Cell(_DASH) if group is None else Cell(str(group), group),
                number(stable.get(item.name), "{:.0%}"),
                number(item.rows, "{:,}"),
                number(item.examples, "{:,}"),
                number(item.loss_per_token),
                number(item.norm, "{:.3g}"),
                number(item.reliability),
                number(item.expected_cosine),
            ]
        )
    grid = table("gradients", "Every dataset's gradient at the base", header, rows, most=20)
    return details("Every dataset's gradient, as a table", grid)
