"""Drift: how far a model has moved from the base on the base's own answers. Needs prompts only, no reference answers.

The base answers held-out prompts by sampling at temperature 1. At every position of those answers, base and model give a
distribution over the vocabulary; drift is the mean over positions of KL(base‖model) = Σ_v p_base(v) [ln p_base(v) −
ln p_model(v)], in nats per token. The expectation over the sampled prefixes is Monte Carlo, the divergence at each of them
is exact (float64), so the figure is never negative, has less variance than ln p_base − ln p_model of the sampled token
alone, and both estimate the same quantity: KL of whole answers per token, by the chain rule. The base's drift is 0.

Drift alone is neither good nor bad. A model that learned nothing has none; read it next to what was learned.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel

from merit.errors import CheckpointError
from merit.evaluation.decode import decode
from merit.evaluation.figures import Drift
from merit.evaluation.forward import Forward, logits_tokens
from merit.files import require_space
from merit.hf.batches import iterate_batches, length_sorted_batches
from merit.hf.rows import EncodedRow

__all__ = ["Reference", "choose_prompts", "measure_drift", "sample_answers"]

_BATCH_LOGITS = 2**26  # entries: 270 MB of float32 logits per forward pass
_CHUNK_LOGITS = 2**22  # entries: 34 MB of float64 per comparison


def choose_prompts(rows: Mapping[str, int], count: int, seed: int) -> list[tuple[str, int]]:
    """Spread ``count`` prompts as evenly over the datasets as their rows allow.

    Datasets take turns in a seeded order, each giving its next row of its own seeded order, so the choice does not depend
    on the order of ``rows``.

    Args:
        rows: Number of rows by dataset.
        count: Requested prompts; fewer are returned if the datasets have fewer.
        seed: Seed of both orders.

    Returns:
        (dataset, row) pairs.
    """
    names = sorted(rows)
    turns = [names[i] for i in np.random.default_rng([seed, 0]).permutation(len(names))]
    queues = {
        name: iter(np.random.default_rng([seed, 1, *name.encode()]).permutation(rows[name]).tolist()) for name in names
    }
    chosen: list[tuple[str, int]] = []
    while turns and len(chosen) < count:
        for name in list(turns):
            row = next(queues[name], None)
            if row is None:
                turns.remove(name)
            elif len(chosen) < count:
                chosen.append((name, row))
    return chosen


def sample_answers(
    model: PreTrainedModel,
    prompts: Sequence[EncodedRow],
    longest: int,
    ends: Collection[int],
    forward: Forward,
    seed: int,
) -> list[np.ndarray]:
    """One answer per prompt, sampled from the model at temperature 1.

    Every row draws from its own stream, seeded by ``seed`` and the row's place, so batching does not change an answer
    beyond float rounding.

    Args:
        model: The base.
        prompts: Rows to be continued.
        longest: Maximum tokens per answer, including the end token.
        ends: Ids that end an answer.
        forward: How rows go through the model.
        seed: Seed of the sampling.

    Returns:
        Token ids per answer; empty if the prompt fills the model's context.
    """
    uniforms = [np.random.default_rng([seed, 2, i]).random(longest) for i in range(len(prompts))]
    return decode(model, prompts, [longest] * len(prompts), ends, forward, uniforms)


@dataclass(frozen=True)
class Reference:
    """The base's logits at every position of its sampled answers.

    Attributes:
        rows: Prompt and answer as one row each, the answer's tokens being the targets; no answer is empty.
        offsets: (P + 1,) int64; answer i has positions ``offsets[i]:offsets[i + 1]``.
        logits: (N, V) float32, in a temporary file that is removed with the process.
    """

    rows: list[EncodedRow]
    offsets: np.ndarray
    logits: np.ndarray

    @classmethod
    def of_base(
        cls,
        model: PreTrainedModel,
        prompts: Sequence[EncodedRow],
        answers: Sequence[np.ndarray],
        folder: Path,
        forward: Forward,
    ) -> Reference:
        """Run the base over its own answers and keep its logits.

        Raises:
            ResourceError: ``folder``'s disk has no room for them.
        """
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            length = len(prompt.input_ids)
            ids = np.concatenate([prompt.input_ids, answer]).astype(np.int32)
            rows.append(EncodedRow(ids, np.arange(len(ids)) >= length, prompt_length=length, images=prompt.images))
        offsets = np.concatenate([[0], np.cumsum([len(answer) for answer in answers])]).astype(np.int64)
        vocabulary = _vocabulary(model)
        require_space(
            folder,
            int(offsets[-1]) * vocabulary * 4,
            "the base's logits, in a temporary file,",
            "Lower evaluate.drift.prompts or evaluate.drift.tokens (0 prompts turn the measure off), or free some space.",
        )
        with tempfile.TemporaryFile(dir=folder) as file:
            logits = np.memmap(file, dtype=np.float32, mode="w+", shape=(int(offsets[-1]), vocabulary))
        reference = cls(rows, offsets, logits)
        for i, found in reference.passes(model, forward):
            logits[offsets[i] : offsets[i + 1]] = found.cpu().numpy()
        return reference

    def passes(self, model: PreTrainedModel, forward: Forward) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (answer i, the model's float32 logits at its positions); the same batches for every model."""
        lengths = [len(row.input_ids) for row in self.rows]
        batches = length_sorted_batches(lengths, logits_tokens(model, _BATCH_LOGITS))
        for group, batch in iterate_batches(self.rows, batches, forward.batcher, forward.device):
            with torch.no_grad():  # never around a yield: a generator left early would leave the mode behind
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                logits = model(**inputs, use_cache=False).logits
            for b, i in enumerate(group):
                row = self.rows[int(i)]
                yield int(i), logits[b, row.prompt_length - 1 : len(row.input_ids) - 1].float()


