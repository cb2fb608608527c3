"""How a λ of θ0 + λ(θ̄ − θ0) is judged in a run: which held-out rows are measured, on a model that moves along the line.

The search reads the choosing half where the evaluation reports on the other one (``weights: auto`` in the run or the study).
Elsewhere it reads test rows that the evaluation does not use, if a dataset has some to spare; otherwise it reads the same
rows, and the record says so. The grid and the rule are in :mod:`merit.merge.weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from merit.errors import MergeError
from merit.evaluation import drift
from merit.evaluation.forward import Forward
from merit.evaluation.halves import halves_of
from merit.evaluation.heldout import end_tokens, row_losses
from merit.hf.models import autocast, load_model
from merit.hf.rows import EncodedRow
from merit.merge.line import Line
from merit.merge.weights import Judge, Losses
from merit.mixture import EncodedDataset, draw, load_split
from merit.run.session import Session

ROWS = 50
"""Maximum rows per dataset and λ: the curve is a mean over datasets, so a few dozen rows each are enough."""
_SPARE = 8  # fewer unused rows than this are too few to represent a dataset


def judge_scales(session: Session, halved: bool, merged: Path, folder: Path) -> Judge:
    """A model that is moved to a λ and measured.

    Learned: mean over datasets of the held-out loss per target token. Kept: the same on the kept sets; without such sets,
    the divergence from the base on the base's own answers (nats per token).

    Args:
        session: The command's session.
        halved: The evaluation reads the reporting half alone.
        merged: The plain merge (λ = 1).
        folder: For temporary files.

    Raises:
        MergeError: The choosing half has no row of the mixture.
    """
    sets = {part: load_split(session.run / "mixture", part) for part in ("test", "kept")}
    if halved:
        test, kept = choosing_rows(session, sets["test"], sets["kept"])
        shared: list[str] = []
        shared_kept: list[str] = []
    else:
        test, shared = spare_rows(session, sets["test"], "mixture")
        kept, shared_kept = spare_rows(session, sets["kept"], "kept")
    model = load_model(session.base, session.device)
    distance = None if kept else _drift_from(session, model, test, folder)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    line = Line(model, base, load_model(session.base, session.device, merged).state_dict())

    def losses(scale: float) -> Losses:
        line.move(scale)
        return Losses(
            _mean_loss(session, model, test), distance(model) if distance else _mean_loss(session, model, kept)
        )

    return Judge(
        losses,
        "held-out loss on the kept sets" if kept else "divergence from the base on its own answers (nats per token)",
        tuple(sorted({*shared, *shared_kept})),
    )


def choosing_rows(
    session: Session, test: Mapping[str, EncodedDataset], kept: Mapping[str, EncodedDataset]
) -> tuple[dict[str, list[EncodedRow]], dict[str, list[EncodedRow]]]:
    """Up to ``ROWS`` rows per dataset of the half that does not report: of the test sets, and of the kept sets.

    Raises:
        MergeError: No test row is in that half.
    """
    halves, found = halves_of(test, kept, session.recipe.seed), []
    for part, datasets in (("test", test), ("kept", kept)):
        rows: dict[str, list[EncodedRow]] = {}
        for name, mine in halves[part].choosing.items():
            order = draw(len(mine), ROWS, session.recipe.seed, name, purpose=f"scale search {part}")
            if mine:
                rows[name] = [datasets[name][mine[int(i)]] for i in np.sort(order)]
        found.append(rows)
    if not found[0]:
        raise MergeError(
            "merge.scale: auto needs held-out rows that do not report, and none are left in the mixture.",
            "Give the datasets test rows (test.jsonl), or a number.",
        )
    return found[0], found[1]


def spare_rows(
    session: Session, datasets: Mapping[str, EncodedDataset], part: str
) -> tuple[dict[str, list[EncodedRow]], list[str]]:
    """Up to ``ROWS`` rows per dataset that the evaluation does not read, and the names of datasets without such rows."""
    limit = session.recipe.evaluate.max_examples
    rows: dict[str, list[EncodedRow]] = {}
    shared: list[str] = []
    for name, dataset in datasets.items():
        order = draw(len(dataset), len(dataset), session.recipe.seed, name, purpose=f"evaluate {part}")
        spare = order[limit:] if limit is not None else order[:0]
        if len(spare) < _SPARE:
            shared.append(name)
            spare = order
        rows[name] = [dataset[int(i)] for i in np.sort(spare[:ROWS])]
    return rows, shared


def _mean_loss(session: Session, model: PreTrainedModel, datasets: Mapping[str, list[EncodedRow]]) -> float:
    """Unweighted mean over datasets of the loss per target token (nats)."""
    rows = [row for held in datasets.values() for row in held]
    forward = Forward(session.base.batcher, session.device, session.recipe.evaluate.batch_tokens)
    with autocast(session.recipe.model, session.device):
        losses, counts = row_losses(model, rows, forward)
    owner = np.repeat(np.arange(len(datasets)), [len(held) for held in datasets.values()])
    return float(np.mean(np.bincount(owner, weights=losses) / np.bincount(owner, weights=counts)))


def drift_reference(
    session: Session, base: PreTrainedModel, datasets: Mapping[str, list[EncodedRow]], folder: Path
) -> drift.Reference:
    """The base on freshly sampled answers to prompts of ``datasets``; its logits are in a temporary file in ``folder``."""
    settings = session.recipe.evaluate
    forward = Forward(session.base.batcher, session.device, settings.batch_tokens)
    sizes = {name: len(rows) for name, rows in datasets.items()}
    chosen = drift.choose_prompts(sizes, settings.drift.prompts or 64, session.recipe.seed)
    prompts = [datasets[name][i].prompt() for name, i in chosen]
    ends = end_tokens(datasets, session.base.tokenizer)
    answers = drift.sample_answers(base, prompts, settings.drift.tokens, ends, forward, session.recipe.seed)
    pairs = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if len(answer)]
    return drift.Reference.of_base(
        base, [prompt for prompt, _ in pairs], [answer for _, answer in pairs], folder, forward
    )


def _drift_from(
    session: Session, base: PreTrainedModel, datasets: Mapping[str, list[EncodedRow]], folder: Path
) -> Callable[[PreTrainedModel], float]:
    """Divergence from the base on freshly sampled answers, as a function of a model."""
    forward = Forward(session.base.batcher, session.device, session.recipe.evaluate.batch_tokens)
    reference = drift_reference(session, base, datasets, folder)
    return lambda model: drift.measure_drift(model, reference, forward).kl
