"""Evaluation by dataset: where merged beats or loses to joint, and sample answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merit.evaluation.figures import PARTS, ByDataset, Part
from merit.evaluation.results import Evaluation
from merit.report.page import charts
from merit.report.page.data import RunData
from merit.report.page.markup import Html, Row, details, figure, join, number, paragraph, section, table
from merit.report.page.samples import sample_answers

_TITLES: dict[str, str] = {"mixture": "learned", "kept": "kept", "unseen": "unseen"}
_MOST_BARS = 60


def build(data: RunData) -> Html:
    """One table per part, the datasets where merged and joint differ most, sample answers."""
    evaluation = data.evaluation
    if evaluation is None:
        return section("evaluation", "Evaluation", paragraph("Nothing is measured yet."))
    parts = [join(_part(evaluation, part)) for part in PARTS if evaluation.sets.get(part)]
    arrows = "▲ merged is better than joint there, ▼ worse; what is more than chance is in the verdict."
    words = paragraph(arrows, class_="small") if "joint" in evaluation.summary.models else None
    return section("evaluation", "Evaluation", words, *parts, sample_answers(data))


def _part(evaluation: Evaluation, part: Part) -> list[Html]:
    figures, models = evaluation.sets[part], evaluation.summary.models
    names = list(dict.fromkeys(name for model in models for name in figures.get(model, {})))
    if not names:
        return []
    word = _TITLES.get(part, part)
    found = []
    if "joint" in figures and "merged" in figures:
        gaps = [
            (name, figures["merged"][name].loss - figures["joint"][name].loss)
            for name in names
            if name in figures["merged"] and name in figures["joint"]
        ]
        gaps.sort(key=lambda pair: pair[1])
        shown = gaps if len(gaps) <= _MOST_BARS else [*gaps[: _MOST_BARS // 2], *gaps[-_MOST_BARS // 2 :]]
        drawing = charts.bars(
            f"{word.capitalize()}: loss of merged minus joint",
            shown,
            "nats per target token; below 0 merged is better",
            form="{:+.3f}",
        )
        better = sum(gap < 0 for _, gap in gaps)
        note = f"Merged is better on {better} of {len(gaps)} datasets."
        if len(shown) < len(gaps):
            note += f" The {len(shown)} with the largest differences are drawn; the table has all."
        found.append(figure(f"{part}-gap", f"{word.capitalize()}: loss of merged minus joint", drawing, note))
    for metric, title, best in (("loss", "loss ↓ (nats per target token)", min), ("exact_match", "exact match ↑", max)):
        grid = _grid(figures, models, names, metric, best is min)
        if grid:
            found.append(
                table(f"{part}-{metric}", f"{word.capitalize()}: {title}", ("dataset", "rows", *models), grid, most=24)
            )
    return [details(f"{word.capitalize()}, dataset by dataset", *found, open_=True)]


def _grid(
    figures: Mapping[str, ByDataset], models: Sequence[str], names: Sequence[str], metric: str, low_is_good: bool
) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        values = [getattr(figures[m][name], metric) if name in figures.get(m, {}) else None for m in models]
        if all(value is None for value in values):
            continue
        joint = dict(zip(models, values, strict=True)).get("joint")
        examples = next(figures[m][name].examples for m in models if name in figures.get(m, {}))
        cells = [
            number(value, mark=_mark(value, joint, low_is_good) if model == "merged" else "")
            for model, value in zip(models, values, strict=True)
        ]
        rows.append([name, number(examples, "{:,}"), *cells])
    return rows


def _mark(value: float | None, joint: float | None, low_is_good: bool) -> str:
    """An arrow where merged and joint differ in the figures shown."""
    if value is None or joint is None or f"{value:.3f}" == f"{joint:.3f}":
        return ""
    return "good" if (value < joint) == low_is_good else "bad"
