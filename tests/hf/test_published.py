"""Published sizes, recounted: the architectures are built from the published configs, without memory for their weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from merit.hf.families import FAMILIES
from merit.hf.published import PUBLISHED


def qwen(hidden: int, layers: int, heads: int, kv: int, inner: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


TEXT = {
    "0.5B": qwen(896, 24, 14, 2, 4864, 151936, True),
    "1.5B": qwen(1536, 28, 12, 2, 8960, 151936, True),
    "3B": qwen(2048, 36, 16, 2, 11008, 151936, True),
    "7B": qwen(3584, 28, 28, 4, 18944, 152064, False),
}
CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def config(name: str) -> Any:
    import transformers as t

    size = next((size for size in TEXT if f"-{size}" in name), "")
    if name.startswith("llava-hf"):
        vision = t.CLIPVisionConfig(**CLIP_LARGE, image_size=336, patch_size=14, projection_dim=768)
        return t.LlavaConfig(vision_config=vision, text_config=t.LlamaConfig(vocab_size=32064))
    if "VL" not in name:
        return t.Qwen2Config(**TEXT[size])
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
    vision["out_hidden_size"] = TEXT[size]["hidden_size"]
    tied = TEXT[size]["tie_word_embeddings"]
    return t.Qwen2_5_VLConfig(text_config=TEXT[size], vision_config=vision, tie_word_embeddings=tied)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes(name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    made, published = config(name), PUBLISHED[name]
    family = FAMILIES.get(made.model_type)
    kind: Any = AutoModelForCausalLM if family is None else AutoModelForImageTextToText
    with torch.device("meta"):
        model = kind.from_config(made)
    counts: Counter[str] = Counter()
    for parameter, tensor in model.named_parameters():
        counts[family.role(parameter) if family else "language"] += tensor.numel()
    assert published.family == made.model_type
    assert (counts["language"], counts["projector"], counts["vision"]) == (
        published.language,
        published.projector,
        published.vision,
    )
    assert published.parameters == sum(counts.values())
