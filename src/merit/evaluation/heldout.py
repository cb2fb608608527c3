"""Held-out loss per target token and exact match of greedy answers: what a model does with rows it was not trained on.

**Loss** (nats per target token): the training loss of :func:`merit.hf.batches.target_losses`, summed over a dataset's target
tokens and divided by their number, so a dataset's figure weighs tokens; the macro average over datasets weighs datasets.
**Exact match** (share of rows): the greedy answer to the row's last prompt equals its reference after
:func:`merit.evaluation.text.normalise`. It is measured where answers are short enough for equality to mean something.

Averages over datasets and comparisons of models are made elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from merit.evaluation.decode import decode
from merit.evaluation.forward import Forward, logits_tokens
from merit.hf.batches import iterate_batches, length_sorted_batches, target_losses
from merit.hf.rows import EncodedRow

__all__ = ["answer_lengths", "answer_limit", "end_tokens", "greedy_answers", "is_short_answer", "row_losses"]

LIMIT_MARGIN = 4
"""Tokens by which a greedy answer may exceed its dataset's longest reference: another spelling of it may be longer."""
SHORT_SHARE = 0.9
"""Share of a dataset's answers that must be short for it to count as a short-answer dataset."""
LONGEST_TAIL = 16
"""Maximum tokens that a chat template is expected to put after an answer's text."""
CUT = 2**31
"""Length used for an answer whose end was cut off."""


def row_losses(model: PreTrainedModel, rows: Sequence[EncodedRow], forward: Forward) -> tuple[np.ndarray, np.ndarray]:
    """Loss of every row, in length-sorted batches.

    Args:
        model: A causal LM in eval mode.
        rows: Rows of any datasets, mixed.
        forward: How they go through it.

    Returns:
        Summed target-token loss per row (N,) float64 in nats, and target tokens per row (N,) int64.
    """
    losses, counts = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    lengths = [len(row.input_ids) for row in rows]
    batches = length_sorted_batches(lengths, min(forward.batch_tokens, logits_tokens(model)))
    with torch.inference_mode():
        for group, batch in iterate_batches(rows, batches, forward.batcher, forward.device):
            loss, count = target_losses(model, batch)
            losses[group], counts[group] = loss.double().cpu().numpy(), count.cpu().numpy()
            forward.on_batch(len(group))
    return losses, counts


def greedy_answers(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    limits: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    forward: Forward,
) -> list[str]:
    """The model's greedy answer to every row's last prompt, as text without special tokens.

    Args:
        model: A causal LM in eval mode.
        rows: Rows with ``prompt_length``.
        limits: Maximum new tokens per row.
        tokenizer: Decodes the answers.
        ends: Ids that end an answer, from :func:`end_tokens`.
        forward: How rows go through the model.
    """
    answers = decode(model, [row.prompt() for row in rows], limits, ends, forward)
    return [_text(tokenizer, answer) for answer in answers]


def answer_lengths(rows: Sequence[EncodedRow]) -> np.ndarray:
    """Target tokens of every row's last answer (N,) int64, including its end token; :data:`CUT` if the row was cut."""
    return np.asarray(
        [CUT if row.truncated else int(row.targets[row.prompt_length :].sum()) for row in rows], dtype=np.int64
    )


def is_short_answer(lengths: np.ndarray, longest: int) -> bool:
    """Whether at least nine in ten answers have at most ``longest`` tokens, not counting the end token."""
    return len(lengths) > 0 and float(np.mean(lengths - 1 <= longest)) >= SHORT_SHARE


def answer_limit(lengths: np.ndarray, max_new_tokens: int) -> int:
    """Maximum new tokens of a greedy answer: the setting, or a little over the dataset's longest reference if less."""
    return int(min(max_new_tokens, lengths.max() + LIMIT_MARGIN))


def end_tokens(
    datasets: Mapping[str, Sequence[EncodedRow]], tokenizer: PreTrainedTokenizerBase, per_dataset: int = 8
) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's end of sequence, and what the chat template puts after an answer.

    The latter is taken from the rows: of the target tokens that follow the answer's text, the first special one, else the
    last, unless answers contain that token themselves (a line break, say). A row whose tokens do not decode to its answer
    (truncated, or with unrepresentable characters) counts only if its last target is a special token.

    Args:
        datasets: Rows per dataset; the first ``per_dataset`` of each are examined.
        tokenizer: The rows' tokenizer.
        per_dataset: Rows to examine.

    Returns:
        Sorted ids.
    """
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends, plain, inside = {int(tokenizer.eos_token_id)}, set(), set()
    for rows in datasets.values():
        for i in range(min(per_dataset, len(rows))):
            row = rows[i]
            answer = row.input_ids[row.prompt_length :][row.targets[row.prompt_length :]]
            if row.truncated or not len(answer):
                continue
            sizes = range(max(1, len(answer) - LONGEST_TAIL), len(answer) + 1)
            spelled = [size for size in sizes if _text(tokenizer, answer[:size]).strip() == row.answer.strip()]
            if spelled:
                body, tail = answer[: spelled[0]].tolist(), answer[spelled[0] :].tolist()
                inside |= set(body)
                first_special = [token for token in tail if token in special][:1]
                ends |= set(first_special)
                plain |= set() if first_special else set(tail[-1:])
            else:
                ends |= {int(answer[-1])} & special
    return tuple(sorted(ends | (plain - inside)))


def _text(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)
