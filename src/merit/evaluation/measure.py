"""One loaded model on held-out rows: loss and exact match by dataset, and drift from the base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from merit.errors import CheckpointError
from merit.evaluation import drift, heldout
from merit.evaluation.figures import PARTS, ByDataset, Drift, Figures, Part
from merit.evaluation.forward import Forward
from merit.evaluation.results import ANSWERS_OF_THE_BASE, answers_file
from merit.evaluation.text import exact_match
from merit.files import write_json, write_text
from merit.hf.base import Base
from merit.hf.models import autocast
from merit.hf.rows import EncodedRow
from merit.mixture.calibration import draw
from merit.mixture.dataset import EncodedDataset
from merit.recipe.schema import EvaluateSettings

__all__ = ["HeldOut", "Measured", "Questions"]


@dataclass(frozen=True)
class HeldOut:
    """Rows that no model was trained on, by dataset.

    Attributes:
        test: The mixture's test rows: what was learned.
        kept: Rows of what the base could already do: what was kept.
        unseen: Rows of tasks that nobody trains on: what carries over.
    """

    test: Mapping[str, EncodedDataset]
    kept: Mapping[str, EncodedDataset]
    unseen: Mapping[str, EncodedDataset] = field(default_factory=dict)

    def of(self, part: Part) -> Mapping[str, EncodedDataset]:
        """The datasets of one part."""
        return {"mixture": self.test, "kept": self.kept, "unseen": self.unseen}[part]


@dataclass(frozen=True)
class Measured:
    """Figures of one model: by dataset for each part, and its drift."""

    sets: dict[Part, ByDataset]
    drift: Drift | None


@dataclass(frozen=True)
class _Set:
    """The rows of one dataset to measure.

    ``places``: their numbers in the dataset. ``limit``: maximum new tokens of a greedy answer; None: no exact match here.
    """

    part: Part
    name: str
    rows: list[EncodedRow]
    places: list[int]
    short: bool
    limit: int | None


@dataclass(frozen=True)
class _Asked:
    """One row whose answer is generated, and its number in its dataset."""

    of: _Set
    place: int
    row: EncodedRow


class Questions:
    """What every model is measured on, drawn once: the rows of each dataset, and the prompts for drift.

    Args:
        rows: Held-out rows; the parts may be empty.
        base: The base.
        settings: The recipe's ``evaluate`` block.
        seed: Seed of the draws.
    """

    def __init__(self, rows: HeldOut, base: Base, settings: EvaluateSettings, seed: int) -> None:
        self._base, self._settings, self._seed = base, settings, seed
        self._sets = [
            _draw(part, name, dataset, settings, seed)
            for part in PARTS
            if settings.heldout or part != "mixture"
            for name, dataset in rows.of(part).items()
            if len(dataset)
        ]
        looked_at: dict[str, Sequence[EncodedRow]] = {f"{item.part}/{item.name}": item.rows for item in self._sets}
        self._ends = heldout.end_tokens(looked_at or dict(rows.test), base.tokenizer)  # type: ignore[arg-type]
        source = rows.test or rows.kept
        chosen = drift.choose_prompts({name: len(part) for name, part in source.items()}, settings.drift.prompts, seed)
        self._prompts = [(name, row, source[name][row].prompt()) for name, row in chosen]
        self._reference: drift.Reference | None = None

    @property
    def short(self) -> set[str]:
        """The mixture's datasets with short answers."""
        return {item.name for item in self._sets if item.part == "mixture" and item.short}

    @property
    def size(self) -> int:
        """Number of rows per model: one per loss, one per answer if exact match is measured, one per prompt."""
        rows = sum(len(item.rows) * (1 if item.limit is None else 2) for item in self._sets)
        return rows + len(self._prompts)

    def ask_base(self, model: PreTrainedModel, folder: Path, forward: Forward) -> None:
        """Sample the base's answers and keep its logits on them; repeating it gives the same answers.

        Raises:
            ResourceError: No room for the logits.
        """
        settings, forward = self._settings, Forward(forward.batcher, forward.device, forward.batch_tokens)
        prompts = [prompt for _, _, prompt in self._prompts]
        answers = drift.sample_answers(model, prompts, settings.drift.tokens, self._ends, forward, self._seed)
        pairs = [(item, answer) for item, answer in zip(self._prompts, answers, strict=True) if len(answer)]
        if not pairs:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._reference = drift.Reference.of_base(
            model, [prompt for (_, _, prompt), _ in pairs], [answer for _, answer in pairs], folder, forward
        )
        shown = [
            {"dataset": name, "row": row, "answer": self._base.tokenizer.decode(answer.tolist()), "tokens": len(answer)}
            for (name, row, _), answer in pairs
        ]
        write_json(folder / ANSWERS_OF_THE_BASE, shown)

    @property
    def wants_base(self) -> bool:
        """Whether :meth:`ask_base` must be called first."""
        return bool(self._prompts)

    def ask(self, name: str, model: PreTrainedModel, folder: Path, forward: Forward) -> Measured:
        """Figures of one loaded model; its greedy answers are written into ``folder`` next to the references.

        Raises:
            CheckpointError: A loss or drift is not finite; model and dataset are named.
        """
        rows = [row for item in self._sets for row in item.rows]
        asked = [
            _Asked(item, place, row)
            for item in self._sets
            if item.limit is not None
            for place, row in zip(item.places, item.rows, strict=True)
        ]
        limits = [question.of.limit or 0 for question in asked]
        with autocast(self._base.settings, forward.device):
            losses, counts = heldout.row_losses(model, rows, forward)
            answers = heldout.greedy_answers(
                model, [question.row for question in asked], limits, self._base.tokenizer, self._ends, forward
            )
        matches = [exact_match(answer, question.row.answer) for answer, question in zip(answers, asked, strict=True)]
        sets: dict[Part, ByDataset] = {part: {} for part in PARTS}
        start = start_asked = 0
        for item in self._sets:
            stop = start + len(item.rows)
            loss = _mean_loss(losses[start:stop], counts[start:stop], name, item)
            matched: float | None = None
            if item.limit is not None:
                matched = float(np.mean(matches[start_asked : start_asked + len(item.rows)]))
                start_asked += len(item.rows)
            sets[item.part][item.name] = Figures(loss, matched, len(item.rows), int(counts[start:stop].sum()))
            start = stop
        self._write_answers(folder / answers_file(name), asked, answers, matches)
        return Measured(sets, self._drift(name, model, forward))

    def _drift(self, name: str, model: PreTrainedModel, forward: Forward) -> Drift | None:
        if self._reference is None:
            return None
        try:
            return drift.measure_drift(model, self._reference, forward)
        except CheckpointError as error:
            raise CheckpointError(f"evaluate: model {name}: {error.message}", *error.ways_out) from None

    def _write_answers(
        self, file: Path, asked: Sequence[_Asked], answers: Sequence[str], matches: Sequence[bool]
    ) -> None:
        """The model's greedy answers next to question and reference, one JSON object per line, for inspection."""
        lines = [
            json.dumps(
                {
                    "part": question.of.part,
                    "dataset": question.of.name,
                    "row": question.place,
                    "match": match,
                    "prompt": self._text(question.row),
                    "answer": answer,
                    "reference": question.row.answer,
                },
                ensure_ascii=False,
            )
            for question, answer, match in zip(asked, answers, matches, strict=True)
        ]
        if lines:
            write_text(file, "\n".join(lines) + "\n")

    def _text(self, row: EncodedRow) -> str:
        """A row's prompt without special tokens, image placeholders among them."""
        return str(self._base.tokenizer.decode(row.prompt().input_ids.tolist(), skip_special_tokens=True)).strip()


