"""How an image becomes tokens and pixels, one class per kind of vision-language model.

The library's own processors are not used: Qwen's requires a video processor that needs torchvision, SmolVLM's a package
that spells out numbers, and ``AutoProcessor`` returns a bare tokenizer for an unknown class. Its image processors are (the
PIL ones), so an image is resized, cut and normalised as the base's authors published it. Not covered: video, audio,
reading image files (:mod:`merit.hf.images`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image as pil
from PIL.Image import Image
from transformers import AutoImageProcessor, PreTrainedTokenizerFast
from transformers.image_processing_utils import BaseImageProcessor

from merit.errors import CheckpointError
from merit.hf.images import ImageRef, read_image
from merit.hf.side_files import PROCESSOR, read_json, reason

MOST_THIN = 200
"""Longest side over shortest. Qwen's processor refuses thinner images; others would scale them up to any size."""


class ImageInputs(ABC):
    """Images as one base processes them: placeholder text for the prompt, tensors for the model.

    Attributes:
        token: The text of the image token, which the tokenizer encodes as one token.
        token_id: Its id; the model inserts image features at its positions.
        place: What a chat template writes for an image, to be replaced by :meth:`text`: in most families the image token.
        changed: Settings of the image processor that ``max_pixels`` has changed, by name; empty if none.
        settings: What determines the tensors (recorded, and part of every encoded dataset's fingerprint).
    """

    types: ClassVar[str] = ""
    """Name of the model input that is 1 at image tokens, if the model has one; without it positions or attention would
    be those of text."""
    resizable: ClassVar[bool] = False
    """Images keep their own size up to a limit, so that ``max_pixels`` means something."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, max_pixels: int
    ) -> None:
        self.token_id = int(config.get("image_token_id", config.get("image_token_index", -1)))
        self.token = _image_token(folder, tokenizer, self.token_id)
        self._config = config
        self._published = _processor_config(folder)
        self.processor: Any = _image_processor(folder)  # each class has its own settings
        self.place = self.token
        self.changed: dict[str, Any] = {}
        self.limit_pixels(max_pixels)
        self._text = lru_cache(maxsize=65536)(self.expand)
        shown = {key: value for key, value in self.processor.to_dict().items() if not key.startswith("_")}
        self.settings = {"image_processor": shown, "backend": "pil", "image_token": self.token}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_text"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._text = lru_cache(maxsize=65536)(self.expand)

    def text(self, image: ImageRef) -> str:
        """An image's placeholder in the prompt: one image token per feature that the model computes for it.

        Raises:
            ValueError: The image is too thin, or the processor refuses its shape.
        """
        if max(image.width, image.height) > MOST_THIN * min(image.width, image.height):
            raise ValueError(f"one side is more than {MOST_THIN} times the other")
        return self._text(image.width, image.height)

    def count(self, width: int, height: int) -> int:
        """Number of image tokens of an image of this size (pixels)."""
        return self._text(width, height).count(self.token)

    def tensors(self, images: Sequence[ImageRef]) -> dict[str, torch.Tensor]:
        """Decode images and turn them into the model's inputs, in order."""
        return self.pixels([read_image(image) for image in images])

    def limit_pixels(self, max_pixels: int) -> None:  # noqa: B027  a family whose images have one size has nothing to limit
        """Have the processor scale larger images down to ``max_pixels``."""

    @abstractmethod
    def expand(self, width: int, height: int) -> str:
        """Placeholder text for an image of this size."""

    @abstractmethod
    def pixels(self, images: Sequence[Image]) -> dict[str, torch.Tensor]:
        """Model inputs for RGB images; float32 pixels."""


