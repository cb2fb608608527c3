"""Every model of a run on the same held-out rows: results, summary and verdict in one folder.

It joins the measurements of this package: draws the rows once, loads each model once, keeps what is done per model (so a
killed evaluation goes on from there), and writes the tables. It chooses neither the models nor the folder, and knows
nothing of how the models were made.

::

    results.json   {model: {dataset: {loss, exact_match, examples, target_tokens}}} over the mixture's test sets
    kept.json      the same over the kept sets
    drift.json     {model: {kl, top1_agreement, ...}}
    summary.json   macro averages, paired differences with intervals, the verdict
    table.md       the same for reading
    models/        one file per measured model, its greedy answers, the base's sampled answers
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merit.errors import CheckpointError, RunFolderError
from merit.evaluation import drift, heldout
from merit.evaluation.summary import model_order, summarise
from merit.evaluation.text import exact_match
from merit.files import fingerprint, read_json, write_json, write_text
from merit.hf.models import autocast, load_model
from merit.mixture.calibration import draw
from merit.recipe.schema import EvaluateSettings, Recipe
from merit.report.evaluation import markdown

if TYPE_CHECKING:
    import torch

    from merit.hf.base import Base
    from merit.hf.rows import EncodedRow
    from merit.mixture.encode import EncodedDataset

__all__ = ["evaluate_models"]

FORMAT = 1
"""Version of the per-model files; another version is measured again."""


@dataclass
class _Set:
    """The rows of one dataset that are measured, the same for every model."""

    part: str
    name: str
    rows: list[EncodedRow]
    limit: int | None
    """Most new tokens of a greedy answer; None: no exact match here."""


@dataclass
class _Job:
    """What stays the same from model to model."""

    recipe: Recipe
    sets: list[_Set]
    base: Base
    device: torch.device
    folder: Path
    progress: Callable[..., None] | None
    ends: tuple[int, ...] = ()
    prompts: list[tuple[str, int, EncodedRow]] = field(default_factory=list)
    reference: drift.Reference | None = None
    done: int = 0
    total: int = 0
    label: str = ""

    def tick(self, rows: int) -> None:
        self.done += rows
        if self.progress:
            self.progress(min(self.done, self.total), self.total, self.label)


def evaluate_models(
    recipe: Recipe,
    models: Mapping[str, Path | None],
    test: Mapping[str, EncodedDataset],
    kept: Mapping[str, EncodedDataset],
    folder: Path,
    *,
    base: Base,
    device: torch.device,
    fingerprints: Mapping[str, str],
    trained_tokens: Mapping[str, int] | None = None,
    about: Mapping[str, str] | None = None,
    method: str | None = None,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Measure every model, then write results, summary, verdict and table into ``folder``.

    Args:
        recipe: Its ``evaluate`` block, ``model`` and ``seed`` are read.
        models: Checkpoint folder by model name, None for the base itself; ``base`` must be among them.
        test: The mixture's held-out rows by dataset; may be empty.
        kept: Held-out rows of what the base already knew, by dataset; may be empty. With neither there is nothing to
            measure: no model is loaded, and the verdict says what to add.
        folder: Where the files go; ``models/`` in it may hold what an earlier, killed call measured.
        base: The base.
        device: Where to compute.
        fingerprints: Content of every model, by name; a model whose content, settings and rows are unchanged is not
            measured again, and two names with the same content are measured once.
        trained_tokens: Target tokens that each model was trained on, for the table and for what the verdict says of
            budgets.
        about: Short remark by model name on how it was made, where that is not the plain way (``operator ties``,
            ``scale 0.5``, ``without branch 1``); shown under the table and in the verdict.
        method: Split method that ``merged`` was made with; ``recipe.split.method`` by default.
        progress: Called as ``progress(done, total, label)``, in rows.

    Returns:
        For the stage's record: ``models`` (measured names in order), ``reused`` (those taken from an earlier call),
        ``seconds_by_model`` and ``verdict``.

    Raises:
        CheckpointError: A model cannot be loaded, or its loss is not finite: model and dataset are named.
        ResourceError: No room for the base's logits.
    """
    settings = recipe.evaluate
    if "base" not in models:
        raise ValueError(f"models must hold 'base'; found {sorted(models)}")
    names = [name for name in model_order(models) if settings.branches or not name.startswith("branch-")]
    parts = {"mixture": dict(test) if settings.heldout else {}, "kept": dict(kept)}
    sets = [_draw(part, name, rows, recipe) for part, sets in parts.items() for name, rows in sets.items() if len(rows)]
    job = _Job(recipe, sets, base, device, folder, progress)
    measured: dict[str, Any] = {f"{item.part}/{item.name}": item.rows for item in sets}
    job.ends = heldout.end_tokens(measured or dict(test), base.tokenizer)
    source = test or kept
    chosen = drift.choose_prompts(
        {name: len(rows) for name, rows in source.items()}, settings.drift.prompts, recipe.seed
    )
    job.prompts = [(name, row, source[name][row].prompt()) for name, row in chosen]
    keys = {name: _key(recipe, parts, source, fingerprints[name], fingerprints["base"]) for name in names}
    found = _measure_all(job, names, models, keys)
    labels = {"trained_tokens": trained_tokens, "about": about, "method": method or recipe.split.method}
    return _write(job, names, found, labels)


