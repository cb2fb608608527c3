"""The whole merge on real files: results, invariances, layouts, refusals."""

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cases import TORCH, make_plan, near, nearest, random_tensors, write_checkpoint
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from merit.errors import CheckpointError, MergeError, ResourceError, RunFolderError
from merit.hf import checkpoint
from merit.merge import OPERATORS, Branch, MergeResult, run_merge

COUNTS = [1_234_567, 89_123, 456_789]


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "base", random_tensors(0))


@pytest.fixture
def branches(tmp_path, base):
    tensors = load_file(base / "model.safetensors")
    paths = [write_checkpoint(tmp_path / f"b{k}", near(tensors, k + 1), shards=k + 1) for k in range(3)]
    return [Branch(p, c, f"branch {k}") for k, (p, c) in enumerate(zip(paths, COUNTS, strict=True))]


def read(folder):
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def merge(base, branches, output, operator="average", **options):
    keys = ("scale", "dtype", "excluded", "base_fingerprint")
    extra = {k: options.pop(k) for k in keys if k in options}
    return run_merge(make_plan(base, branches, operator, options, output=output, **extra))


def floats(folder):
    return {n: t.double().numpy() for n, t in read(folder).items() if t.is_floating_point()}


def nothing_left(folder, *expected):
    return sorted(p.name for p in folder.iterdir()) == sorted(expected)


# ---- results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_average_is_correctly_rounded_in_every_element(tmp_path, dtype):
    tag = next(t for t, d in TORCH.items() if d == dtype)
    start = random_tensors(0, dtype)
    base = write_checkpoint(tmp_path / "base", start)
    branches = [Branch(write_checkpoint(tmp_path / f"b{k}", near(start, k)), c, f"b{k}") for k, c in enumerate(COUNTS)]
    merge(base, branches, tmp_path / "out")
    parts = [read(b.path) for b in branches]
    merged = read(tmp_path / "out")
    assert merged.keys() == start.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == start[name].dtype
        assert tensor.shape == start[name].shape
        if tensor.is_floating_point():
            for i, got in enumerate(tensor.flatten().double().tolist()):
                terms = [c * Fraction(p[name].flatten()[i].item()) for c, p in zip(COUNTS, parts, strict=True)]
                assert got == nearest(sum(terms) / sum(COUNTS), tag), name


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shapes_shards_and_dtypes(tmp_path_factory, data):
    """Tensors of any shape, also longer than a block, dealt out over files differently in every checkpoint."""
    folder = tmp_path_factory.mktemp("any")
    shapes = data.draw(
        st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 7, 300, 1031]), max_size=2), min_size=3, max_size=5)
    )
    dtypes = data.draw(st.lists(st.sampled_from(list(TORCH.values())), min_size=len(shapes), max_size=len(shapes)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    start = {f"t{i}.w": torch.randn(s, generator=g).to(d) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))}
    base = write_checkpoint(folder / "base", start, shards=data.draw(st.integers(1, 3)))
    counts = data.draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=3))
    branches = [
        Branch(write_checkpoint(folder / f"b{k}", near(start, k, 0.1), shards=data.draw(st.integers(1, 3))), c, f"b{k}")
        for k, c in enumerate(counts)
    ]
    merge(base, branches, folder / "out")
    merged, parts = read(folder / "out"), [read(b.path) for b in branches]
    for name, tensor in merged.items():
        assert (tensor.shape, tensor.dtype) == (start[name].shape, start[name].dtype)
        mean = sum(c * p[name].double() for c, p in zip(counts, parts, strict=True)) / sum(counts)
        odd = (tensor != mean.to(tensor.dtype)).flatten().nonzero().flatten().tolist()  # torch rounds some ties twice
        tag = next(t for t, d in TORCH.items() if d == tensor.dtype)
        for i in odd:
            exact = sum(c * Fraction(p[name].flatten()[i].item()) for c, p in zip(counts, parts, strict=True)) / sum(
                counts
            )
            assert tensor.flatten()[i].item() == nearest(exact, tag)
    shutil.rmtree(folder)


