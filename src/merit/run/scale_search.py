"""Choosing λ of θ0 + λ(θ̄ − θ0) for a run: which held-out rows are measured, and what is written of the curve.

The line, the rule and the drawing are :mod:`merit.merge.scale`'s. The search reads test rows that the evaluation does not
use, where a dataset has some to spare; where it has not, the same rows are read, and the record says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from merit.hf.rows import EncodedRow
    from merit.mixture import EncodedDataset
    from merit.run.chain import Pipeline

ROWS = 50
"""Most rows per dataset and λ: the curve is a mean over datasets, so a few dozen rows each fix it well."""
_SPARE = 8  # fewer unused rows than this are too few to stand for a dataset


def choose_scale(pipeline: Pipeline, merged: Path, folder: Path) -> tuple[dict[str, Any], str]:
    """Measure the recipe's grid of λ in memory and pick one by its rule.

    Learned: mean over datasets of the held-out loss per target token. Kept: the same on the kept sets; without such sets,
    the divergence from the base on the base's own answers (nats per token).

    Args:
        pipeline: The run.
        merged: The plain merge (λ = 1).
        folder: For what is needed meanwhile.

    Returns:
        For the record: rule, chosen λ, points (scale, learned, kept), what kept means, and datasets whose rows the
        evaluation reads too; and the curve as an SVG drawing.
    """
    from merit.hf.models import load_model
    from merit.merge.scale import as_record, pick_scale, search_scale, trade_off_svg
    from merit.mixture.stage import load_split

    recipe, device = pipeline.recipe, pipeline.device
    test, shared = spare_rows(pipeline, load_split(pipeline.run_folder / "mixture", "test"), "mixture")
    kept, shared_kept = spare_rows(pipeline, load_split(pipeline.run_folder / "mixture", "kept"), "kept")
    model = load_model(pipeline.base, device)
    drift = None if kept else _drift_from(pipeline, model, test, folder)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = load_model(pipeline.base, device, merged).state_dict()
    scales = sorted({0.0, 1.0, *recipe.merge.scales})

    with pipeline.reporter.progress("scales") as tick:
        done = 0

        def measure(current: Any) -> tuple[float, float]:
            nonlocal done
            tick(done, len(scales), f"λ = {scales[done]:g}")
            found = (
                _mean_loss(pipeline, current, test),
                drift(current) if drift else _mean_loss(pipeline, current, kept),
            )
            done += 1
            return found

        points = search_scale(model, base, other, measure, scales)
    chosen = pick_scale(points, recipe.merge.rule)
    record = {
        **as_record(points, chosen, recipe.merge.rule),
        "kept": "held-out loss on the kept sets"
        if kept
        else "divergence from the base on its own answers (nats per token)",
        "rows_shared_with_evaluation": sorted({*shared, *shared_kept}),
    }
    return record, trade_off_svg(points, chosen)


def spare_rows(
    pipeline: Pipeline, datasets: Mapping[str, EncodedDataset], part: str
) -> tuple[dict[str, list[EncodedRow]], list[str]]:
    """Up to ``ROWS`` rows per dataset that the evaluation does not read, and the names of datasets without such rows."""
    from merit.mixture import draw

    limit = pipeline.recipe.evaluate.max_examples
    rows: dict[str, list[EncodedRow]] = {}
    shared: list[str] = []
    for name, dataset in datasets.items():
        order = draw(len(dataset), len(dataset), pipeline.recipe.seed, name, purpose=f"evaluate {part}")
        spare = order[limit:] if limit is not None else order[:0]
        if len(spare) < _SPARE:
            shared.append(name)
            spare = order
        rows[name] = [dataset[int(i)] for i in np.sort(spare[:ROWS])]
    return rows, shared


def _mean_loss(pipeline: Pipeline, model: Any, datasets: Mapping[str, list[EncodedRow]]) -> float:
    """Unweighted mean over datasets of the loss per target token (nats)."""
    from merit.evaluation.heldout import row_losses
    from merit.hf.models import autocast

    rows = [row for held in datasets.values() for row in held]
    settings, batcher = pipeline.recipe.evaluate, pipeline.base.batcher
    with autocast(pipeline.recipe.model, pipeline.device):
        losses, counts = row_losses(
            model, rows, batcher=batcher, device=pipeline.device, batch_tokens=settings.batch_tokens
        )
    owner = np.repeat(np.arange(len(datasets)), [len(held) for held in datasets.values()])
    return float(np.mean(np.bincount(owner, weights=losses) / np.bincount(owner, weights=counts)))


def _drift_from(
    pipeline: Pipeline, base: Any, datasets: Mapping[str, list[EncodedRow]], folder: Path
) -> Callable[[Any], float]:
    """Divergence from the base on answers that it samples now, as a function of a model."""
    from merit.evaluation import drift
    from merit.evaluation.heldout import end_tokens

    settings, batcher, device = pipeline.recipe.evaluate, pipeline.base.batcher, pipeline.device
    chosen = drift.choose_prompts(
        {name: len(rows) for name, rows in datasets.items()}, settings.drift.prompts or 64, pipeline.recipe.seed
    )
    prompts = [datasets[name][i].prompt() for name, i in chosen]
    answers = drift.sample_answers(
        base,
        prompts,
        settings.drift.tokens,
        ends=end_tokens(datasets, pipeline.base.tokenizer),
        batcher=batcher,
        device=device,
        batch_tokens=settings.batch_tokens,
        seed=pipeline.recipe.seed,
    )
    pairs = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if len(answer)]
    reference = drift.Reference.of_base(
        base, [prompt for prompt, _ in pairs], [answer for _, answer in pairs], folder, batcher=batcher, device=device
    )
    return lambda model: float(drift.measure_drift(model, reference, batcher=batcher, device=device)["kl"])
