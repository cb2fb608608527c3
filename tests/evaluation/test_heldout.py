"""Held-out loss against a float64 reference; which tokens end an answer; where exact match is measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_cases import END, make_dataset, tiny_model

from merit.evaluation.forward import Forward
from merit.evaluation.heldout import (
    answer_lengths,
    answer_limit,
    end_tokens,
    greedy_answers,
    is_short_answer,
    row_losses,
)
from merit.hf.batches import Batcher
from merit.hf.rows import EncodedRow
from merit.mixture.encode import encode_chat

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_loss_equals_unbatched_float64(family):
    rows = list(make_dataset("a", 17, longest=12))
    rows[3].targets[2:4] = True  # an earlier assistant turn
    model = tiny_model(family)
    wanted, counts = [], []
    reference = tiny_model(family).double()
    for row in rows:
        ids = torch.tensor(row.input_ids[None].astype(np.int64))
        with torch.no_grad():
            logp = reference(input_ids=ids).logits[0].log_softmax(-1)
        places = np.flatnonzero(row.targets)
        wanted.append(-sum(float(logp[i - 1, int(row.input_ids[i])]) for i in places))
        counts.append(len(places))
    for batch_tokens in (1, 100, 10_000):
        losses, found = row_losses(model, rows, Forward(Batcher(0), CPU, batch_tokens))
        assert losses.dtype == np.float64
        np.testing.assert_allclose(losses, wanted, rtol=2e-5)
        assert found.tolist() == counts


def test_greedy_answers_are_text_without_the_end(tokenizer):
    rows = list(make_dataset("a", 6))
    answers = greedy_answers(tiny_model(), rows, [5] * 6, tokenizer, (1, END), Forward(Batcher(0), CPU))
    assert any(answers)
    assert not any("<" in answer for answer in answers)


def chat(question: str, answer: str):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("tail", "wanted"),
    [
        ("'<end>'", {1, END}),
        ("' <end>'", {1, END}),  # white space in front of it
        ("'<end> '", {1, END}),  # and behind it, inside the target
        ("'<eos>'", {1}),
    ],
)
def test_end_tokens_are_read_off_the_template(tokenizer, tail, wanted):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<user>' + m.content }}{% else %}{{ '<bot>' }}"
        "{% generation %}{{ m.content + " + tail + " }}{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"
    )
    rows = [encode_chat(chat("a b", answer), tokenizer, 64) for answer in ("c", "d e", "ff0")]
    assert set(end_tokens({"a": rows}, tokenizer)) == wanted


def test_a_cut_answer_ends_nothing(tokenizer):
    cut = EncodedRow(np.asarray([3, 8, 4, 9, 10], np.int32), np.arange(5) >= 3, 3, True, "defg")
    unwritable = EncodedRow(np.asarray([3, 8, 4, 9, 10], np.int32), np.arange(5) >= 3, 3, False, "deé")
    assert end_tokens({"a": [cut, unwritable]}, tokenizer) == (1,)


def test_short_answers():
    assert is_short_answer(np.asarray([33] * 9 + [500]), 32)  # 32 tokens and their end; one in ten may be long
    assert not is_short_answer(np.asarray([33] * 8 + [500] * 2), 32)
    assert not is_short_answer(np.asarray([34] * 10), 32)
    assert answer_limit(np.asarray([3, 10]), 64) == 14
    assert answer_limit(np.asarray([3, 100]), 64) == 64
    rows = list(make_dataset("a", 5))
    assert answer_lengths(rows).tolist() == [len(row.answer) + 1 for row in rows]
