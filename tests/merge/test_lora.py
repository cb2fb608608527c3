"""Adapters written by PEFT itself; the merges against PEFT's own merge_and_unload in float64."""

import errno
import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from merge_cases import make_plan, plan_adapters
from safetensors.torch import load_file, save_file

from merit.errors import CheckpointError, MergeError, ResourceError
from merit.hf import checkpoint
from merit.merge import Branch, MergeResult, merge_into_adapter, run_merge

COUNTS = [3, 5, 4]
KINDS = {
    "plain": {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
    },
    "head and norms in full": {"target_modules": ["o_proj"], "r": 3, "modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "r": 3, "lora_alpha": 5},
    "biases": {"target_modules": ["q_proj", "k_proj"], "r": 3, "bias": "all"},
    "biases of adapted modules": {"target_modules": ["q_proj", "o_proj"], "r": 3, "bias": "lora_only"},
    "gaussian start": {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "gaussian"},
    "orthogonal start": {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "orthogonal"},
    "mica start": {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "mica"},
    "random start": {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": False},
    "lora bias": {"target_modules": ["q_proj"], "r": 3, "lora_bias": True},
}


def tiny(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    return model


def shake(model, seed, names=("lora_", "modules_to_save", "bias")):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and any(n in name for n in names):
                p.add_(torch.randn(p.shape, generator=g) * 0.1)


def adapters(tmp_path, kind, count=3, ranks=None, **more):
    """PEFT adapters with random weights, and each branch's full state in float64 by PEFT's own merge."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2ForCausalLM

    branches, states = [], []
    for k in range(count):
        model = Qwen2ForCausalLM.from_pretrained(tmp_path / "base")
        config = {**KINDS[kind], **more} | ({"r": ranks[k]} if ranks else {})
        peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
        shake(peft, k)
        peft.save_pretrained(tmp_path / f"a{k}")
        merged = peft.double().merge_and_unload()
        states.append({n: p.detach().clone() for n, p in merged.state_dict().items()})
        branches.append(Branch(tmp_path / f"a{k}", COUNTS[k], f"adapter {k}"))
    return branches, states


def mean(states, counts=COUNTS):
    return {
        n: sum(c * s[n] for c, s in zip(counts, states, strict=False)) / sum(counts[: len(states)]) for n in states[0]
    }


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_full_merge_is_the_mean_of_pefts_own_merges(tmp_path, kind):
    tiny(tmp_path)
    branches, states = adapters(tmp_path, kind)
    result = run_merge(plan_adapters(tmp_path / "base", branches, output=tmp_path / "out"))
    merged, base, want = (
        load_file(tmp_path / "out/model.safetensors"),
        load_file(tmp_path / "base/model.safetensors"),
        mean(states),
    )
    assert merged.keys() == base.keys()
    changed = [n for n in merged if not torch.equal(merged[n], base[n])]
    assert changed == [n for n in merged if not torch.allclose(want[n], base[n].double(), atol=1e-12, rtol=0)]
    assert changed
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), want[name], rtol=2e-7, atol=1e-9)
    assert result.record()["adapters"]["mode"] == "full"
    assert [b["fingerprint"] for b in result.record()["branches"]] == [checkpoint.fingerprint(b.path) for b in branches]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_concatenated_adapter_loads_in_peft_and_is_exact(tmp_path, kind):
    from peft import PeftModel
    from transformers import Qwen2ForCausalLM

    tiny(tmp_path)
    branches, states = adapters(tmp_path, kind)
    result = merge_into_adapter(tmp_path / "base", branches, tmp_path / "out")
    peft = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    got, want = peft.double().merge_and_unload().state_dict(), mean(states)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-7)
    rank = KINDS[kind]["r"]
    assert max(result.adapters.ranks.values()) == 3 * rank
    assert result.adapters.relative_error == 0
    assert result.model_fingerprint == checkpoint.fingerprint(tmp_path / "out")


def test_ranks_may_differ_between_adapters_and_modules(tmp_path):
    from peft import PeftModel
    from transformers import Qwen2ForCausalLM

    tiny(tmp_path)
    branches, states = adapters(tmp_path, "patterns", ranks=[2, 5, 3])
    result = merge_into_adapter(tmp_path / "base", branches, tmp_path / "out")
    assert set(result.adapters.ranks.values()) == {10, 6}
    peft = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    got = peft.double().merge_and_unload().state_dict()
    for name, tensor in mean(states).items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 3, 12, 40])
def test_recompression_is_the_best_of_its_rank_and_reports_its_error(tmp_path, rank):
    from peft import PeftModel
    from transformers import Qwen2ForCausalLM

    model = tiny(tmp_path)
    start = {n: p.detach().double().clone() for n, p in model.state_dict().items()}
    branches, states = adapters(tmp_path, "plain")
    result = merge_into_adapter(tmp_path / "base", branches, tmp_path / "out", rank=rank)
    peft = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    got = peft.double().merge_and_unload().state_dict()
    dropped, whole = 0.0, 0.0
    for name, tensor in mean(states).items():
        delta = (tensor - start[name]).numpy()
        if not np.abs(delta).max() > 1e-9:
            continue
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose((got[name] - start[name]).numpy(), best, atol=1e-6)
        error = np.linalg.norm(s[rank:]) / np.linalg.norm(s)
        assert result.adapters.relative_errors[name] == pytest.approx(error, abs=1e-6)
        dropped, whole = dropped + np.sum(s[rank:] ** 2), whole + np.sum(s**2)
    assert result.adapters.relative_error == pytest.approx((dropped / whole) ** 0.5, abs=1e-6)
    assert (result.adapters.relative_error < 1e-6) == (rank >= 12)


def test_a_common_frozen_a_keeps_the_rank(tmp_path):
    tiny(tmp_path)
    branches, _ = adapters(tmp_path, "plain")
    first = load_file(branches[0].path / "adapter_model.safetensors")
    wants = []
    for b in branches:
        tensors = load_file(b.path / "adapter_model.safetensors")
        tensors |= {n: t.clone() for n, t in first.items() if "lora_A" in n}
        save_file(tensors, b.path / "adapter_model.safetensors", {"format": "pt"})
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        wants.append(2.0 * tensors[name.format("B")].double() @ tensors[name.format("A")].double())
    result = merge_into_adapter(tmp_path / "base", branches, tmp_path / "out")
    assert set(result.adapters.ranks.values()) == {4}
    out = load_file(tmp_path / "out/adapter_model.safetensors")
    got = out[name.format("B")].double() @ out[name.format("A")].double()
    torch.testing.assert_close(got, sum(c * w for c, w in zip(COUNTS, wants, strict=True)) / 12, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("operator", ["uniform", "task_arithmetic", "star", "tsv"])
def test_operators_act_on_the_full_update(tmp_path, operator):
    from merit.merge import OPERATORS

    model = tiny(tmp_path)
    start = {n: p.detach().double().numpy() for n, p in model.state_dict().items()}
    branches, states = adapters(tmp_path, "plain")
    run_merge(plan_adapters(tmp_path / "base", branches, operator, scale="0.5", output=tmp_path / "out"))
    merged = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    deltas = [s[name].numpy() - start[name] for s in states]
    if operator in ("star", "tsv"):
        tau = OPERATORS[operator].function(deltas)[0]
    else:
        weights = [1, 1, 1] if operator == "uniform" else COUNTS
        tau = sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)
    np.testing.assert_allclose(merged[name].double().numpy(), start[name] + 0.5 * tau, rtol=3e-7, atol=1e-8)


def test_fan_in_fan_out_of_gpt2(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "base"
    )
    branches, states = [], []
    for k in range(2):
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        peft = get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), config)
        shake(peft, k)
        peft.save_pretrained(tmp_path / f"a{k}")
        states.append({n: p.clone() for n, p in peft.double().merge_and_unload().state_dict().items()})
        branches.append(Branch(tmp_path / f"a{k}", COUNTS[k], f"a{k}"))
    run_merge(plan_adapters(tmp_path / "base", branches, output=tmp_path / "out"))
    merged, want = load_file(tmp_path / "out/model.safetensors"), mean(states, COUNTS[:2])
    for name, tensor in merged.items():
        torch.testing.assert_close(
            tensor.double(), want[name if name in want else f"transformer.{name}"], rtol=2e-7, atol=1e-9
        )


def test_an_adapter_that_changed_since_training_is_found(tmp_path):
    tiny(tmp_path)
    branches, _ = adapters(tmp_path, "plain", count=1)
    recorded = [Branch(b.path, b.weight, b.name, checkpoint.fingerprint(b.path)) for b in branches]
    tensors = load_file(branches[0].path / "adapter_model.safetensors")
    tensors[next(iter(tensors))][0, 0] += 1
    save_file(tensors, branches[0].path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter 0 .* is not what was recorded"):
        run_merge(plan_adapters(tmp_path / "base", recorded, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def edit(folder, **settings):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))


def test_what_cannot_be_merged_is_refused_with_the_reason(tmp_path):
    tiny(tmp_path)
    branches, _ = adapters(tmp_path, "plain")
    base, out = tmp_path / "base", tmp_path / "out"
    with pytest.raises(MergeError, match="full weights first"):
        plan_adapters(base, branches, "ties", output=out)
    for settings, message in (
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"target_modules": ["q_proj"]}, "differ in target_modules"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ):
        original = (branches[1].path / "adapter_config.json").read_text()
        edit(branches[1].path, **settings)
        with pytest.raises(MergeError, match=message):
            plan_adapters(base, branches, output=out)
        (branches[1].path / "adapter_config.json").write_text(original)
    tensors = load_file(branches[1].path / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_B" in n)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, branches[1].path / "adapter_model.safetensors")
    with pytest.raises(MergeError, match="NaN or infinity in adapter 1"):
        merge_into_adapter(base, branches, out)
    with pytest.raises(MergeError, match="NaN or infinity in adapter 1"):
        run_merge(plan_adapters(base, branches, output=out))
    save_file(
        {n.replace("layers.1", "layers.7"): t for n, t in tensors.items()},
        branches[1].path / "adapter_model.safetensors",
    )
    with pytest.raises(MergeError, match=r"layers\.7.*no counterpart"):
        plan_adapters(base, branches, output=out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a0", "a1", "a2", "base"]


def test_the_record_of_a_merged_adapter_lies_next_to_it(tmp_path):
    tiny(tmp_path)
    branches, _ = adapters(tmp_path, "plain", count=2)
    result = merge_into_adapter(tmp_path / "base", branches, tmp_path / "out")
    assert MergeResult.load(tmp_path / "out") == result
    assert result.model_fingerprint == checkpoint.fingerprint(tmp_path / "out")


@pytest.mark.parametrize("operator", ["star", "tsv", "iso_cts"])
@pytest.mark.parametrize("scope", ["linear2d", "all2d"])
def test_matrix_operators_do_the_same_to_adapters_as_to_folded_checkpoints(tmp_path, operator, scope):
    tiny(tmp_path)
    kind = {"target_modules": ["embed_tokens", "up_proj"], "modules_to_save": ["o_proj", "norm", "lm_head"]}
    branches, states = adapters(tmp_path, "plain", bias="all", **kind)
    folded, options = [], {"matrix_scope": scope}
    for branch, state in zip(branches, states, strict=True):
        folder = tmp_path / f"full{len(folded)}"
        folder.mkdir()
        save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text((tmp_path / "base/config.json").read_text())
        folded.append(Branch(folder, branch.weight, branch.name))
    plans = [
        planned(tmp_path / "base", b, operator, options, "0.5", tmp_path / out, dtype="base")
        for planned, b, out in ((plan_adapters, branches, "out"), (make_plan, folded, "want"))
    ]
    records = [run_merge(plan) for plan in plans]
    got, want = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "want"))
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=3e-7, atol=1e-8)
    ours, theirs = (r.statistics for r in records)
    assert ours["norm_ratio"] == pytest.approx(theirs["norm_ratio"], rel=1e-5)
    for key, by_tensor in theirs.items():
        if isinstance(by_tensor, dict):
            adapted = {n: by_tensor[n] for n in ours[key]}
            assert ours[key] == pytest.approx(adapted, rel=1e-6)
            assert any("o_proj" in n for n in adapted)
            assert any("embed" in n for n in adapted) == (scope == "all2d")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "base"])
def test_output_dtype_of_adapters(tmp_path, dtype):
    tiny(tmp_path)
    branches, states = adapters(tmp_path, "head and norms in full", count=2)
    plan = plan_adapters(tmp_path / "base", branches, output=tmp_path / "out", dtype=dtype)
    run_merge(plan)
    kind = {"base": torch.float32}.get(dtype) or getattr(torch, dtype)
    merged, want = load_file(tmp_path / "out/model.safetensors"), mean(states, COUNTS[:2])
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, want[name].to(kind), rtol=2e-7, atol=1e-9)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == {"base": "float32"}.get(dtype, dtype)


def test_adapters_of_other_bases_are_refused_or_told(tmp_path):
    tiny(tmp_path)
    branches, _ = adapters(tmp_path, "plain", count=2)
    base, out = tmp_path / "base", tmp_path / "out"
    assert plan_adapters(base, branches, output=out).warnings == ()
    edit(branches[1].path, base_model_name_or_path=f"{base}/../base")
    assert plan_adapters(base, branches, output=out).warnings == ()
    for other in ("some/model", None):
        edit(branches[1].path, base_model_name_or_path=other)
        with pytest.raises(MergeError, match="differ in base_model_name_or_path"):
            plan_adapters(base, branches, output=out)
        with pytest.raises(MergeError, match="differ in base_model_name_or_path"):
            merge_into_adapter(base, branches, out)
    for other, told in (("some/model", 0), (None, 0), ("/no/such/base", 1), (str(branches[0].path), 1)):
        for b in branches:
            edit(b.path, base_model_name_or_path=other)
        assert len(plan_adapters(base, branches, output=out).warnings) == told
    result = merge_into_adapter(base, branches, out)
    assert "as their base" in result.warnings[0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        *[({"init_lora_weights": start}, start) for start in ("lora_ga", "pissa", "olora", "corda", "loftq", "later")],
        ({"kasa_config": {"beta": 0.1}}, "KaSA"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "QALoRA"),
        ({"invented_in_2027": {"a": 1}}, "invented_in_2027"),
    ],
)
def test_only_what_is_known_to_be_exact_is_merged(tmp_path, settings, named):
    """Fails on commit f5727a1: LoRA-GA, KaSA and whatever its deny list did not name were merged as plain LoRA."""
    tiny(tmp_path)
    branches, _ = adapters(tmp_path, "plain", count=2)
    edit(branches[1].path, **settings)
    with pytest.raises(MergeError, match=named):
        plan_adapters(tmp_path / "base", branches, output=tmp_path / "out")
    with pytest.raises(MergeError, match=named):
        merge_into_adapter(tmp_path / "base", branches, tmp_path / "out")


def test_lora_ga_is_refused_as_peft_writes_it(tmp_path):
    """Fails on commit f5727a1: two LoRA-GA adapters, which shift the base at their start, merged 1.7e-3 off.

    PEFT's own start moves the base: θ0 + s·B·A is not the model that was trained.
    """
    from peft import LoraConfig, LoraGAConfig, get_peft_model
    from peft.tuners.lora.loraga import preprocess_loraga

    model = tiny(tmp_path)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def step():
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()

    preprocess_loraga(model, config, step)
    peft = get_peft_model(model, config)
    assert not torch.equal(peft.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight, before)
    peft.save_pretrained(tmp_path / "a")
    with pytest.raises(MergeError, match="lora_ga"):
        plan_adapters(tmp_path / "base", [Branch(tmp_path / "a", 1, "a")], output=tmp_path / "out")


def test_adapters_saved_by_other_peft_versions_merge(tmp_path):
    """Fails on commit f5727a1: a key that an older PEFT does not write counted as different from its default."""
    tiny(tmp_path)
    branches, states = adapters(tmp_path, "plain", count=2)
    file = branches[1].path / "adapter_config.json"
    config = json.loads(file.read_text())
    older = {
        key: value for key, value in config.items() if key not in ("lora_bias", "use_dora", "bias", "fan_in_fan_out")
    }
    older |= {"modules_to_save": [], "layers_to_transform": None}
    assert len(older) < len(config)
    file.write_text(json.dumps(older))
    run_merge(plan_adapters(tmp_path / "base", branches, output=tmp_path / "out"))
    merged, want = load_file(tmp_path / "out/model.safetensors"), mean(states, COUNTS[:2])
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), want[name], rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize(
    "settings", [{"alpha_pattern": {"(": 3}}, {"alpha_pattern": [1]}, {"lora_alpha": "x"}, {"lora_alpha": float("nan")}]
)
def test_odd_values_in_an_adapter_s_config_are_one_message(tmp_path, settings):
    """Fails on commit f5727a1: ``alpha_pattern {"(": 3}`` was a traceback of the regular expressions' module."""
    tiny(tmp_path)
    branches, _ = adapters(tmp_path, "plain", count=1)
    edit(branches[0].path, **settings)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: \w*alpha\w* is"):
        plan_adapters(tmp_path / "base", branches, output=tmp_path / "out")


@pytest.mark.parametrize("shape", [(), (4,), (0, 16)])
def test_factors_of_an_impossible_shape_are_refused_by_name(tmp_path, shape):
    tiny(tmp_path)
    branches, _ = adapters(tmp_path, "plain", count=1)
    file = branches[0].path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "q_proj.lora_A" in n)
    tensors[name] = torch.zeros(shape)
    tensors[name.replace("_A", "_B")] = torch.zeros(16, shape[0] if shape else 1)
    save_file(tensors, file)
    with pytest.raises(MergeError, match="q_proj"):
        plan_adapters(tmp_path / "base", branches, output=tmp_path / "out")


@pytest.mark.parametrize("rank", [None, 2])
def test_a_full_disk_is_one_message_in_adapter_merges_too(tmp_path, rank, monkeypatch):
    """Fails on commit f5727a1: no check of the free space, and a traceback when the disk filled up."""
    tiny(tmp_path)
    branches, _ = adapters(tmp_path, "plain", count=2)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(ResourceError, match="are free"):
            merge_into_adapter(tmp_path / "base", branches, tmp_path / "out", rank=rank)

    def full(*_args, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("merit.merge.lora.write_bytes", full)
    with pytest.raises(ResourceError, match="filled up"):
        merge_into_adapter(tmp_path / "base", branches, tmp_path / "out", rank=rank)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a0", "a1", "base"]


def test_leftovers_of_killed_adapter_merges_are_swept(tmp_path):
    """Fails on commit f5727a1: adapter merges had a writer of their own that never swept."""
    tiny(tmp_path)
    branches, _ = adapters(tmp_path, "plain", count=1)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".out.{socket.gethostname()}.{dead.pid}.partial").mkdir()
    merge_into_adapter(tmp_path / "base", branches, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a0", "base", "out"]


@pytest.mark.parametrize("alike", [True, False])
def test_a_merged_adapter_has_the_pixel_limit_that_its_branches_were_trained_with(tmp_path, alike):
    tiny(tmp_path)
    branches, _ = adapters(tmp_path, min(KINDS), count=2)
    name = "preprocessor_config.json"
    (tmp_path / "base" / name).write_text('{"max_pixels": 1000}')
    for k, branch in enumerate(branches):
        (branch.path / name).write_text(json.dumps({"max_pixels": 500 if alike else 500 + k}))
    merge_into_adapter(tmp_path / "base", branches, tmp_path / "out")
    assert json.loads((tmp_path / "out" / name).read_text()) == {"max_pixels": 500 if alike else 1000}