class QwenImages(ImageInputs):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: native resolution, one token per ``merge_size``² patches, positions in 3-D."""

    types = "mm_token_type_ids"
    resizable = True

    def limit_pixels(self, max_pixels: int) -> None:
        """As in :class:`ImageInputs`; Qwen's settings call the smallest and largest areas edges."""
        own = dict(self.processor.size)
        most = min(int(own["longest_edge"]), max_pixels)
        limited = {**own, "longest_edge": most, "shortest_edge": min(int(own["shortest_edge"]), most)}
        if limited != own:
            self.processor.size = type(self.processor.size)(**limited)
            sizes = {key: int(limited[key]) for key in ("shortest_edge", "longest_edge")}
            self.changed = {"size": sizes, "min_pixels": sizes["shortest_edge"], "max_pixels": sizes["longest_edge"]}

    def expand(self, width: int, height: int) -> str:
        """As in :class:`ImageInputs`."""
        patches = self.processor.get_number_of_image_patches(height, width)
        return self.token * int(patches // self.processor.merge_size**2)

    def pixels(self, images: Sequence[Image]) -> dict[str, torch.Tensor]:
        """As in :class:`ImageInputs`."""
        found = self.processor(images=list(images), return_tensors="pt")
        return {"pixel_values": found["pixel_values"], "image_grid_thw": found["image_grid_thw"]}


class LlavaImages(ImageInputs):
    """LLaVA: every image is resized and cropped to the same size; one token per patch of the vision encoder."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, max_pixels: int
    ) -> None:
        vision = str(config.get("vision_config", {}).get("model_type", "clip_vision_model"))
        if vision not in ("clip_vision_model", "siglip_vision_model"):
            raise CheckpointError(
                f"model.base: {folder} is a LLaVA with a vision encoder of type {vision}, whose images have no fixed size; "
                "expected clip_vision_model or siglip_vision_model.",
                "Choose another base.",
            )
        super().__init__(folder, config, tokenizer, max_pixels)

    def expand(self, width: int, height: int) -> str:
        """As in :class:`ImageInputs`."""
        rows, columns = self._size(width, height)
        vision = self._config["vision_config"]
        patch = int(self._published.get("patch_size") or vision["patch_size"])
        strategy = self._config.get("vision_feature_select_strategy", "default")
        default_extra = 1 if vision.get("model_type") == "clip_vision_model" else 0  # CLIP's class token
        extra = int(self._published.get("num_additional_image_tokens", default_extra))
        return self.token * int((rows // patch) * (columns // patch) + extra - (strategy == "default"))

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """Height and width after processing."""
        own = {key: value for key, value in dict(self.processor.size).items() if value}
        crop = self.processor.crop_size if getattr(self.processor, "do_center_crop", False) else None
        if crop is not None:
            return int(crop["height"]), int(crop["width"])
        if self.processor.do_resize and own.keys() == {"height", "width"}:
            return int(own["height"]), int(own["width"])
        # Other settings: by processing a blank picture, once per size.
        return tuple(self.pixels([pil.new("RGB", (width, height))])["pixel_values"].shape[-2:])  # type: ignore[return-value]

    def pixels(self, images: Sequence[Image]) -> dict[str, torch.Tensor]:
        """As in :class:`ImageInputs`."""
        return {"pixel_values": self.processor(images=list(images), return_tensors="pt")["pixel_values"]}


class Idefics3Images(ImageInputs):
    """Idefics3 and SmolVLM: an image is cut into tiles; each tile, and the whole image once, is a run of tokens.

    The text around the runs is that of the published processors (tile names, line ends, the global tag).
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, max_pixels: int
    ) -> None:
        super().__init__(folder, config, tokenizer, max_pixels)
        vision = config["vision_config"]
        side = int(vision["image_size"]) // int(vision["patch_size"])
        self._run = side**2 // int(config.get("scale_factor", 2)) ** 2
        published = int(self._published.get("image_seq_len", self._run))
        if published != self._run:
            raise CheckpointError(
                f"model.base: {folder} says that a tile is {published} tokens (processor_config.json), but its model makes "
                f"{self._run} of one (config.json).",
                "Correct image_seq_len.",
            )

    def expand(self, width: int, height: int) -> str:
        """As in :class:`ImageInputs`."""
        _, rows, columns = self.processor.get_number_of_image_patches(height, width)
        fake, run = "<fake_token_around_image>", self.token * self._run
        tiles = "".join(
            "".join(f"{fake}<row_{r + 1}_col_{c + 1}>{run}" for c in range(columns)) + "\n" for r in range(rows)
        )
        return f"{tiles}\n{fake}<global-img>{run}{fake}" if rows else f"{fake}<global-img>{run}{fake}"

    def pixels(self, images: Sequence[Image]) -> dict[str, torch.Tensor]:
        """As in :class:`ImageInputs`."""
        # All images of a batch as if of one row: the model takes them in order, whatever row they are in.
        found = self.processor(images=[list(images)], return_tensors="pt")
        return {"pixel_values": found["pixel_values"].float(), "pixel_attention_mask": found["pixel_attention_mask"]}


