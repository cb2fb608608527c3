"""Measured gradients against plain float64 autograd on a tiny real model."""

from __future__ import annotations

import copy
from dataclasses import asdict

import numpy as np
import pytest
import torch

from merit.conflict.gradients import GradientMeter, vector_width
from merit.conflict.sketch import Sketch
from merit.conflict.store import Sums
from merit.errors import ConflictError
from merit.hf.base import open_base
from merit.hf.batches import Batcher
from merit.hf.models import load_model, trainable_parameters

CPU = torch.device("cpu")


def meter(model, recipe, **options) -> GradientMeter:
    return GradientMeter(model, recipe.conflict, seed=recipe.seed, batcher=Batcher(0), device=CPU, **options)


def measure(model, recipe, rows, **options) -> tuple[np.ndarray, dict]:
    made = meter(model, recipe, **options)
    out = np.full((4, made.width), np.nan, dtype=np.float32)
    sums = Sums()
    made.measure("d", rows, out, sums)
    return out, asdict(sums)


def plain_gradients(model, rows, weighting: str) -> np.ndarray:
    """Per example, w_i ∇L_i by float64 autograd without batching or padding, (n, parameters)."""
    double = copy.deepcopy(model).double()
    parameters = [p for p in double.parameters() if p.requires_grad]
    found = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        logits = double(input_ids=ids).logits[0, :-1]
        targets = torch.from_numpy(row.targets)[1:]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[targets]
        loss = losses.mean() if weighting == "examples" else losses.sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append(
            np.concatenate(
                [
                    np.zeros(p.numel()) if g is None else g.numpy().ravel()
                    for g, p in zip(gradients, parameters, strict=True)
                ]
            )
        )
    return np.array(found)


@pytest.fixture
def rows(mixture):
    return [mixture["d2"][i] for i in range(13)]


@pytest.mark.parametrize("weighting", ["examples", "tokens"])
def test_exact_quarters_equal_float64_autograd(model, make_recipe, rows, weighting):
    out, facts = measure(model, make_recipe(representation="exact", weighting=weighting), rows)
    each = plain_gradients(model, rows, weighting)
    scale = np.abs(each).sum(axis=0).max()
    for part in range(4):
        np.testing.assert_allclose(out[part], each[part::4].sum(axis=0), rtol=0, atol=2e-6 * scale)
    targets = np.array([row.targets.sum() for row in rows])
    weights = targets if weighting == "tokens" else np.ones(13)
    assert facts["examples"] == [4, 3, 3, 3]
    assert facts["tokens"] == [targets[p::4].sum() for p in range(4)]
    np.testing.assert_allclose(facts["weight"], [weights[p::4].sum() for p in range(4)])
    np.testing.assert_allclose(facts["weight_squared"], [(weights[p::4] ** 2).sum() for p in range(4)])


def test_cosines_of_sketches_agree_with_exact_float64_ones(model, make_recipe, mixture):
    recipe = make_recipe(sketch_size=2**16)
    totals, exact = [], []
    for dataset in mixture.values():
        rows = [dataset[i] for i in range(10)]
        totals.append(measure(model, recipe, rows)[0].sum(axis=0, dtype=np.float64))
        exact.append(plain_gradients(model, rows, "examples").sum(axis=0))

    def cosines(vectors):
        unit = np.array([v / np.linalg.norm(v) for v in vectors])
        return (unit @ unit.T)[np.triu_indices(len(unit), 1)]

    assert np.ptp(cosines(exact)) > 0.2, "the datasets must differ for this test to say anything"
    np.testing.assert_allclose(cosines(totals), cosines(exact), rtol=0, atol=5 * np.sqrt(2 / 2**16))


@pytest.mark.parametrize("representation", ["sketch", "stride", "exact"])
def test_hook_path_and_micro_batches_change_only_rounding(model, make_recipe, rows, representation):
    expected, _ = measure(model, make_recipe(representation=representation), rows, memory="held")
    size = np.abs(expected).max()
    for tokens in (1, 20, 4096):
        recipe = make_recipe(representation=representation, batch_tokens=tokens)
        for memory in ("held", "streamed"):
            found, _ = measure(model, recipe, rows, memory=memory)
            np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * size)
    assert all(p.grad is None for p in model.parameters())


def test_streamed_gradients_are_freed_one_by_one(model, make_recipe, rows):
    made = meter(model, make_recipe(), memory="streamed")
    alive = []
    inner = made._take

    def watching(name, parameter):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        inner(name, parameter)

    made._take = watching
    made.measure("d", rows, np.empty((4, made.width), dtype=np.float32), Sums())
    assert max(alive) == 1


def test_the_sketch_is_that_of_the_exact_gradient(model, make_recipe, rows):
    exact, _ = measure(model, make_recipe(representation="exact"), rows)
    found, _ = measure(model, make_recipe(), rows)
    made, start = Sketch(4096, 3), 0
    for name, parameter in trainable_parameters(model).items():
        made.add(name, torch.from_numpy(exact[0, start : start + parameter.numel()].copy()))
        start += parameter.numel()
    np.testing.assert_allclose(found[0], made.vector().numpy(), rtol=0, atol=1e-5 * np.abs(found).max())