def _draw(part: str, name: str, dataset: EncodedDataset, recipe: Recipe) -> _Set:
    settings = recipe.evaluate
    count = len(dataset) if settings.max_examples is None else settings.max_examples
    rows = [dataset[int(i)] for i in np.sort(draw(len(dataset), count, recipe.seed, name, purpose=f"evaluate {part}"))]
    lengths = heldout.answer_lengths(rows, recipe.train.max_length)
    return _Set(part, name, rows, _limit(part, lengths, settings))


def _limit(part: str, lengths: np.ndarray, settings: EvaluateSettings) -> int | None:
    """Most new tokens of a greedy answer, None where exact match is not measured.

    Under ``auto`` a dataset of the mixture must have short answers (``short_answer``); for a kept set it is enough that
    its answers fit ``max_new_tokens``, since a verbose sentence that is no longer reproduced shows a lost style.
    """
    if settings.exact_match == "never":
        return None
    longest = settings.short_answer if part == "mixture" else settings.max_new_tokens
    if settings.exact_match == "auto" and not heldout.is_short_answer(lengths, longest):
        return None
    return heldout.answer_limit(lengths, settings.max_new_tokens)


def _key(
    recipe: Recipe,
    parts: Mapping[str, Mapping[str, EncodedDataset]],
    source: Mapping[str, EncodedDataset],
    model: str,
    base: str,
) -> str:
    """What decides a model's figures; batch size, device and paths do not."""

    def content(sets: Mapping[str, EncodedDataset]) -> dict[str, list[str]]:
        return {name: [rows.fingerprint, fingerprint(rows.answers)] for name, rows in sets.items()}

    settings = recipe.evaluate
    return fingerprint(
        {
            "format": FORMAT,
            "model": model,
            "base": base,
            "dtype": recipe.model.dtype,
            "max_length": recipe.train.max_length,
            "seed": recipe.seed,
            "settings": settings.model_dump(
                mode="json", include={"max_examples", "exact_match", "short_answer", "max_new_tokens", "drift"}
            ),
            "rows": {part: content(sets) for part, sets in parts.items()},
            "prompts": content(source) if settings.drift.prompts else None,
        }
    )


