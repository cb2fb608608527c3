"""Weights by tensor name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from merge_cases import near, random_tensors, write_checkpoint
from safetensors.torch import load_file

from merit.errors import MergeError
from merit.merge import Branch, merge_branches
from merit.merge.coefficients import refuse_unused_weights
from merit.merge.operators import operator_and_options
from merit.merge.patterns import assign_patterns
from merit.merge.weights import weigh
from merit.recipe.load import parse_recipe
from merit.recipe.schema import MergeSettings

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.10.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.norm.weight",
]


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        ("layers.*.mlp", [1, 2]),
        ("mlp", [1, 2]),
        ("layers.0", [1, 3]),
        ("layers.1?", [2]),
        ("model.norm.weight", [4]),
        ("*", [0, 1, 2, 3, 4]),
        ("*.mlp.*", [1, 2]),
    ],
)
def test_a_pattern_fits_whole_parts_of_a_name(pattern, places):
    assert assign_patterns([pattern], NAMES) == {NAMES[i]: pattern for i in places}


def test_the_first_pattern_decides_and_none_may_decide_nothing():
    assert assign_patterns(["layers.0", "mlp"], NAMES) == {NAMES[1]: "layers.0", NAMES[3]: "layers.0", NAMES[2]: "mlp"}
    with pytest.raises(MergeError, match=r"'layer' matches none"):
        assign_patterns(["layer"], NAMES)
    with pytest.raises(MergeError, match=r"'mlp' decides nothing.*'layers'"):
        assign_patterns(["layers", "mlp"], NAMES)


RECIPE = {"name": "x", "model": {"base": "b"}, "mixture": {"folder": "m"}, "split": {"axes": 1}}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.3, 0.7, 1.0], "3 weights"),
        ([0.3, -0.7], "greater than 0"),
        ({"mlp": [0.0, 0.0]}, "sum to 0"),
        ({"mlp": [1.0]}, "1 weights for mlp"),
        ({"mlp": "auto"}, "mlp"),
        ({"mlp": [1.0, float("inf")]}, "finite"),
        ({}, "lists no pattern"),
    ],
)
def test_impossible_weights_are_refused_with_the_recipe(weights, said):
    with pytest.raises(Exception, match=said):
        parse_recipe({**RECIPE, "merge": {"weights": weights}})


def test_possible_ones_are_accepted():
    for weights in ([0.3, 0.7], {"mlp": [0, 1]}, {"default": "uniform", "mlp": "samples"}):
        assert parse_recipe({**RECIPE, "merge": {"weights": weights}}).merge.weights == weights


@pytest.mark.parametrize(
    ("operator", "options", "weights", "fine"),
    [
        ("average", {}, {"mlp": [1.0, 2.0]}, True),
        ("task_arithmetic", {}, "auto", True),
        ("task_arithmetic", {"normalize": False}, [1.0, 2.0], False),
        ("uniform", {}, [1.0, 2.0], False),
        ("star", {}, "auto", False),
        ("star", {}, "tokens", True),
        ("ties", {"weighted": True}, [1.0, 2.0], True),
        ("ties", {"weighted": True}, {"mlp": [1.0, 2.0]}, False),
        ("dare", {}, [1.0, 2.0], True),
        ("fisher", {}, "auto", False),
        ("model_stock", {}, [1.0, 2.0], False),
    ],
)
def test_weights_that_would_have_no_effect_are_refused(operator, options, weights, fine):
    found = operator_and_options(operator, options)
    if fine:
        refuse_unused_weights(*found, weights)
    else:
        with pytest.raises(MergeError, match=r"merge\.weights"):
            refuse_unused_weights(*found, weights)


@pytest.mark.parametrize("operator", ["average", "task_arithmetic"])
def test_linear_merges_by_pattern_equal_a_float64_reference(tmp_path, operator):
    start = random_tensors(0, torch.float32)
    base = write_checkpoint(tmp_path / "base", start)
    tensors = [near(start, k + 1) for k in range(3)]
    paths = [write_checkpoint(tmp_path / f"b{k}", part) for k, part in enumerate(tensors)]
    rule = {"mlp.down_proj": [0.0, 0.25, 0.75], "default": [1.0, 2.0, 5.0], "norm": [3.0, 1.0, 1.0]}
    trained = {k: _Part(path) for k, path in enumerate(paths)}
    branches = weigh(rule, trained, 3)
    result = merge_branches(base, branches, tmp_path / "out", MergeSettings(operator=operator, scale=0.5))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in start.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        w = np.array(rule["mlp.down_proj"] if "down_proj" in name else rule["norm"] if "norm" in name else [1, 2, 5.0])
        zero = tensor.double().numpy()
        tau = sum(s * (part[name].double().numpy() - zero) for s, part in zip(w / w.sum(), tensors, strict=True))
        np.testing.assert_allclose(merged[name].double().numpy(), zero + 0.5 * tau, rtol=1e-6, atol=1e-9)
    assert result.weights == (0.125, 0.25, 0.625)
    assert result.weights_by_pattern == {"mlp.down_proj": (0.0, 0.25, 0.75), "norm": (0.6, 0.2, 0.2)}
    assert "match `norm`: 0.600000, 0.200000, 0.200000" in (tmp_path / "out" / "README.md").read_text()


class _Part:
    """A trained branch with equal counts."""

    def __init__(self, model):
        self.model, self.tokens, self.target_tokens, self.samples = model, 1, 1, 1


def test_a_pattern_that_leaves_no_weight_after_an_exclusion_is_refused(tmp_path):
    start = random_tensors(0)
    base = write_checkpoint(tmp_path / "base", start)
    paths = [write_checkpoint(tmp_path / f"b{k}", near(start, k + 1)) for k in range(3)]
    branches = weigh({"mlp": [0.0, 0.0, 1.0]}, {k: _Part(paths[k]) for k in (0, 1)}, 3)
    with pytest.raises(MergeError, match="'mlp'"):
        merge_branches(base, branches, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_matches_nothing_is_refused_before_tensors_are_read(tmp_path):
    start = random_tensors(0)
    base = write_checkpoint(tmp_path / "base", start)
    path = write_checkpoint(tmp_path / "b", near(start, 1))
    with (path / "model.safetensors").open("r+b") as file:  # readable headers, and NaN where data begins
        file.seek(-64, 2)
        file.write(b"\xff" * 64)
    with pytest.raises(MergeError, match="matches none"):
        merge_branches(base, [Branch(path, 1, "a", by_pattern=(("attention", 1),))], tmp_path / "out")