class Gemma3Images(ImageInputs):
    """Gemma 3: every image is scaled to the same size; a fixed number of tokens between two markers and empty lines.

    The template writes the first marker for an image. Tokens of one image attend to each other in both directions.
    """

    types = "token_type_ids"

    def __init__(
        self, folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, max_pixels: int
    ) -> None:
        super().__init__(folder, config, tokenizer, max_pixels)
        self.place = _image_token(folder, tokenizer, int(config.get("boi_token_index", 255_999)))
        end = _image_token(folder, tokenizer, int(config.get("eoi_token_index", 256_000)))
        run = int(config.get("mm_tokens_per_image", 256))
        published = int(self._published.get("image_seq_length", run))
        if published != run:
            raise CheckpointError(
                f"model.base: {folder} says that an image is {published} tokens (processor_config.json), but its model "
                f"makes {run} of one (config.json).",
                "Correct image_seq_length.",
            )
        self._whole = f"\n\n{self.place}{self.token * run}{end}\n\n"
        self.processor.do_pan_and_scan = (
            False  # the published processor's default, and the only mode supported in training
        )

    def expand(self, width: int, height: int) -> str:
        """As in :class:`ImageInputs`."""
        return self._whole

    def pixels(self, images: Sequence[Image]) -> dict[str, torch.Tensor]:
        """As in :class:`ImageInputs`."""
        found = self.processor(images=list(images), do_convert_rgb=True, return_tensors="pt")
        return {"pixel_values": found["pixel_values"]}


class InternVLImages(ImageInputs):
    """InternVL as transformers has it (``-hf`` checkpoints): an image is cut into tiles of one size, and shown whole."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, max_pixels: int
    ) -> None:
        super().__init__(folder, config, tokenizer, max_pixels)
        vision = config["vision_config"]
        side = _first(vision["image_size"]) // _first(vision["patch_size"])
        self._run = int((side * float(config.get("downsample_ratio", 0.5))) ** 2)
        published = int(self._published.get("image_seq_length", self._run))
        if published != self._run:
            raise CheckpointError(
                f"model.base: {folder} says that a tile is {published} tokens (processor_config.json), but its model makes "
                f"{self._run} of one (config.json).",
                "Correct image_seq_length.",
            )
        self.processor.crop_to_patches = True  # the published processor's own setting
        self._marks = [str(getattr(tokenizer, f"{end}_image_token", mark)) for end, mark in _INTERNVL_MARKS]

    def expand(self, width: int, height: int) -> str:
        """As in :class:`ImageInputs`."""
        tiles = int(self.processor.get_number_of_image_patches(height, width))
        return self._marks[0] + self.token * (self._run * tiles) + self._marks[1]

    def pixels(self, images: Sequence[Image]) -> dict[str, torch.Tensor]:
        """As in :class:`ImageInputs`."""
        return {"pixel_values": self.processor(images=list(images), return_tensors="pt")["pixel_values"]}


_INTERNVL_MARKS = (("start", "<img>"), ("end", "</img>"))


def _image_token(folder: Path, tokenizer: PreTrainedTokenizerFast, token_id: int) -> str:
    token = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < len(tokenizer) else None
    whole = token in tokenizer.get_added_vocab() and tokenizer(token, add_special_tokens=False)["input_ids"] == [
        token_id
    ]
    if token is None or not whole:
        raise CheckpointError(
            f"model.base: {folder / 'config.json'} names token {token_id} as the image token, but the tokenizer "
            + ("has no such token." if token is None else f"does not read {token!r} as that one token."),
            "Tokenizer and model are not from the same checkpoint; give the folder as it was published.",
        )
    return str(token)


def _image_processor(folder: Path) -> BaseImageProcessor:
    try:
        found = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    except Exception as error:  # whatever the library raises on damaged files
        raise CheckpointError(
            f"model.base: no image processor could be loaded from {folder}: {reason(error)}",
            "A vision-language base needs its preprocessor_config.json (or processor_config.json) next to config.json.",
        ) from None
    if not isinstance(found, BaseImageProcessor):
        raise CheckpointError(
            f"model.base: {folder} gives a {type(found).__name__} where an image processor was expected.",
            "Its preprocessor_config.json should name one (image_processor_type).",
        )
    return found


def _first(value: int | list[int]) -> int:
    """A side of a square that a config gives as a number or as two equal ones."""
    return int(value[0] if isinstance(value, list) else value)


def _processor_config(folder: Path) -> dict[str, Any]:
    """The published processor's settings other than its image processor's (``processor_config.json``); empty without it."""
    file = folder / "processor_config.json"
    return read_json(file, PROCESSOR) if file.is_file() else {}