def _measure_all(
    job: _Job, names: Sequence[str], models: Mapping[str, Path | None], keys: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Figures by model: read where they stand, taken from a model of the same content, or measured now."""
    if not job.sets and not job.prompts:
        return {name: {"mixture": {}, "kept": {}, "drift": None, "seconds": 0.0} for name in names}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        with suppress(RunFolderError):
            stored = read_json(_model_file(job.folder, name))
            if isinstance(stored, dict) and stored.get("key") == keys[name]:
                found[name] = {**stored, "reused": True}
    twins = {key: name for name, key in reversed([(name, keys[name]) for name in names])}
    pending = [name for name in names if name not in found and twins[keys[name]] == name]
    job.total = len(pending) * sum(len(item.rows) * (1 if item.limit is None else 2) for item in job.sets)
    job.total += len(pending) * len(job.prompts)
    if pending and job.prompts and "base" not in pending:
        _prepare_drift(job, load_model(job.base, job.device))
    for name in pending:
        job.label = name
        started = time.monotonic()
        model = load_model(job.base, job.device, weights=models[name])
        if name == "base" and job.prompts:
            _prepare_drift(job, model)
        figures = _measure(job, name, model)
        del model
        _free(job.device)
        seconds = round(time.monotonic() - started, 3)
        found[name] = {"format": FORMAT, "key": keys[name], "model": name, "seconds": seconds, **figures}
        write_json(_model_file(job.folder, name), found[name])
    for name in names:
        if name not in found:
            found[name] = {**found[twins[keys[name]]], "model": name, "seconds": 0.0, "reused": False}
            write_json(_model_file(job.folder, name), found[name])
    return found


def _model_file(folder: Path, name: str) -> Path:
    return folder / "models" / f"{name}.json"


def _prepare_drift(job: _Job, base: Any) -> None:
    """Sample the base's answers and keep its logits on them; the same answers whenever it is done again."""
    settings = job.recipe.evaluate
    answers = drift.sample_answers(
        base,
        [prompt for _, _, prompt in job.prompts],
        settings.drift.tokens,
        ends=job.ends,
        batcher=job.base.batcher,
        device=job.device,
        batch_tokens=settings.batch_tokens,
        seed=job.recipe.seed,
    )
    pairs = [(item, answer) for item, answer in zip(job.prompts, answers, strict=True) if len(answer)]
    if not pairs:
        return
    (job.folder / "models").mkdir(parents=True, exist_ok=True)
    job.reference = drift.Reference.of_base(
        base,
        [prompt for (_, _, prompt), _ in pairs],
        [answer for _, answer in pairs],
        job.folder / "models",
        batcher=job.base.batcher,
        device=job.device,
    )
    shown = [
        {"dataset": name, "row": row, "answer": job.base.tokenizer.decode(answer.tolist()), "tokens": len(answer)}
        for (name, row, _), answer in pairs
    ]
    write_json(job.folder / "models" / "answers-of-the-base.json", shown)


def _measure(job: _Job, name: str, model: Any) -> dict[str, Any]:
    """Figures of one loaded model: ``mixture`` and ``kept`` by dataset, and ``drift``."""
    settings, batcher = job.recipe.evaluate, job.base.batcher
    options: dict[str, Any] = {"device": job.device, "on_batch": job.tick}
    rows = [row for item in job.sets for row in item.rows]
    asked = [(item, row) for item in job.sets if item.limit is not None for row in item.rows]
    with autocast(job.recipe.model, job.device):
        losses, counts = heldout.row_losses(model, rows, batcher=batcher, batch_tokens=settings.batch_tokens, **options)
        answers = heldout.greedy_answers(
            model,
            [row for _, row in asked],
            [item.limit or 0 for item, _ in asked],
            job.base.tokenizer,
            batcher=batcher,
            ends=job.ends,
            batch_tokens=settings.batch_tokens,
            **options,
        )
    matches = [exact_match(answer, row.answer) for answer, (_, row) in zip(answers, asked, strict=True)]
    figures: dict[str, Any] = {"mixture": {}, "kept": {}, "drift": None}
    start = start_asked = 0
    for item in job.sets:
        stop = start + len(item.rows)
        loss = _mean_loss(losses[start:stop], counts[start:stop], name, item)
        matched: float | None = None
        if item.limit is not None:
            matched = float(np.mean(matches[start_asked : start_asked + len(item.rows)]))
            start_asked += len(item.rows)
        figures[item.part][item.name] = {
            "loss": loss,
            "exact_match": matched,
            "examples": len(item.rows),
            "target_tokens": int(counts[start:stop].sum()),
        }
        start = stop
    _write_answers(job, name, asked, answers, matches)
    if job.reference is not None:
        try:
            figures["drift"] = drift.measure_drift(model, job.reference, batcher=batcher, **options)
        except CheckpointError as error:
            raise CheckpointError(f"evaluate: model {name}: {error.message}", *error.ways_out) from None
    return figures


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
            "A model with such losses has diverged or holds non-finite weights: lower train.learning_rate and train again.",
            "No results were written; models measured before this one are kept.",
        )
    return loss


def _write_answers(
    job: _Job, name: str, asked: Sequence[tuple[_Set, EncodedRow]], answers: Sequence[str], matches: Sequence[bool]
) -> None:
    """The model's greedy answers beside the references, one JSON object per line, for people to look at."""
    lines = [
        json.dumps(
            {"part": item.part, "dataset": item.name, "match": match, "answer": answer, "reference": row.answer},
            ensure_ascii=False,
        )
        for (item, row), answer, match in zip(asked, answers, matches, strict=True)
    ]
    if lines:
        write_text(job.folder / "models" / f"{name}.answers.jsonl", "\n".join(lines) + "\n")


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def _write(
    job: _Job, names: Sequence[str], found: Mapping[str, Mapping[str, Any]], labels: Mapping[str, Any]
) -> dict[str, Any]:
    recipe, folder = job.recipe, job.folder
    results, kept = ({name: found[name][part] for name in names} for part in ("mixture", "kept"))
    drifts = {name: found[name]["drift"] for name in names if found[name]["drift"] is not None}
    summary = summarise(
        results,
        kept,
        drifts,
        short={item.name for item in job.sets if item.part == "mixture" and _is_short(item, recipe)},
        seed=recipe.seed,
        **labels,
    )
    write_json(folder / "results.json", results)
    write_json(folder / "kept.json", kept)
    write_json(folder / "drift.json", drifts)
    write_json(folder / "summary.json", summary)
    write_text(folder / "table.md", markdown(summary, results, kept))
    return {
        "models": list(names),
        "reused": [name for name in names if found[name].get("reused")],
        "seconds_by_model": {name: found[name]["seconds"] for name in names},
        "verdict": summary["verdict"],
    }


def _is_short(item: _Set, recipe: Recipe) -> bool:
    lengths = heldout.answer_lengths(item.rows, recipe.train.max_length)
    return heldout.is_short_answer(lengths, recipe.evaluate.short_answer)
