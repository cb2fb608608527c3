"""Tiny vision-language bases of the real classes, in folders laid out as the published checkpoints are.

Byte-level tokenizers (Qwen2's class without merges), random weights, bf16 or float32 files, the families' own chat
templates in short, and ``preprocessor_config.json`` / ``processor_config.json`` with the keys that the hub's folders have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + '</s>' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
IDEFICS3_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
FAMILIES = ("qwen2_5_vl", "llava", "idefics3")
ALL_FAMILIES = (*FAMILIES, "qwen2_vl", "qwen3_vl", "smolvlm")


def byte_symbols() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_tokenizer(specials: list[str], eos: str, pad: str) -> Any:
    from transformers import Qwen2Tokenizer

    vocabulary = {symbol: index for index, symbol in enumerate([*specials, *byte_symbols()])}
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token=pad, eos_token=eos, pad_token=pad, extra_special_tokens=specials
    )


def make_base(
    family: str,
    folder: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    processor: dict[str, Any] | None = None,
) -> Path:
    """Write a tiny base of ``family`` into ``folder``; equal arguments give equal bytes.

    ``text``, ``vision`` and ``processor`` change single settings of a Qwen base's config and image processor.
    """
    import torch

    torch.manual_seed(seed)
    if family.startswith("qwen"):
        model, tokenizer, template, preprocessor, published = _qwen(family, text or {}, vision or {}, processor or {})
    else:
        model, tokenizer, template, preprocessor, published = (_llava if family == "llava" else _idefics3)(family)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    if published:
        (folder / "processor_config.json").write_text(json.dumps(published, indent=2))
    return folder


def _qwen(family: str, text: dict[str, Any], vision: dict[str, Any], processor: dict[str, Any]) -> tuple[Any, ...]:
    import transformers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
    specials += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(specials, "<|im_end|>", "<|endoftext|>")
    text = {**TEXT, "vocab_size": len(tokenizer), **text}
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    side = half * 3 // 8
    rope: dict[str, Any] = {
        "rope_type": "default",
        "mrope_section": [half - 2 * side, side, side],
        "rope_theta": 10000.0,
    }
    if family == "qwen3_vl":
        rope["mrope_interleaved"] = True
        seen = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 4}
        seen |= {"out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        text["head_dim"] = 16
    elif family == "qwen2_vl":
        seen = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 4}
    else:
        seen = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
        seen |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    prefix = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    ids = {
        key: tokenizer.convert_tokens_to_ids(token)
        for key, token in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }
    config = getattr(transformers, f"{prefix}Config")(
        text_config={**text, "rope_scaling": rope, "rope_parameters": rope}, vision_config={**seen, **vision}, **ids
    )
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor" + ("Fast" if family == "qwen3_vl" else ""),
        "processor_class": f"{prefix}Processor",
        "min_pixels": 64,
        "max_pixels": 4096,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        **processor,
    }
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    return model, tokenizer, QWEN_TEMPLATE, preprocessor, None


def _llava(family: str) -> tuple[Any, ...]:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    tokenizer = byte_tokenizer(["<pad>", "</s>", "<image>"], "</s>", "<pad>")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = LlavaConfig(
        text_config=Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": 8,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    return LlavaForConditionalGeneration(config), tokenizer, LLAVA_TEMPLATE, preprocessor, processor


def _idefics3(family: str) -> tuple[Any, ...]:
    import transformers

    tiles = [f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)]
    specials = ["<pad>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
    tokenizer = byte_tokenizer([*specials, *tiles], "<end_of_utterance>", "<pad>")
    prefix = "Idefics3" if family == "idefics3" else "SmolVLM"
    config = getattr(transformers, f"{prefix}Config")(
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=len(tokenizer), pad_token_id=0),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    preprocessor = {
        "image_processor_type": f"{prefix}ImageProcessor",
        "processor_class": f"{prefix}Processor",
        "size": {"longest_edge": 32},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": True,
        "do_pad": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 1,
    }
    processor = {"processor_class": f"{prefix}Processor", "image_seq_len": 4}
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    return model, tokenizer, IDEFICS3_TEMPLATE, preprocessor, processor
