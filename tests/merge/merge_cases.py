"""Helpers of the merge tests: checkpoints written by the safetensors library itself, and exact rounding by definition."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from merit.merge import Branch, MergePlan, lora, plan_merge
from merit.recipe.schema import MergeSettings

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FORMATS = {
    "BF16": (8, -133),
    "F16": (11, -24),
    "F32": (24, -149),
}  # significant bits, exponent of the smallest subnormal

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 16,
    "vocab_size": 40,
    "tie_word_embeddings": True,
    "use_cache": True,
    "dtype": "bfloat16",
}


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **config) -> Path:
    """A checkpoint folder, in ``shards`` files, with the tensors dealt out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {n: tensors[n] for n in names[i::shards]}
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def random_tensors(seed: int, dtype: torch.dtype = torch.bfloat16, spread: float = 0.02) -> dict[str, torch.Tensor]:
    """Embeddings, two linear weights, a norm, a scalar, an empty tensor and an integer buffer."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (40, 16),
        "model.layers.0.mlp.down_proj.weight": (16, 48),
        "model.layers.0.mlp.up_proj.weight": (48, 16),
        "model.norm.weight": (16,),
        "model.scalar": (),
        "model.empty": (0, 16),
    }
    tensors = {n: (torch.randn(s, generator=g) * spread).to(dtype) for n, s in shapes.items()}
    tensors["model.positions"] = torch.arange(7)
    return tensors


def near(tensors: dict[str, torch.Tensor], seed: int, step: float = 0.002) -> dict[str, torch.Tensor]:
    """A branch: the same tensors, floating ones a small random step away."""
    g = torch.Generator().manual_seed(seed)
    return {
        n: (t + torch.randn(t.shape, generator=g) * step).to(t.dtype) if t.is_floating_point() else t.clone()
        for n, t in tensors.items()
    }


def nearest(x: Fraction, tag: str) -> float:
    """``x`` rounded to the format by definition: the nearest multiple of its spacing, ties to the even one."""
    bits, smallest = FORMATS[tag]
    if x == 0:
        return 0.0
    exponent = 0
    size = abs(x)
    while size >= 2:
        size, exponent = size / 2, exponent + 1
    while size < 1:
        size, exponent = size * 2, exponent - 1
    spacing = Fraction(2) ** max(exponent - bits + 1, smallest)
    return float(round(x / spacing) * spacing)  # Fraction rounds halves to even


def values(raw: np.ndarray, tag: str) -> np.ndarray:
    """Raw values as float64, by torch."""
    array = np.ascontiguousarray(raw)
    if tag == "BF16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).double().numpy()
    return array.astype(np.float64)


def raw(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's raw values as the merge sees them."""
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def make_plan(
    base, branches: list[Branch], operator="average", options=None, scale=1, output="merged", **more
) -> MergePlan:
    """``plan_merge`` with the settings spelled out."""
    settings = MergeSettings(operator=operator, options=options or {}, scale=scale, dtype=more.pop("dtype", None))
    return plan_merge(base, branches, output, settings, **more)


def plan_adapters(base, branches: list[Branch], operator="average", options=None, scale=1, output="merged", **more):
    """``plan_adapter_merge`` with the settings spelled out."""
    settings = MergeSettings(operator=operator, options=options or {}, scale=scale, dtype=more.pop("dtype", None))
    return lora.plan_adapter_merge(base, branches, output, settings, **more)