def test_stride_keeps_every_fifth_entry_of_the_whole_gradient(model, make_recipe, rows):
    exact, _ = measure(model, make_recipe(representation="exact"), rows)
    found, _ = measure(model, make_recipe(representation="stride", stride=5), rows)
    np.testing.assert_array_equal(found, exact[:, ::5])


def test_tied_weights_count_once(model, make_recipe, rows):
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = list(trainable_parameters(model))
    assert "lm_head.weight" not in names
    out, _ = measure(model, make_recipe(representation="exact"), rows)
    assert out.shape[1] == sum(p.numel() for p in model.parameters())
    # Both uses are in it: the embedding alone would leave rows of tokens that are only predicted at zero.
    only_predicted = sorted({int(r.input_ids[-1]) for r in rows} - {int(t) for r in rows for t in r.input_ids[:-1]})
    start = 0
    for name, parameter in trainable_parameters(model).items():
        if name == "model.embed_tokens.weight":
            grad = out.sum(axis=0)[start : start + parameter.numel()].reshape(parameter.shape)
            assert all(np.abs(grad[token]).max() > 0 for token in only_predicted)
        start += parameter.numel()


def test_frozen_parameters_cost_nothing(make_recipe, rows):
    recipe = make_recipe(representation="exact", model={"trainable": ["model.layers.1.mlp.*"]})
    model = load_model(open_base(recipe.model), CPU, trainable=True)
    out, _ = measure(model, recipe, rows, memory="streamed")
    assert out.shape[1] == 3 * 16 * 24
    each = plain_gradients(model, rows, "examples")
    np.testing.assert_allclose(out[0], each[0::4].sum(axis=0), rtol=0, atol=2e-6 * np.abs(each).sum(axis=0).max())
    assert all(p.grad is None for p in model.parameters())


def test_lora_adapters_are_measured(make_recipe, rows):
    recipe = make_recipe(representation="exact", model={"trainable": "lora", "lora": {"rank": 2}})
    model = load_model(open_base(recipe.model), CPU, trainable=True, seed=3)
    out, _ = measure(model, recipe, rows)
    parameters = trainable_parameters(model)
    assert all("lora_" in name for name in parameters)
    assert vector_width(recipe.conflict, sum(p.numel() for p in parameters.values())) == out.shape[1]
    start, found = 0, {}
    for name, parameter in parameters.items():
        found[name] = np.abs(out[:, start : start + parameter.numel()]).max()
        start += parameter.numel()
    assert all(size == 0 for name, size in found.items() if "lora_A" in name), "B starts at zero"
    assert all(size > 0 for name, size in found.items() if "lora_B" in name)


def test_half_precision_parameters_are_folded_in_float32(model, make_recipe, rows):
    exact = plain_gradients(model, rows, "examples")[0::4].sum(axis=0)
    half = model.to(torch.bfloat16)
    recipe = make_recipe(representation="exact", batch_tokens=1)
    made = meter(half, recipe)
    assert not made.held, "bf16 gradients must not be summed in bf16"
    out = np.empty((4, made.width), dtype=np.float32)
    made.measure("d", rows, out, Sums())
    cosine = out[0] @ exact / np.linalg.norm(out[0]) / np.linalg.norm(exact)
    assert cosine > 0.99


@pytest.mark.parametrize("memory", ["held", "streamed"])
def test_a_non_finite_gradient_names_dataset_and_parameter(model, make_recipe, rows, memory):
    name = "model.layers.1.self_attn.o_proj.weight"
    parameter = dict(model.named_parameters())[name]
    parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), float("inf")))
    with pytest.raises(ConflictError, match=f"gradient of d is not finite; first in {name}"):
        measure(model, make_recipe(), rows, memory=memory)
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks)


def test_a_non_finite_loss_names_the_dataset(model, make_recipe, rows):
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ConflictError, match="d has a non-finite loss"):
        measure(model, make_recipe(), rows)


def test_running_out_of_memory_halves_the_micro_batch(model, make_recipe, rows):
    """A device's out-of-memory error at large batches leads to smaller ones and the same gradient."""
    recipe = make_recipe(representation="exact", batch_tokens=4096)
    expected, _ = measure(model, recipe, rows)
    made = meter(model, recipe)
    inner, room = made._backward, max(len(row.input_ids) for row in rows)

    def scarce(name, batch):
        if batch["input_ids"].numel() > room:
            raise torch.OutOfMemoryError("no room")
        return inner(name, batch)

    made._backward = scarce
    out = np.empty((4, made.width), dtype=np.float32)
    sums = Sums()
    made.measure("d", rows, out, sums)
    assert made.batch_tokens < 2 * room
    assert sums.examples == [4, 3, 3, 3]
    assert sums.weight == [4, 3, 3, 3], "an attempt that failed must not be counted"
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
