"""Every model on the same held-out rows: measured one after another, compared, and written into one folder.

Rows are drawn once and each model is loaded once. Results are saved per model, so a killed evaluation resumes with the
next model. The caller decides which models there are.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol, Self

import torch

from merit.errors import RunFolderError
from merit.evaluation.figures import FORMAT, PARTS, ByDataset, Drift, ModelFigures
from merit.evaluation.forward import Forward
from merit.evaluation.measure import HeldOut, Questions
from merit.evaluation.results import ANSWERS_OF_THE_BASE, MODELS, Evaluation, answers_file
from merit.evaluation.summary import About, model_order, summarise
from merit.files import checksum, content_hash, fingerprint, read_as, read_json, sealed, write_json
from merit.hf import checkpoint
from merit.hf.base import Base
from merit.hf.models import load_model, pick_device
from merit.mixture.dataset import EncodedDataset
from merit.progress import Progress, silent
from merit.recipe.schema import EvaluateSettings

__all__ = ["About", "Candidate", "HeldOut", "ModelSet", "evaluate"]


class HasFolder(Protocol):
    """Something with a folder: a base, a branch, a merged model."""

    @property
    def folder(self) -> Path:
        """Where."""


Model = str | Path | HasFolder
"""A model as given by a caller: its checkpoint folder, or an object that has one."""


@dataclass(frozen=True)
class Candidate:
    """One model to evaluate.

    Attributes:
        weights: Checkpoint folder, or a LoRA adapter's; None for the base itself.
        fingerprint: Of its content: equal models are measured once, unchanged ones not again.
    """

    weights: Path | None
    fingerprint: str


@dataclass(frozen=True)
class ModelSet:
    """The models of an evaluation.

    Attributes:
        base: The base; its ``settings`` set the dtype of GPU arithmetic.
        models: By name, including ``base``; ``merged`` is compared with the others.
        about: What else is known about them.
    """

    base: Base
    models: Mapping[str, Candidate]
    about: About = field(default_factory=About)

    def __post_init__(self) -> None:
        if "base" not in self.models:
            raise ValueError(f"models must include 'base'; found {sorted(self.models)}")

    @classmethod
    def of(cls, models: Mapping[str, Model]) -> ModelSet:
        """Models by name, ``base`` being an opened :class:`~merit.hf.base.Base`."""
        base = models.get("base")
        if not isinstance(base, Base):
            raise ValueError(f"models['base'] must be what merit.open_base returns; found {type(base).__name__}")
        others = {name: _folder(model) for name, model in models.items() if name != "base"}
        found = {name: Candidate(path, checkpoint.fingerprint(path, base.hashes)) for name, path in others.items()}
        return cls(base, {"base": Candidate(None, base.fingerprint), **found})


def _folder(model: Model) -> Path:
    folder = Path(model) if isinstance(model, str | Path) else model.folder
    return folder / "model" if (folder / "model").is_dir() else folder


@dataclass(frozen=True)
class _Stored:
    """Saved results of one model; its fields are the file's keys, besides a ``checksum`` of them as they lie there."""

    format: int
    key: str
    model: str
    seconds: float
    mixture: ByDataset
    kept: ByDataset
    drift: Drift | None
    unseen: ByDataset = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)  # content of the files with its answers

    def save(self, file: Path) -> Self:
        """Write it, with its checksum."""
        write_json(file, sealed(asdict(self)))
        return self

    def figures(self) -> ModelFigures:
        return ModelFigures(
            {"mixture": self.mixture, "kept": self.kept, "unseen": self.unseen}, self.drift, self.seconds
        )


