"""Sample answers side by side: base, joint, merged; with their pictures where rows have any."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from merit.errors import MeritError
from merit.hf.images import read_image
from merit.mixture.result import load_split
from merit.report.page.data import RunData
from merit.report.page.markup import Cell, Html, Row, details, join, paragraph, table, tag

_MODELS = ("base", "joint", "random", "merged")
_MOST = 24
_PER_DATASET = 2
_SIDE = 112  # pixels of a thumbnail's longer side
_TEXT = 600


def sample_answers(data: RunData) -> Html:
    """Up to 24 held-out rows whose answers differ between models, spread over datasets; nothing if no answers are stored."""
    answers = {model: data.answers(model) for model in _MODELS}
    models = [model for model in _MODELS if answers[model]]
    if "merged" not in models:
        return Html("")
    chosen = _choose([answers[model] for model in models])
    pictures = _Pictures(data)
    rows: list[Row] = []
    for index in chosen:
        item = answers["merged"][index]
        shown = pictures.of(item)
        question = join([*shown, _cut(str(item.get("prompt", "")))]) if shown or item.get("prompt") else Html("–")
        cells = [_answer(answers[model][index]) for model in models]
        rows.append([f"{item['dataset']} ({item['part']})", Cell(question), Cell(_cut(str(item["reference"]))), *cells])
    header = ("dataset", "question", "reference", *models)
    grid = table("answers", "Answers to held-out rows", header, rows)
    note = "Greedy answers; ✓ equals the reference. Rows on which the models differ come first."
    return details("Sample answers side by side", paragraph(note, class_="small"), grid)


def _choose(answers: Sequence[Sequence[dict[str, Any]]]) -> list[int]:
    """Rows by how much the models differ on them, at most two of a dataset."""
    count = min(map(len, answers))

    def variety(index: int) -> tuple[int, int]:
        rows = [model[index] for model in answers]
        return -len({bool(row["match"]) for row in rows}), -len({str(row["answer"]) for row in rows})

    taken: dict[str, int] = defaultdict(int)
    chosen: list[int] = []
    for index in sorted(range(count), key=lambda i: (*variety(i), i)):
        key = f"{answers[0][index]['part']}/{answers[0][index]['dataset']}"
        if taken[key] < _PER_DATASET and len(chosen) < _MOST:
            taken[key] += 1
            chosen.append(index)
    return chosen


def _answer(row: dict[str, Any]) -> Cell:
    sign = tag(
        "span",
        "✓" if row["match"] else "✗",
        class_="good" if row["match"] else "bad",
        role="img",
        aria_label="equals the reference" if row["match"] else "differs from the reference",
    )
    return Cell(join([sign, " ", _cut(str(row["answer"]))]), float(bool(row["match"])))


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]} …"


class _Pictures:
    """Thumbnails of a row's images; none where the rows or the files are gone."""

    def __init__(self, data: RunData) -> None:
        self._run = data.run
        self._any = any(item.images or item.test_images for item in data.counts)
        self._splits: dict[str, Any] = {}

    def of(self, item: dict[str, Any]) -> list[Html]:
        """The images of one answered row."""
        if not self._any or not isinstance(item.get("row"), int):
            return []
        name = "test" if item["part"] == "mixture" else str(item["part"])
        try:
            if name not in self._splits:
                self._splits[name] = load_split(self._run / "mixture", name)  # type: ignore[arg-type]
            row = self._splits[name][item["dataset"]][item["row"]]
            return [_thumbnail(read_image(ref)) for ref in row.images[:4]]
        except (MeritError, OSError, KeyError, IndexError):
            return []


def _thumbnail(image: Any) -> Html:  # noqa: ANN401  a PIL image
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return tag("img", src=source, alt="the row's picture", width=image.width, height=image.height)
