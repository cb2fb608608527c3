"""Batched decoding equals decoding row by row without a cache or padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_cases import END, SPECIAL, VOCABULARY, as_rows, tiny_model

from merit.errors import CheckpointError
from merit.evaluation.decode import decode
from merit.evaluation.forward import Forward
from merit.hf.batches import Batcher

CPU = torch.device("cpu")
ENDS = (1, END)


def slowly(model, prompt, limit, ends, numbers=None):
    """One row, no cache, no padding: the whole sequence again for every token."""
    context, ids = model.config.max_position_embeddings, list(prompt)
    for step in range(min(limit, context - len(prompt))):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        if numbers is None:
            token = int(logits.argmax())
        else:
            token = int(np.searchsorted(np.cumsum(torch.softmax(logits, 0).numpy()), numbers[step], side="right"))
        ids.append(token)
        if token in ends:
            break
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [
        rng.integers(3, len(VOCABULARY), size=n).astype(np.int32) for n in [1, 30, 2, 17, 9, 60, 5, 5, 41, 3, 64, 63]
    ]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 120, 10_000])
def test_greedy_equals_unbatched(family, batch_tokens, prompts):
    model = tiny_model(family)
    limits = [3 + i % 5 * 4 for i in range(len(prompts))]
    # With two ordinary tokens as ends too, rows end at different steps and leave the batch early.
    ends = (*ENDS, 10, 20, 30)
    found = decode(model, as_rows(prompts), limits, ends, Forward(Batcher(0), CPU, batch_tokens))
    wanted = [slowly(model, p, n, ends) for p, n in zip(prompts, limits, strict=True)]
    assert [answer.tolist() for answer in found] == wanted
    lengths = {len(answer) for answer in wanted}
    assert len(lengths) > 3  # the case is worth its name
    assert 0 in lengths  # the prompt of 64 tokens fills the context
    assert any(answer and answer[-1] not in ends for answer in wanted)
    assert any(answer and answer[-1] in ends for answer in wanted)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_sampling_equals_unbatched_and_ignores_batching(family, prompts):
    model = tiny_model(family, sharpness=0.5)
    numbers = [np.random.default_rng(i).random(12) for i in range(len(prompts))]
    limits = [12] * len(prompts)
    wanted = [slowly(model, p, 12, ENDS, u) for p, u in zip(prompts, numbers, strict=True)]
    for batch_tokens in (1, 200, 10_000):
        found = decode(model, as_rows(prompts), limits, ENDS, Forward(Batcher(0), CPU, batch_tokens), numbers)
        assert [answer.tolist() for answer in found] == wanted


def test_samples_follow_the_models_distribution():
    model = tiny_model("llama", sharpness=0.3)
    prompt = np.asarray([3, 8, 4], dtype=np.int32)
    with torch.no_grad():
        p = torch.softmax(
            model(input_ids=torch.tensor(prompt[None].astype(np.int64))).logits[0, -1].double(), 0
        ).numpy()
    n = 4000
    numbers = [np.random.default_rng([7, i]).random(1) for i in range(n)]
    found = decode(model, as_rows([prompt] * n), [1] * n, (), Forward(Batcher(0), CPU, 8000), numbers)
    counts = np.bincount([answer[0] for answer in found], minlength=len(p))
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi2 < len(p) + 5 * np.sqrt(2 * len(p))


def test_padding_token_does_not_matter(prompts):
    model = tiny_model("qwen2")
    runs = [
        decode(model, as_rows(prompts), [6] * len(prompts), ENDS, Forward(Batcher(pad), CPU, 10_000))
        for pad in (0, len(SPECIAL))
    ]
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


def test_model_without_cache_is_refused():
    model = tiny_model("llama")

    class NoCache(torch.nn.Module):
        config = model.config

        def forward(self, input_ids, attention_mask, past_key_values=None, use_cache=False):
            output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            output.past_key_values = None
            return output

    with pytest.raises(CheckpointError, match="no key-value cache"):
        decode(NoCache(), as_rows([np.asarray([3, 4])]), [4], ENDS, Forward(Batcher(0), CPU, 100))


def test_the_batch_stops_when_its_last_row_has_ended(prompts):
    model, ends = tiny_model("qwen2"), (*ENDS, 10, 20, 30)
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        found = decode(model, as_rows(prompts[2:5]), [40] * 3, ends, Forward(Batcher(0), CPU, 10_000))
    finally:
        handle.remove()
    assert len(passes) == max(map(len, found)) < 40