def measure_drift(model: PreTrainedModel, reference: Reference, forward: Forward) -> Drift:
    """Exact KL(base‖model) at every position of the base's answers, in float64 from float32 logits.

    Args:
        model: Any model with the base's vocabulary, in eval mode on ``device``.
        reference: The base's logits.
        forward: How rows go through the model.

    Raises:
        CheckpointError: The model's vocabulary has a different size, or its logits are not finite.
    """
    sums, agreed = np.zeros(len(reference.rows)), 0
    vocabulary = reference.logits.shape[1]
    step = max(1, _CHUNK_LOGITS // vocabulary)
    for i, found in reference.passes(model, forward):
        if found.shape[-1] != vocabulary:
            raise CheckpointError(
                f"The model predicts {found.shape[-1]} tokens and the base {vocabulary}; drift needs the same vocabulary."
            )
        for start in range(0, len(found), step):
            theirs = found[start : start + step]
            first = int(reference.offsets[i]) + start
            base = torch.from_numpy(np.array(reference.logits[first : first + len(theirs)])).to(forward.device)
            log_p, log_q = base.double().log_softmax(dim=-1), theirs.double().log_softmax(dim=-1)
            terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))  # 0 · ln 0 = 0
            sums[i] += float(terms.sum())
            agreed += int((base.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
        forward.on_batch(1)
    if not np.isfinite(sums).all():
        raise CheckpointError("The model's logits on the base's answers are not finite.")
    counts = np.diff(reference.offsets)
    return Drift(
        kl=float(sums.sum() / counts.sum()),
        top1_agreement=agreed / int(counts.sum()),
        tokens=int(counts.sum()),
        prompts=len(counts),
        kl_sums=tuple(sums.tolist()),
        token_counts=tuple(counts.tolist()),
    )


def _vocabulary(model: PreTrainedModel) -> int:
    head = cast(Callable[[], torch.nn.Linear], model.get_output_embeddings)
    return int(head().weight.shape[0])