def test_record_and_card(tmp_path, base, branches):
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    merge(base, branches, tmp_path / "out", excluded=["branch 3"])
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["operator"] == "average"
    assert record["scale"] == 1.0
    assert record["counts"] == COUNTS
    assert record["weights"] == [c / sum(COUNTS) for c in COUNTS]
    assert [b["fingerprint"] for b in record["branches"]] == [checkpoint.fingerprint(b.path) for b in branches]
    assert record["base"]["fingerprint"] == checkpoint.fingerprint(base)
    assert record["model_fingerprint"] == checkpoint.fingerprint(tmp_path / "out")
    assert record["files"]["model.safetensors"]["bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert record["excluded"] == ["branch 3"]
    assert any("Partial merge: 3 of 4" in w for w in record["warnings"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "Partial merge" in card
    assert all(str(c) in card for c in COUNTS)
    assert str(tmp_path) not in card


def test_a_tiny_model_merges_loads_and_computes_the_same_as_its_weights(tmp_path):
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    start, states, branches = {n: p.detach().clone() for n, p in model.named_parameters()}, [], []
    for k, tokens in enumerate([3, 5]):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name] + 0.01 * torch.randn(p.shape))
        model.save_pretrained(tmp_path / f"b{k}", max_shard_size="20KB" if k else "5GB")
        states.append({n: p.detach().clone() for n, p in model.named_parameters()})
        branches.append(Branch(tmp_path / f"b{k}", tokens, f"b{k}"))
    merge(tmp_path / "base", branches, tmp_path / "out")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(((3 * states[0][name].double() + 5 * states[1][name].double()) / 8).float())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_output_keeps_the_bases_sharding_and_metadata(tmp_path):
    start = random_tensors(0)
    base = write_checkpoint(tmp_path / "base", start, shards=3)
    single = write_checkpoint(tmp_path / "b", near(start, 1))
    merge(base, [Branch(single, 1, "b")], tmp_path / "out")
    one, two = checkpoint.read_headers(base), checkpoint.read_headers(tmp_path / "out")
    assert [(f.name, f.metadata, [t.name for t in f.tensors]) for f in one.files.values()] == [
        (f.name, f.metadata, [t.name for t in f.tensors]) for f in two.files.values()
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == json.loads((base / "model.safetensors.index.json").read_text())


# ---- invariances


def test_one_branch_or_identical_branches_come_out_bit_for_bit(tmp_path, base, branches):
    twins = [Branch(tmp_path / f"twin{c}", c, f"twin {c}") for c in (3, 5, 11)]
    for twin in twins:
        shutil.copytree(branches[0].path, twin.path)
    for operator in ("average", "uniform", "task_arithmetic"):
        merge(base, branches[:1], tmp_path / f"one-{operator}", operator)
        merge(base, twins, tmp_path / f"same-{operator}", operator)
        want = checkpoint.weights_digest(checkpoint.read_headers(branches[0].path))
        for kind in ("one", "same"):
            assert checkpoint.weights_digest(checkpoint.read_headers(tmp_path / f"{kind}-{operator}")) == want


@pytest.mark.parametrize("operator", ["average", "uniform", "ties"])
def test_order_and_unit_of_weights_do_not_matter(tmp_path, base, branches, operator):
    merge(base, branches, tmp_path / "a", operator)
    merge(base, branches[::-1], tmp_path / "b", operator)
    merge(base, [Branch(b.path, b.weight * 1000, b.name) for b in branches], tmp_path / "c", operator)
    shares = [Fraction(c, sum(COUNTS)) for c in COUNTS]
    merge(base, [Branch(b.path, w, b.name) for b, w in zip(branches, shares, strict=True)], tmp_path / "d", operator)
    digests = {checkpoint.weights_digest(checkpoint.read_headers(tmp_path / x)) for x in "abcd"}
    if operator == "ties":  # floating sums in another order may round differently
        assert all(np.allclose(floats(tmp_path / "a")[n], v, atol=2e-3) for n, v in floats(tmp_path / "b").items())
    else:
        assert len(digests) == 1


def test_threads_do_not_matter(tmp_path, base, branches, monkeypatch):
    digests = set()
    for count in (1, 2, 5):
        for module in ("stream", "worker"):
            monkeypatch.setattr(f"merit.merge.{module}.threads", lambda count=count: count)
        for operator in ("average", "ties", "tsv"):
            result = merge(base, branches, tmp_path / f"{operator}{count}", operator)
            digests.add((operator, result.model_fingerprint, json.dumps(result.statistics)))
    assert len(digests) == 3


@pytest.mark.parametrize("scale", [0, 0.3, 1, "1.5"])
def test_scale_is_the_line_from_the_base(tmp_path, base, branches, scale):
    merge(base, branches, tmp_path / "out", "task_arithmetic", scale=scale)
    start, parts, got = floats(base), [floats(b.path) for b in branches], floats(tmp_path / "out")
    x = float(scale)
    for name, theta in start.items():
        mean = sum(c * p[name] for c, p in zip(COUNTS, parts, strict=True)) / sum(COUNTS)
        want = torch.from_numpy(np.asarray(theta + x * (mean - theta))).bfloat16().double().numpy()
        # at most one step of bf16 where float64 cannot tell a tie
        np.testing.assert_allclose(got[name], want, rtol=2**-7, atol=1e-30)
        assert (got[name] != want).sum() <= 0.01 * want.size
    if scale == 0:
        assert checkpoint.weights_digest(checkpoint.read_headers(tmp_path / "out")) == checkpoint.weights_digest(
            checkpoint.read_headers(base)
        )


def test_displacement_identity(tmp_path):
    """Σ w‖δ_k‖² = ‖δ̄‖² + Σ w‖δ_k − δ̄‖², on float32 files."""
    start = random_tensors(0, torch.float32)
    base = write_checkpoint(tmp_path / "base", start)
    branches = [Branch(write_checkpoint(tmp_path / f"b{k}", near(start, k)), c, f"b{k}") for k, c in enumerate(COUNTS)]
    merge(base, branches, tmp_path / "out")

    def flat(folder):
        return np.concatenate([v.ravel() for _, v in sorted(floats(folder).items())]) - theta

    theta = np.concatenate([v.ravel() for _, v in sorted(floats(base).items())])
    w = np.array(COUNTS) / sum(COUNTS)
    deltas, mean = [flat(b.path) for b in branches], flat(tmp_path / "out")
    left = sum(wk * d @ d for wk, d in zip(w, deltas, strict=True))
    right = mean @ mean + sum(wk * (d - mean) @ (d - mean) for wk, d in zip(w, deltas, strict=True))
    rounding = np.abs(theta + mean) * 2.0**-24  # of the merged file, by element: it enters as 2 δ̄ · ε
    assert abs(left - right) <= 2 * np.abs(mean) @ rounding
    assert abs(left - right) < 1e-6 * left


def test_excluding_a_branch_renormalises(tmp_path, base, branches):
    merge(base, branches[:2], tmp_path / "out", excluded=["branch 2"])
    record = merge(base, branches[:2], tmp_path / "again").record()
    assert math.isclose(sum(record["weights"]), 1.0)
    assert checkpoint.weights_digest(checkpoint.read_headers(tmp_path / "out")) == checkpoint.weights_digest(
        checkpoint.read_headers(tmp_path / "again")
    )


# ---- non-linear operators on files


@pytest.mark.parametrize("trim", ["global", "local"])
def test_ties_on_files_equals_ties_on_the_whole_vector(tmp_path, trim):
    from test_operators import reference_ties

    start = random_tensors(0, torch.float32)
    base = write_checkpoint(tmp_path / "base", start)
    branches = [Branch(write_checkpoint(tmp_path / f"b{k}", near(start, k)), c, f"b{k}") for k, c in enumerate(COUNTS)]
    record = merge(base, branches, tmp_path / "out", "ties", trim=trim, density=0.3, scale=0.5).record()
    theta, got = floats(base), floats(tmp_path / "out")
    names = [n for n in theta if theta[n].size]
    deltas = {n: np.stack([(floats(b.path)[n] - theta[n]).ravel() for b in branches]) for n in names}
    if trim == "global":
        tau = reference_ties(np.concatenate([deltas[n] for n in names], axis=1), 0.3)
        parts = np.split(tau, np.cumsum([theta[n].size for n in names])[:-1])
        assert record["statistics"]["densities"] == pytest.approx([0.3] * 3, abs=0.01)
    else:
        parts = [reference_ties(deltas[n], 0.3) for n in names]
    for name, part in zip(names, parts, strict=True):
        np.testing.assert_allclose(got[name], theta[name] + 0.5 * part.reshape(theta[name].shape), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("operator", ["star", "tsv", "iso_cts"])
@pytest.mark.parametrize("scope", ["linear2d", "all2d"])
def test_spectral_operators_touch_matrices_and_average_the_rest(tmp_path, operator, scope):
    start = random_tensors(0, torch.float32) | {"model.experts.weight": torch.randn(3, 6, 5)}
    base = write_checkpoint(tmp_path / "base", start)
    branches = [Branch(write_checkpoint(tmp_path / f"b{k}", near(start, k)), c, f"b{k}") for k, c in enumerate(COUNTS)]
    record = merge(base, branches, tmp_path / "out", operator, matrix_scope=scope, scale=0.7).record()
    theta, parts, got = floats(base), [floats(b.path) for b in branches], floats(tmp_path / "out")
    options = {k: v for k, v in record["options"].items() if k != "matrix_scope"}
    function = OPERATORS[operator].function
    for name, start_value in theta.items():
        deltas = [p[name] - start_value for p in parts]
        if start_value.ndim == 2 and start_value.size and ("embed" not in name or scope == "all2d"):
            tau = function(deltas, **options)[0]
        elif start_value.ndim == 3 and scope == "linear2d":
            tau = np.stack([function([d[i] for d in deltas], **options)[0] for i in range(3)])
        else:
            tau = sum(deltas) / 3
        np.testing.assert_allclose(got[name], start_value + 0.7 * tau, rtol=3e-7, atol=1e-9)
    assert record["statistics"]["norm_ratio"] > 0


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_untouched_tensors_are_copied_by_every_operator(tmp_path, operator):
    start = random_tensors(0)
    base = write_checkpoint(tmp_path / "base", start)
    branches = []
    for k in range(3):
        tensors = near(start, k)
        tensors["model.layers.0.mlp.up_proj.weight"] = start["model.layers.0.mlp.up_proj.weight"].clone()
        branches.append(Branch(write_checkpoint(tmp_path / f"b{k}", tensors), k + 1, f"b{k}"))
        if operator == "fisher":
            moments = {n: t.float().abs() for n, t in tensors.items() if t.is_floating_point()}
            save_file(moments, tmp_path / f"b{k}" / "second_moments.safetensors")
    merge(base, branches, tmp_path / "out", operator)
    merged = read(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged[name].view(torch.int16), start[name].view(torch.int16))
    assert not torch.equal(merged["model.norm.weight"], start["model.norm.weight"])


# ---- layouts and names


def test_a_tied_copy_is_accepted_when_equal_and_refused_when_not(tmp_path):
    start = random_tensors(0)
    base = write_checkpoint(tmp_path / "base", start)
    tensors = near(start, 1)
    copy = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    good = write_checkpoint(tmp_path / "good", copy)
    result = merge(base, [Branch(good, 1, "good")], tmp_path / "out")
    assert read(tmp_path / "out").keys() == start.keys()
    assert any("tied" in w for w in result.warnings)
    assert result.record()["branches"][0]["fingerprint"] == checkpoint.fingerprint(good)
    copy["lm_head.weight"][0, 0] += 1
    bad = write_checkpoint(tmp_path / "bad", copy)
    with pytest.raises(MergeError, match="differ in bad"):
        merge(base, [Branch(bad, 1, "bad")], tmp_path / "out2")
    assert nothing_left(tmp_path, "base", "good", "out", "bad")


def test_a_tied_tensor_stored_under_its_other_name_is_matched(tmp_path):
    start = random_tensors(0)
    start["lm_head.weight"] = start.pop("model.embed_tokens.weight")
    base = write_checkpoint(tmp_path / "base", start)
    tensors = near(start, 1)
    tensors["model.embed_tokens.weight"] = tensors.pop("lm_head.weight")
    branch = write_checkpoint(tmp_path / "b", tensors)
    merge(base, [Branch(branch, 1, "b")], tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_wrapped_names_are_matched_one_to_one(tmp_path):
    start = random_tensors(0)
    base = write_checkpoint(tmp_path / "base", start)
    tensors = near(start, 1)
    renamed = {n.replace("model.", "model.language_model.", 1): t for n, t in tensors.items()}
    result = merge(base, [Branch(write_checkpoint(tmp_path / "b", renamed), 1, "b")], tmp_path / "out")
    assert all(torch.equal(t, tensors[n]) for n, t in read(tmp_path / "out").items())
    assert any("other tensor names" in w for w in result.warnings)


@pytest.mark.parametrize("choice", ["base", "float32", "float16"])
def test_mixed_dtypes_need_an_explicit_choice(tmp_path, choice):
    start = random_tensors(0)
    base = write_checkpoint(tmp_path / "base", start)
    wide = {n: t.float() if t.is_floating_point() else t for n, t in near(start, 1).items()}
    wide = {n: t + 1e-6 if t.is_floating_point() else t for n, t in wide.items()}
    branches = [
        Branch(write_checkpoint(tmp_path / "a", wide), 1, "a"),
        Branch(write_checkpoint(tmp_path / "b", near(start, 2)), 2, "b"),
    ]
    with pytest.raises(MergeError, match="BF16 in the base but F32 in a"):
        merge(base, branches, tmp_path / "out")
    merge(base, branches, tmp_path / "out", dtype=choice)
    tag = {"base": "BF16", "float32": "F32", "float16": "F16"}[choice]
    merged = read(tmp_path / "out")
    for name, tensor in merged.items():
        if tensor.is_floating_point():
            assert tensor.dtype == TORCH[tag]
            a, b = (read(x.path)[name].flatten().tolist() for x in branches)
            want = [nearest((Fraction(x) + 2 * Fraction(y)) / 3, tag) for x, y in zip(a, b, strict=True)]
            assert tensor.flatten().double().tolist() == want
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == {"base": "bfloat16"}.get(choice, choice)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_explicit_dtype_stands_in_every_block_of_the_config(tmp_path, dtype):
    """Fails on commit f5727a1: ``text_config.dtype`` and ``vision_config.torch_dtype`` stayed as they were."""
    blocks = {"text_config": {"dtype": "float16", "a": 1}, "vision_config": {"torch_dtype": "float16", "b": 2}}
    base = write_checkpoint(tmp_path / "base", random_tensors(0), **blocks)
    branch = write_checkpoint(tmp_path / "b", near(random_tensors(0), 1), **blocks)
    merge(base, [Branch(branch, 1, "b")], tmp_path / "out", dtype=dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype
    assert config["text_config"] == {"dtype": dtype, "a": 1}
    vision = dict(config["vision_config"])
    assert {vision.pop(key) for key in ("dtype", "torch_dtype") if key in vision} == {dtype}
    assert vision == {"b": 2}
    original = json.loads((base / "config.json").read_text())
    assert {k: v for k, v in config.items() if "_config" not in k} == {
        **{k: v for k, v in original.items() if "_config" not in k},
        "dtype": dtype,
    }


def test_config_and_tokenizer_come_from_the_base_and_a_common_template_is_added(tmp_path, base, branches):
    (base / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    for b in branches:
        config = json.loads((b.path / "config.json").read_text())
        (b.path / "config.json").write_text(json.dumps(config | {"use_cache": False, "pad_token_id": 3}))
        (b.path / "chat_template.jinja").write_text("{{ messages }}")
    result = merge(base, branches, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert any("chat template" in w for w in result.warnings)


# ---- refusals: one message that names the thing, nothing left behind


def change(branch, **tensors):
    """Rewrite a branch with some tensors replaced (None: left out); ``__`` stands for a dot."""
    current = read(branch.path)
    for path in branch.path.glob("*.safetensors*"):
        path.unlink()
    for key, value in tensors.items():
        name = key.replace("__", ".")
        current.pop(name, None)
        if value is not None:
            current[name] = value
    save_file(current, branch.path / "model.safetensors")


REFUSALS = {
    "lacks": (lambda b: change(b, model__norm__weight=None), r"branch 1 lacks 1 tensor.*model\.norm\.weight"),
    "has more": (lambda b: change(b, model__extra=torch.ones(2)), r"branch 1 has 1 tensor.*model\.extra"),
    "shape": (
        lambda b: change(b, model__layers__0__mlp__up_proj__weight=torch.ones(16, 48, dtype=torch.bfloat16)),
        r"up_proj\.weight is \(48, 16\) in the base but \(16, 48\) in branch 1",
    ),
    "vocabulary": (
        lambda b: change(b, model__embed_tokens__weight=torch.ones(41, 16, dtype=torch.bfloat16)),
        r"embed_tokens\.weight.*vocabulary was resized",
    ),
    "integers": (
        lambda b: change(b, model__positions=torch.arange(7) + 1),
        r"model\.positions \(I64\) differs between branch 0 and branch 1",
    ),
    "nan": (
        lambda b: change(b, model__norm__weight=torch.full((16,), float("nan")).bfloat16()),
        r"model\.norm\.weight contains NaN or infinity in branch 1",
    ),
    "infinity": (
        lambda b: change(b, model__scalar=torch.tensor(-float("inf")).bfloat16()),
        r"model\.scalar contains NaN or infinity in branch 1",
    ),
    "config": (
        lambda b: (b.path / "config.json").write_text(json.dumps({"hidden_size": 32})),
        r"config\.json: hidden_size is 16 in the base but 32 in branch 1",
    ),
    "rope": (
        lambda b: (b.path / "config.json").write_text(json.dumps({"rope_parameters": {"rope_theta": 7.0}})),
        "rope_theta is 10000.0 in the base but 7.0 in branch 1",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSALS))
@pytest.mark.parametrize("operator", ["average", "ties", "star"])
def test_what_does_not_fit_is_refused_by_name(tmp_path, branches, case, operator):
    base = write_checkpoint(tmp_path / "base", random_tensors(0), rope_theta=10000.0)
    spoil, message = REFUSALS[case]
    spoil(branches[1])
    with pytest.raises(MergeError, match=message):
        merge(base, branches, tmp_path / "out", operator)
    assert nothing_left(tmp_path, "base", "b0", "b1", "b2")


def test_other_vocabularies_are_refused_and_rewritten_tokenizer_files_are_not(tmp_path, base, branches):
    def tokenizer(vocab, merges, **more):
        return json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "added_tokens": [], **more})

    (base / "tokenizer.json").write_text(tokenizer({"a": 0, "b": 1}, ["a b"]))
    other = branches[0].path / "tokenizer.json"
    other.write_text(tokenizer({"b": 1, "a": 0}, [["a", "b"]], padding={"strategy": "x"}, truncation=None))
    make_plan(base, branches, output=tmp_path / "out")
    other.write_text(tokenizer({"b": 1, "a": 0}, [["a", "b"]], normalizer={"type": "NFC"}))
    assert any("normalizer" in w for w in make_plan(base, branches, output=tmp_path / "out").warnings)
    other.write_text(tokenizer({"b": 0, "a": 1}, [["a", "b"]]))
    with pytest.raises(MergeError, match="vocabulary of branch 0 differ"):
        make_plan(base, branches, output=tmp_path / "out")


@pytest.mark.parametrize("added", [[{"id": 0}, {"id": ["x"]}, {"id": "1"}], ["x"], {"a": 1}])
def test_added_tokens_of_another_form_are_refused(tmp_path, base, branches, added):
    """On commit f5727a1 a traceback: numbers and lists were sorted."""
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    (base / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    (branches[0].path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    with pytest.raises((MergeError, CheckpointError), match=r"added.tokens"):
        make_plan(base, branches, output=tmp_path / "out")


def test_impossible_settings_are_refused(tmp_path, base, branches):
    out = tmp_path / "out"
    one = branches[0]
    for tokens in (0, -1, float("nan"), float("inf"), "x"):
        with pytest.raises(MergeError, match="expected a positive number"):
            make_plan(base, [Branch(one.path, tokens, "odd")], output=out)
    with pytest.raises(MergeError, match="nothing to merge"):
        make_plan(base, [], output=out)
    with pytest.raises(MergeError, match="same name"):
        make_plan(base, [one, one], output=out)
    for key, value in (("scale", float("nan")), ("scale", float("inf")), ("scale", "1/0"), ("dtype", "int8")):
        with pytest.raises(ValidationError, match=key):
            make_plan(base, branches, output=out, **{key: value})
    with pytest.raises(MergeError, match="auto needs"):
        make_plan(base, branches, output=out, scale="auto")
    with pytest.raises(MergeError, match="already exists"):
        make_plan(base, branches, output=one.path)
    with pytest.raises(MergeError, match="overlaps the input"):
        make_plan(base, branches, output=one.path / "out")
    with pytest.raises(CheckpointError, match="not a folder"):
        make_plan(base, [Branch(tmp_path / "none", 1, "none")], output=out)


def test_overflow_of_a_long_step_is_refused(tmp_path):
    base = write_checkpoint(tmp_path / "base", {"w": torch.zeros(4, dtype=torch.float16)})
    branch = write_checkpoint(tmp_path / "b", {"w": torch.full((4,), 6e4, dtype=torch.float16)})
    with pytest.raises(MergeError, match="merged values overflow F16"):
        merge(base, [Branch(branch, 1, "b")], tmp_path / "out", scale=2)
    assert nothing_left(tmp_path, "base", "b")


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, base, branches, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ResourceError, match="are free"):
        make_plan(base, branches, output=tmp_path / "out")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, base, branches):
    """A real limit on file size, in a process of its own."""
    import subprocess
    import sys

    code = f"""
import resource, signal, sys
from pathlib import Path
from merit.errors import ResourceError
from merit.merge import Branch, plan_merge, run_merge
plan = plan_merge({str(base)!r}, [Branch(Path({str(branches[0].path)!r}), 1, "b")], {str(tmp_path / "out")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    run_merge(plan)
except ResourceError as error:
    print(error)
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "filled up" in done.stdout
    assert nothing_left(tmp_path, "base", "b0", "b1", "b2")


def test_the_record_is_there_before_the_folder_has_its_name_and_reads_back(tmp_path, base, branches, monkeypatch):
    seen = []
    real = MergeResult.save

    def save(self, folder):
        assert not (tmp_path / "out").exists()
        seen.append(folder)
        real(self, folder)

    monkeypatch.setattr(MergeResult, "save", save)
    result = run_merge(make_plan(base, branches, "star", output=tmp_path / "out"))
    assert len(seen) == 1
    assert MergeResult.load(tmp_path / "out") == result
    assert result.model_fingerprint == checkpoint.fingerprint(tmp_path / "out")
    assert result.merge_seconds > 0


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"operator": 3}', "{}", '{"operator": "average", "odd": 1}'])
def test_a_damaged_record_is_one_message_that_names_the_file(tmp_path, text):
    (tmp_path / "merge.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"merge\.json"):
        MergeResult.load(tmp_path)


@pytest.mark.parametrize("operator", ["star", "iso_cts"])
def test_a_stack_of_experts_is_read_once_per_pass_not_once_per_expert(tmp_path, operator, monkeypatch):
    from merit.merge.worker import Reader

    experts, shape = 16, (150, 130)  # an expert is no whole number of blocks
    start = {"model.experts.weight": torch.randn(experts, *shape, generator=torch.Generator().manual_seed(0))}
    base = write_checkpoint(tmp_path / "base", start)
    branches = [Branch(write_checkpoint(tmp_path / f"b{k}", near(start, k + 1)), 1, f"b{k}") for k in range(2)]
    reads, read_block = [], Reader.read

    def counted(self, k, source, block, buffer):
        reads.append((k, block))
        return read_block(self, k, source, block, buffer)

    monkeypatch.setattr(Reader, "read", counted)
    record = merge(base, branches, tmp_path / "out", operator).record()
    theta, parts, got = floats(base), [floats(b.path) for b in branches], floats(tmp_path / "out")
    name = "model.experts.weight"
    for i in range(experts):
        tau = OPERATORS[operator].function([p[name][i] - theta[name][i] for p in parts])[0]
        np.testing.assert_allclose(got[name][i], theta[name][i] + tau, rtol=3e-7, atol=1e-9)
    passes = {"star": 2, "iso_cts": 3}[operator]  # one of them for the mean
    assert len(reads) <= experts * 2 * (1 + 2 * passes)  # an expert lies in at most two blocks
    assert [b["fingerprint"] for b in record["branches"]] == [checkpoint.fingerprint(b.path) for b in branches]


@pytest.mark.parametrize(
    "name", ["model.layers.0.conv1d.weight", "visual.patch_embed.proj.weight", "audio.Conv.weight"]
)
@pytest.mark.parametrize("scope", ["linear2d", "all2d"])
def test_convolutions_are_never_matrices(tmp_path, name, scope):
    start = {name: torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))}
    base = write_checkpoint(tmp_path / "base", start)
    branches = [Branch(write_checkpoint(tmp_path / f"b{k}", near(start, k + 1)), 1, f"b{k}") for k in range(2)]
    merge(base, branches, tmp_path / "out", "star", matrix_scope=scope)
    want = sum(floats(b.path)[name] for b in branches) / 2
    np.testing.assert_allclose(floats(tmp_path / "out")[name], want, rtol=1e-7)


ONE_SIDED = [
    (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        r"(factor is unset|rope_type is 'default') in the base but (4\.0|'linear')",
    ),
    ({"sliding_window": 8, "use_sliding_window": True}, r"sliding_window is (unset|False) in the base but"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is unset in the base but 30.0"),
    ({"embedding_multiplier": 12}, "embedding_multiplier is unset in the base but 12"),
    ({"layer_types": ["sliding_attention"]}, "layer_types"),
]


@pytest.mark.parametrize(("more", "message"), ONE_SIDED)
@pytest.mark.parametrize("model_type", ["unknown-to-any-library", "qwen2"])
@pytest.mark.parametrize("null", [False, True])
def test_a_setting_in_one_config_only_is_compared_with_its_default(
    tmp_path, base, branches, more, message, model_type, null
):
    plain = {"model_type": model_type, "num_hidden_layers": 1, **(dict.fromkeys(more) if null else {})}
    config = json.loads((base / "config.json").read_text()) | plain
    for folder in (base, *(b.path for b in branches)):
        (folder / "config.json").write_text(json.dumps(config))
    make_plan(base, branches, output=tmp_path / "out")
    (branches[1].path / "config.json").write_text(json.dumps(config | more))
    with pytest.raises(MergeError, match=message):
        make_plan(base, branches, output=tmp_path / "out")
    (base / "config.json").write_text(json.dumps(config | more))
    with pytest.raises(MergeError, match="in branch 0"):
        make_plan(base, branches, output=tmp_path / "out")


def test_defaults_that_a_library_spells_out_are_no_difference_and_other_settings_warn(tmp_path, base, branches):
    from transformers import Qwen2Config

    Qwen2Config(
        hidden_size=16, vocab_size=40, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, rope_theta=5e4
    ).save_pretrained(tmp_path / "full")
    full = json.loads((tmp_path / "full/config.json").read_text())
    old = {k: full[k] for k in ("model_type", "hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers")}
    old |= {"num_attention_heads": 2, "rope_theta": 5e4}
    for folder in (base, *(b.path for b in branches)):
        (folder / "config.json").write_text(json.dumps(old))
    (branches[1].path / "config.json").write_text(json.dumps(full | {"trainer_remark": "x"}))
    plan = make_plan(base, branches, output=tmp_path / "out")
    notes = [w for w in plan.warnings if "config.json" in w]
    assert notes == ["config.json: trainer_remark is 'x' in branch 1; the base has unset, which is kept."]


def test_one_checkpoint_under_two_spellings_is_refused(tmp_path, base, branches):
    (tmp_path / "link").symlink_to(branches[0].path)
    for other in (tmp_path / "link", branches[1].path / ".." / "b0"):
        with pytest.raises(MergeError, match="branch 0 and again are the same checkpoint"):
            make_plan(base, [*branches, Branch(other, 1, "again")], output=tmp_path / "out")
