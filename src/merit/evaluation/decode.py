"""Batched decoding with a key-value cache: greedy, or sampling at temperature 1 from given uniform numbers.

One loop serves exact match (greedy) and drift (sampling). It takes a model and token ids and returns token ids.
Not covered: beam search, top-k/top-p, stop strings.

Rows are sorted by length, left-padded, and dropped from the batch as they end. A row's answer does not depend on the other
rows of its batch, beyond float rounding: padding is masked, positions count only real tokens, and every row has its own
uniform numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from merit.errors import CheckpointError
from merit.evaluation.forward import Forward
from merit.hf.batches import Batcher, accepts, length_sorted_batches, to_device
from merit.hf.families import positions as positions_in_space
from merit.hf.rows import EncodedRow

__all__ = ["context_length", "decode"]


def decode(
    model: PreTrainedModel,
    prompts: Sequence[EncodedRow],
    limits: Sequence[int],
    end_tokens: Collection[int],
    forward: Forward,
    uniforms: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Continue every prompt until an end token, its limit, or the end of the model's context.

    Args:
        model: A causal LM in eval mode.
        prompts: Rows to be continued; none is empty.
        limits: Maximum new tokens per row, including the end token.
        end_tokens: Ids that end an answer.
        forward: How rows go through the model; a batch's padded tokens count prompt and new tokens together.
        uniforms: For sampling: per row at least ``limit`` numbers in [0, 1), float64; token t of the row is the inverse of
            the model's cumulative distribution at the row's t-th number. None: greedy.

    Returns:
        New token ids per row, (m,) int64, including the end token if there is one. Empty if the prompt fills the
        context.

    Raises:
        CheckpointError: The model returns no key-value cache.
    """
    batcher, device = forward.batcher, forward.device
    context = context_length(model)
    room = np.asarray(limits, dtype=np.int64)
    lengths = np.asarray([len(prompt.input_ids) for prompt in prompts], dtype=np.int64)
    if context is not None:
        room = np.minimum(room, context - lengths)
    answers = [np.empty(0, dtype=np.int64) for _ in prompts]
    todo = np.flatnonzero(room > 0)
    ends = torch.tensor(sorted(end_tokens), dtype=torch.int64, device=device)
    with torch.inference_mode():
        for group in length_sorted_batches(lengths[todo] + room[todo], forward.batch_tokens):
            rows = todo[group]
            numbers = None
            if uniforms is not None:
                numbers = torch.stack([torch.from_numpy(_fit(uniforms[i], int(room[rows].max()))) for i in rows]).to(
                    device
                )
            tokens = _decode_batch(model, [prompts[i] for i in rows], room[rows], ends, batcher, device, numbers)
            for i, new in zip(rows, tokens, strict=True):
                answers[i] = _cut(new[: room[i]], end_tokens)
            forward.on_batch(len(rows))
    return answers


def _decode_batch(
    model: PreTrainedModel,
    prompts: Sequence[EncodedRow],
    limits: np.ndarray,
    ends: torch.Tensor,
    batcher: Batcher,
    device: torch.device,
    numbers: torch.Tensor | None,
) -> np.ndarray:
    """New tokens (B, max(limits)) int64; what follows a row's end token or limit is meaningless."""
    steps = int(limits.max())
    pictures = to_device(batcher(prompts, left=True), device)
    inputs, mask_BL = pictures.pop("input_ids"), pictures.pop("attention_mask")
    del pictures["labels"]  # the rest (such as pixels) goes in once, with the prompt
    width = inputs.shape[1]
    mask = torch.cat([mask_BL, mask_BL.new_ones(len(prompts), steps)], dim=1)
    tokens = torch.full((len(prompts), steps), -1, dtype=torch.int64, device=device)
    in_space = positions_in_space(model, {"input_ids": inputs, "attention_mask": mask_BL, **pictures})
    positions = (mask_BL.cumsum(dim=1) - 1).clamp(min=0) if in_space is None else in_space
    left = torch.from_numpy(limits).to(device)
    rows = torch.arange(len(prompts), device=device)
    image_token = torch.tensor([batcher.images.token_id if batcher.images else 0], device=device)
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)
    options: dict[str, object] = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
    takes_positions = accepts(model, "position_ids")
    cache = None
    for step in range(steps):
        if takes_positions:
            options["position_ids"] = positions
        output = model(
            input_ids=inputs,
            attention_mask=mask[:, : width + step],
            past_key_values=cache,
            use_cache=True,
            **options,
            **pictures,
        )
        pictures = {}
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise CheckpointError(
                f"{type(model).__name__} returns no key-value cache, so answers cannot be generated with it.",
                "Set evaluate.exact_match: never and evaluate.drift.prompts: 0; the held-out loss needs no cache.",
            )
        logits = output.logits[:, -1]
        if batcher.images is not None:  # answers contain no images; fed back, an image token would have no image
            logits = logits.index_fill(1, image_token, float("-inf"))
        chosen = logits.argmax(dim=-1) if numbers is None else _inverse_cdf(logits, numbers[rows, step])
        tokens[rows, step] = chosen
        going = going & ~torch.isin(chosen, ends) & (left > step + 1)
        count = int(going.sum())
        if not count:
            break
        # A row that has ended and is still in the batch stays where it is: its next position may not exist.
        inputs, positions = chosen[:, None], positions[..., -1:] + going[:, None]
        if 2 * count <= len(rows):  # at least half have ended: continue with the others only
            kept = going.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            state = (inputs, mask, left, rows, going)
            inputs, mask, left, rows, going = (tensor[kept] for tensor in state)
            positions = positions[..., kept, :]
    return np.asarray(tokens.cpu().numpy())


def _inverse_cdf(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Token (B,) where the cumulative softmax of (B, V) logits, in float64, passes (B,) numbers in [0, 1)."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    return (cumulative <= (numbers * cumulative[:, -1])[:, None]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)


def _fit(numbers: np.ndarray, steps: int) -> np.ndarray:
    """The first ``steps`` numbers, padded where the row's own limit is shorter (those are never used)."""
    return np.pad(numbers[:steps], (0, max(0, steps - len(numbers))))


def _cut(tokens: np.ndarray, end_tokens: Collection[int]) -> np.ndarray:
    """Tokens up to and with the first end token."""
    found = np.flatnonzero(np.isin(tokens, list(end_tokens)))
    return tokens[: found[0] + 1] if len(found) else tokens


def context_length(model: PreTrainedModel) -> int | None:
    """Longest sequence that the model's config allows (tokens), None if it does not say."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    return int(context) if context else None
