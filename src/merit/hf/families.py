"""Vision-language families: which parameters play which role, and how each processes images.

One entry per family in :data:`FAMILIES`; the rest of the package contains no family names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image as pil
from transformers import PreTrainedTokenizerFast

from merit.errors import CheckpointError
from merit.hf.image_inputs import Gemma3Images, Idefics3Images, ImageInputs, InternVLImages, LlavaImages, QwenImages
from merit.hf.side_files import reason

Role = Literal["language", "projector", "vision"]
ROLES: tuple[Role, ...] = ("language", "projector", "vision")


@dataclass(frozen=True)
class Family:
    """One family of vision-language models.

    Attributes:
        inputs: How it processes images.
        language: Pattern of the language decoder's parameter names, as modules or as files, from the start.
        vision: Pattern of the vision encoder's.
        projector: Pattern of the projector's.
    """

    inputs: type[ImageInputs]
    language: str
    vision: str
    projector: str

    def role(self, name: str) -> Role:
        """The role of a parameter, by its module's or its file's name.

        Raises:
            CheckpointError: The name does not have exactly one role, so what is trained would be a guess.
        """
        found = self.roles(name)
        if len(found) != 1:
            raise CheckpointError(
                f"model.base: the parameter {name} is {' and '.join(found) or 'neither language, projector nor vision'}: "
                "the checkpoint is not structured like others of its family.",
                "Use a checkpoint as it was published, or one saved by transformers.",
            )
        return found[0]

    def roles(self, name: str) -> list[Role]:
        """Roles whose pattern the name matches: one for every parameter, none for a module above all roles."""
        core = _WRAPPERS.sub("", name)
        return [role for role in ROLES if re.match(getattr(self, role), core)]


_WRAPPERS = re.compile(r"^(base_model\.model\.|module\.)*(model\.)?")
_HEAD = r"lm_head\."
_QWEN = Family(
    QwenImages,
    language=rf"(language_model\.|layers\.|embed_tokens\.|norm\.|{_HEAD})",
    vision=r"visual\.(?!(deepstack_)?merger)",
    projector=r"visual\.(deepstack_)?merger",
)
_LLAVA = Family(
    LlavaImages,
    language=rf"(language_model\.|{_HEAD})",
    vision=r"vision_tower\.",
    projector=r"multi_modal_projector\.",
)
_IDEFICS3 = Family(
    Idefics3Images, language=rf"(text_model\.|{_HEAD})", vision=r"vision_model\.", projector=r"connector\."
)

FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "llava": _LLAVA,
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "gemma3": replace(_LLAVA, inputs=Gemma3Images),
    "internvl": replace(_LLAVA, inputs=InternVLImages),
}
"""By transformers' ``model_type``."""


def image_inputs(
    folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, max_pixels: int
) -> ImageInputs | None:
    """How the base in ``folder`` processes images; None for a text-only base.

    Raises:
        CheckpointError: Its image processor or image token is missing, or its processor cannot make a blank picture.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return None
    try:
        inputs = family.inputs(folder, config, tokenizer, max_pixels)
        inputs.count(*_BLANK)
        inputs.pixels([pil.new("RGB", _BLANK)])
    except CheckpointError:
        raise
    except Exception as error:  # whatever the library raises on settings of the wrong kind
        raise CheckpointError(
            f"model.base: {folder / 'preprocessor_config.json'} cannot be used: a blank picture of {_BLANK[0]} × "
            f"{_BLANK[1]} pixels fails ({reason(error)}).",
            "Copy or download the base again.",
        ) from None
    return inputs


_BLANK = (64, 48)  # width and height of the picture that every processor is tried with


def positions(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Positions (3, B, L) int64 of a prompt with images, for models that number them in three dimensions; else None.

    The next token's position is the last one plus 1 in every dimension, since a prompt ends in text.
    """
    if "image_grid_thw" not in inputs:
        return None
    inner = next(module for module in model.modules() if hasattr(module, "get_rope_index"))
    wanted = ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")
    found: torch.Tensor = inner.get_rope_index(**{key: inputs[key] for key in wanted})[0]  # type: ignore[operator]
    return found
