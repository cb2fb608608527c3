"""Drift is the exact KL of the base's and the model's distributions along the base's own answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_cases import END, VOCABULARY, as_rows, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from merit.errors import CheckpointError, ResourceError
from merit.evaluation.drift import Reference, choose_prompts, measure_drift, sample_answers
from merit.evaluation.forward import Forward
from merit.hf.batches import Batcher

CPU = torch.device("cpu")
FORWARD = Forward(Batcher(0), CPU)


@pytest.fixture(scope="module")
def sampled():
    base = tiny_model(seed=0, sharpness=1.0)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, len(VOCABULARY), size=n).astype(np.int32) for n in (3, 20, 7, 12, 1, 30)]
    answers = sample_answers(base, as_rows(prompts), 9, (1, END), Forward(Batcher(0), CPU, 100), 5)
    return base, prompts, answers


def reference_of(sampled, folder):
    base, prompts, answers = sampled
    return Reference.of_base(base, as_rows(prompts), answers, folder, FORWARD)


def test_base_has_no_drift(sampled, tmp_path):
    found = measure_drift(sampled[0], reference_of(sampled, tmp_path), FORWARD)
    assert found.kl == 0.0
    assert found.top1_agreement == 1.0
    assert found.prompts == 6
    assert found.tokens == sum(len(answer) for answer in sampled[2])
    assert not list(tmp_path.iterdir())  # the logits' file has no name


def test_equals_float64_reference(sampled, tmp_path):
    _, prompts, answers = sampled
    p_model, q_model = tiny_model(seed=0, sharpness=1.0).double(), tiny_model(seed=3, sharpness=1.0).double()
    sums, agreed = [], 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt.tolist(), *answer.tolist()]])
        with torch.no_grad():
            logp, logq = (m(input_ids=ids).logits[0].log_softmax(-1).numpy() for m in (p_model, q_model))
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        sums.append(sum(float(np.sum(np.exp(logp[i]) * (logp[i] - logq[i]))) for i in places))
        agreed += sum(int(logp[i].argmax() == logq[i].argmax()) for i in places)
    found = measure_drift(tiny_model(seed=3, sharpness=1.0), reference_of(sampled, tmp_path), FORWARD)
    tokens = sum(map(len, answers))
    np.testing.assert_allclose(found.kl_sums, sums, rtol=1e-4)
    assert found.kl == pytest.approx(sum(sums) / tokens, rel=1e-4)
    assert found.kl > 0.01
    assert found.top1_agreement == pytest.approx(agreed / tokens)


def test_agrees_with_the_sampled_log_ratio(tmp_path):
    """Over many samples the mean of ln p_base − ln p_model at the sampled tokens estimates the same figure."""
    base, model = (tiny_model(seed=seed, sharpness=0.3) for seed in (0, 1))
    prompts = [np.asarray([3, 7, 4], np.int32)] * 600
    answers = sample_answers(base, as_rows(prompts), 6, (1, END), Forward(Batcher(0), CPU, 8000), 2)
    reference = Reference.of_base(base, as_rows(prompts), answers, tmp_path, FORWARD)
    found = measure_drift(model, reference, FORWARD)
    ratios = []
    for (_, ours), (i, theirs) in zip(reference.passes(base, FORWARD), reference.passes(model, FORWARD), strict=True):
        tokens = torch.from_numpy(answers[i])[:, None]
        ratios += (ours.log_softmax(-1).gather(1, tokens) - theirs.log_softmax(-1).gather(1, tokens)).flatten().tolist()
    error = np.std(ratios) / np.sqrt(len(ratios))
    assert abs(np.mean(ratios) - found.kl) < 4 * error
    assert error < found.kl / 5


def test_samples_are_seeded_and_ignore_batching(sampled):
    base, prompts, answers = sampled
    for batch_tokens in (1, 10_000):
        again = sample_answers(base, as_rows(prompts), 9, (1, END), Forward(Batcher(0), CPU, batch_tokens), 5)
        assert all(np.array_equal(a, b) for a, b in zip(answers, again, strict=True))
    other = sample_answers(base, as_rows(prompts), 9, (1, END), Forward(Batcher(0), CPU, 100), 6)
    assert any(not np.array_equal(a, b) for a, b in zip(answers, other, strict=True))


def test_other_vocabulary_and_broken_weights_are_refused(sampled, tmp_path):
    reference = reference_of(sampled, tmp_path)
    larger = tiny_model(seed=1)
    larger.resize_token_embeddings(len(VOCABULARY) + 3, mean_resizing=False)
    with pytest.raises(CheckpointError, match="same vocabulary"):
        measure_drift(larger, reference, FORWARD)
    broken = tiny_model(seed=1)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        measure_drift(broken, reference, FORWARD)


def test_full_disk_is_refused_before_a_byte_is_written(sampled, tmp_path, monkeypatch):
    monkeypatch.setattr("merit.files.free_bytes", lambda _: 100)
    with pytest.raises(ResourceError, match="are free"):
        reference_of(sampled, tmp_path)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(0, 9), max_size=6),
    st.integers(0, 30),
    st.integers(0, 5),
)
def test_prompts_are_spread_evenly(rows, count, seed):
    chosen = choose_prompts(rows, count, seed)
    assert len(chosen) == len(set(chosen)) == min(count, sum(rows.values()))
    taken = {name: sum(owner == name for owner, _ in chosen) for name in rows}
    assert all(row < rows[name] for name, row in chosen)
    for one in rows:
        for other in rows:
            # A dataset gives fewer than another, by more than one, only when it has no more.
            assert taken[one] >= taken[other] - 1 or taken[one] == rows[one]
    assert choose_prompts(dict(reversed(rows.items())), count, seed) == chosen


def test_an_error_in_the_middle_leaves_no_mode_behind(sampled, tmp_path):
    """A generator that is left early must not keep gradients switched off for whoever comes next."""
    reference = reference_of(sampled, tmp_path)
    with torch.inference_mode():
        passes = reference.passes(sampled[0], FORWARD)
        next(passes)
    passes.close()
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    weight = torch.ones(2, requires_grad=True)
    (weight * 2).sum().backward()
