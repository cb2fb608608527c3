"""A bare CLIP or SigLIP encoder as the source of an assembly: the LLaVA that is built around it.

Such a checkpoint does not say which features to use or where an image goes in a prompt, so LLaVA's choices
are used: the patch features of the last layer but one, without the class token, and the token ``<image>``. No
other encoders are supported, and nothing is written.

Source: Liu et al., arXiv 2304.08485 (architecture) and 2310.03744 (two-layer projector).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, LlavaConfig

from merit.errors import CheckpointError
from merit.hf.models import read_model
from merit.hf.side_files import read_config

Config = Any
"""A transformers config: which settings it has depends on the architecture."""

BARE = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")
"""Model types of encoders that are accepted without a vision-language model around them."""

IMAGE_TOKEN = "<image>"


def is_bare(folder: Path) -> bool:
    """Whether the folder contains such an encoder (alone, or with its text tower, which is ignored)."""
    return read_config(folder).get("model_type") in BARE


def llava_around(folder: Path, encoder: Config, text: Config) -> LlavaConfig:
    """Config of the LLaVA that joins an encoder and a language model.

    Args:
        folder: The encoder's folder.
        encoder: Its config, with or without its text tower's.
        text: The language model's config.

    Raises:
        CheckpointError: The folder has no image processor.
    """
    if not (folder / "preprocessor_config.json").is_file():
        raise CheckpointError(
            f"prepare.assemble.vision_from: {folder} has no preprocessor_config.json (image processor)."
        )
    vision = getattr(encoder, "vision_config", encoder)
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if _has_class_token(vision) else "full",
    )


def encoder_state(folder: Path, vision: Config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The encoder's tensors under their names in a LLaVA.

    Raises:
        CheckpointError: Some of its weights are missing.
    """
    model = read_model(
        AutoModel, folder, dtype, where="prepare.assemble.vision_from: ", options={"config": vision}, allow_unused=True
    )
    return {f"model.vision_tower.{name}": tensor for name, tensor in model.state_dict().items()}


def processor_config(config: Config) -> dict[str, Any]:
    """``processor_config.json`` of the joined model, as in LLaVA's published folders."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": config.vision_config.patch_size,
        "num_additional_image_tokens": int(_has_class_token(config.vision_config)),
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }


def _has_class_token(vision: Config) -> bool:
    return str(vision.model_type) == "clip_vision_model"