def evaluate(
    models: Mapping[str, Model] | ModelSet,
    rows: Mapping[str, EncodedDataset] | HeldOut,
    settings: EvaluateSettings | None = None,
    *,
    seed: int = 0,
    folder: Path | None = None,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure every model and compare the merged one with the others.

    Args:
        models: By name, including ``base``; the verdict is about ``merged``.
        rows: The mixture's test rows by dataset, or these, kept sets and unseen tasks. With none of them there is nothing
            to measure: no model is loaded, and the verdict says what to add.
        settings: The recipe's ``evaluate`` block.
        seed: Seed of the draws, the sampling and the bootstrap.
        folder: For results, including those of an earlier, killed call; None: nothing is saved.
        device: Where to compute; CUDA by default if available.
        progress: In rows.

    Returns:
        The evaluation; its ``verdict`` is printed as plain sentences.

    Raises:
        CheckpointError: A model cannot be loaded, or its loss is not finite; the message names model and dataset.
        ResourceError: No room for the base's logits.
    """
    with tempfile.TemporaryDirectory() as scratch:
        settings = settings or EvaluateSettings()
        chosen = models if isinstance(models, ModelSet) else ModelSet.of(models)
        held_out = rows if isinstance(rows, HeldOut) else HeldOut(rows, {})
        names = [name for name in model_order(chosen.models) if settings.branches or not name.startswith("branch-")]
        taking_part = replace(chosen, models={name: chosen.models[name] for name in names})
        questions = Questions(held_out, chosen.base, settings, seed)
        where = (folder or Path(scratch)) / MODELS
        forward = Forward(chosen.base.batcher, device or pick_device("auto"), settings.batch_tokens)
        key = {"seed": seed, **_questions_key(held_out, settings)}
        found = _Measuring(taking_part, questions, where, forward, progress, key).all()
        evaluation = _joined(found, questions, chosen.about, seed)
        if folder is not None:
            evaluation.save(folder)
        return evaluation


def _joined(found: Mapping[str, ModelFigures], questions: Questions, about: About, seed: int) -> Evaluation:
    sets = {part: {name: figures.sets[part] for name, figures in found.items()} for part in PARTS}
    drifts = {name: figures.drift for name, figures in found.items() if figures.drift is not None}
    summary = summarise(sets, drifts, about, short=questions.short, seed=seed)
    return Evaluation(
        sets,
        drifts,
        summary,
        reused=tuple(name for name, figures in found.items() if figures.reused),
        seconds={name: figures.seconds for name, figures in found.items()},
    )


def _questions_key(rows: HeldOut, settings: EvaluateSettings) -> dict[str, object]:
    """What determines a model's figures besides the model; batch size, device and paths do not."""

    def content(datasets: Mapping[str, EncodedDataset]) -> dict[str, list[str]]:
        return {name: [part.fingerprint, fingerprint(part.answers)] for name, part in datasets.items()}

    source = rows.test or rows.kept
    measured = {part: content(rows.of(part)) if settings.heldout or part != "mixture" else {} for part in PARTS}
    fields = {"max_examples", "exact_match", "short_answer", "max_new_tokens", "drift"}
    return {
        "format": FORMAT,
        "settings": settings.model_dump(mode="json", include=fields),
        "rows": measured,
        "prompts": content(source) if settings.drift.prompts else None,
    }


class _Measuring:
    """Figures by model: read if they exist, taken from a model of the same content, or measured now."""

    def __init__(
        self,
        chosen: ModelSet,
        questions: Questions,
        folder: Path,
        forward: Forward,
        progress: Progress,
        key: Mapping[str, object],
    ) -> None:
        self._chosen, self._questions, self._folder, self._progress = chosen, questions, folder, progress
        self._forward = replace(forward, on_batch=self._tick)
        self._done, self._total, self._label = 0, 0, ""
        common = {**key, "base": chosen.models["base"].fingerprint, "dtype": chosen.base.settings.dtype}
        self._keys = {name: fingerprint({**common, "model": m.fingerprint}) for name, m in chosen.models.items()}

    def all(self) -> dict[str, ModelFigures]:
        """Figures of every model, in order."""
        names = list(self._chosen.models)
        if not self._questions.size:
            return {name: ModelFigures({part: {} for part in PARTS}, None, 0.0) for name in names}
        stored = {name: item for name in names if (item := self._read(name)) is not None}
        found = {name: replace(item.figures(), reused=True) for name, item in stored.items()}
        first = {key: name for name, key in reversed(self._keys.items())}
        pending = [name for name in names if name not in stored and first[self._keys[name]] == name]
        self._total = len(pending) * self._questions.size
        if pending and self._questions.wants_base and "base" not in pending:
            self._questions.ask_base(load_model(self._chosen.base, self._forward.device), self._folder, self._forward)
        for name in pending:
            stored[name] = self._measure(name)
            found[name] = stored[name].figures()
        for name in names:
            if name not in stored:
                twin = replace(stored[first[self._keys[name]]], model=name, seconds=0.0)
                found[name] = self._keep(twin).figures()
        return {name: found[name] for name in names}

    def _measure(self, name: str) -> _Stored:
        self._label = name
        started = time.monotonic()
        model = load_model(self._chosen.base, self._forward.device, weights=self._chosen.models[name].weights)
        if name == "base" and self._questions.wants_base:
            self._questions.ask_base(model, self._folder, self._forward)
        measured = self._questions.ask(name, model, self._folder, self._forward)
        del model
        gc.collect()
        if self._forward.device.type == "cuda":
            torch.cuda.empty_cache()
        seconds = round(time.monotonic() - started, 3)
        sets = measured.sets
        item = _Stored(
            FORMAT, self._keys[name], name, seconds, sets["mixture"], sets["kept"], measured.drift, sets["unseen"]
        )
        return self._keep(item)

    def _keep(self, item: _Stored) -> _Stored:
        return replace(item, answers=self._answers(item.model)).save(self._file(item.model))

    def _answers(self, name: str) -> dict[str, str]:
        names = [answers_file(name), *([ANSWERS_OF_THE_BASE] if name == "base" else [])]
        return {file: content_hash(self._folder / file) for file in names if (self._folder / file).is_file()}

    def _read(self, name: str) -> _Stored | None:
        with suppress(RunFolderError):  # missing or damaged: measured again
            raw = read_json(self._file(name))
            # As it lies there: an unknown key, ignored below, may have been a known one.
            if not isinstance(raw, dict) or raw.get("checksum") != checksum(raw):
                return None
            item = read_as(self._file(name), _Stored)
            if item.answers == self._answers(name) and item.key == self._keys[name] and item.format == FORMAT:
                return item
        return None

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _tick(self, rows: int) -> None:
        self._done += rows
        self._progress(min(self._done, self._total), self._total, self._label)
