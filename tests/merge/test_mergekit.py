"""Agreement with mergekit's ``linear``, an independent implementation, in float32."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from merge_cases import make_plan, near, write_checkpoint
from safetensors.torch import load_file

from merit.merge import Branch, run_merge

EXECUTABLE = os.environ.get("MERIT_MERGEKIT") or shutil.which("mergekit-yaml")


@pytest.mark.mergekit
@pytest.mark.skipif(EXECUTABLE is None, reason="mergekit-yaml is neither on PATH nor named by MERIT_MERGEKIT")
def test_average_agrees_with_mergekit_linear(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(num_attention_heads=2, num_key_value_heads=1, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    start = load_file(tmp_path / "base" / "model.safetensors")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    counts = [3_333_333, 123_456, 9_876]
    branches = []
    for k, tokens in enumerate(counts):
        path = write_checkpoint(tmp_path / f"b{k}", near(start, k, step=0.05), **config)
        branches.append(Branch(path, tokens, f"b{k}"))
    run_merge(make_plan(tmp_path / "base", branches, output=tmp_path / "ours"))
    recipe = {
        "merge_method": "linear",
        "dtype": "float32",
        "parameters": {"normalize": True},
        "models": [{"model": str(b.path), "parameters": {"weight": b.weight / sum(counts)}} for b in branches],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = subprocess.run(
        [str(EXECUTABLE), str(tmp_path / "recipe.yaml"), str(tmp_path / "theirs")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    theirs = load_file(next((tmp_path / "theirs").glob("*.safetensors")))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name].float(), rtol=0, atol=1e-6)