def _draw(part: Part, name: str, dataset: EncodedDataset, settings: EvaluateSettings, seed: int) -> _Set:
    count = len(dataset) if settings.max_examples is None else settings.max_examples
    places = [int(i) for i in np.sort(draw(len(dataset), count, seed, name, purpose=f"evaluate {part}"))]
    rows = [dataset[i] for i in places]
    lengths = heldout.answer_lengths(rows)
    short = heldout.is_short_answer(lengths, settings.short_answer)
    return _Set(part, name, rows, places, short, _limit(part, lengths, settings))


def _limit(part: Part, lengths: np.ndarray, settings: EvaluateSettings) -> int | None:
    """Maximum new tokens of a greedy answer, None if exact match is not measured.

    Under ``auto`` a dataset of the mixture must have short answers (``short_answer``); for kept sets and unseen tasks it is
    enough that answers fit ``max_new_tokens``, since a verbose sentence that is no longer reproduced shows a lost style.
    """
    if settings.exact_match == "never":
        return None
    longest = settings.short_answer if part == "mixture" else settings.max_new_tokens
    if settings.exact_match == "auto" and not heldout.is_short_answer(lengths, longest):
        return None
    return heldout.answer_limit(lengths, settings.max_new_tokens)


def _mean_loss(losses: np.ndarray, counts: np.ndarray, model: str, item: _Set) -> float:
    """Nats per target token over a dataset.

    Raises:
        CheckpointError: It is not a finite number.
    """
    tokens = int(counts.sum())
    loss = float(losses.sum() / tokens) if tokens else float("nan")
    if not np.isfinite(loss):
        bad = int(np.flatnonzero(~np.isfinite(losses))[0]) if tokens else 0
        what = f"not finite ({losses[bad]} at measured row {bad})" if tokens else "undefined: its rows have no targets"
        raise CheckpointError(
            f"evaluate: the held-out loss of model {model} on dataset {item.name} ({item.part}) is {what}.",
            "A model with such losses has diverged or has non-finite weights: lower train.learning_rate and train again.",
            "No results were written; models measured before this one are kept.",
        )
    return loss
