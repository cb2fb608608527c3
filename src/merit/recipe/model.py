"""The ``model`` block: the base, and what of it is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from merit.recipe.base import Settings, refuse_adapters_in_list


class LoraSettings(Settings):
    """Low-rank adapters; read only when ``model.trainable`` is ``lora``."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank r of every adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale numerator: the update is (alpha / rank) * B A, or alpha / sqrt(rank) with rslora."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability on the adapter's input, in training only."""
    target_modules: str | list[str] = "all-linear"
    """Module-name endings to adapt, or all-linear."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""


class ModelSettings(Settings):
    """The base (θ0): the one checkpoint that every branch starts from."""

    base: str
    """Folder of a Hugging Face checkpoint, or a hub id. A relative folder is looked up next to the recipe, then in the
    working directory."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); for hub ids only."""
    trainable: Literal["all", "lora", "language", "projector", "vision"] | Annotated[list[str], Field(min_length=1)] = (
        "language"
    )
    """What is trained. language: the language decoder, which is all of a text model and the paper's choice for a
    vision-language one; projector, vision: only that part of a vision-language model; all: every parameter; lora: low-rank
    adapters in the language decoder; or a list of roles and shell patterns over parameter names (such as ["projector",
    "model.layers.1?.*"]). Everything else stays frozen and bit-identical."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the forward and backward arithmetic on a GPU; weights and optimizer state are kept in float32 while
    training. On a CPU the arithmetic is always float32."""
    lora: LoraSettings = LoraSettings()
    """Adapter settings."""
    quantize: Literal["none", "4bit"] = "none"
    """4bit: train adapters on a base held in 4-bit NF4 (QLoRA; needs trainable: lora, a GPU and bitsandbytes). Gradients,
    merge and evaluation use the base as it is."""
    max_pixels: Annotated[int, Field(ge=784)] = 614656
    """Pixel limit (width x height) of an image as the model sees it (paper: 784 x 784); larger ones are scaled down by the
    base's own image processor. Families that scale every image to a fixed size (all but Qwen's) are not affected."""
    chat_template: str | None = None
    """File with a Jinja chat template to use instead of the base's own, or builtin:llava-1.5, builtin:deepseek-r1
    (docs/mixture.md). Without either, a documented default is used."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Off unless you have read that code."""

    @model_validator(mode="after")
    def _adapters_alone(self) -> Self:
        refuse_adapters_in_list(self.trainable)
        if self.quantize != "none" and self.trainable != "lora":
            raise ValueError(f"quantize: {self.quantize} needs trainable: lora; quantized weights cannot be trained")
        return self

    def deciding(self) -> dict[str, Any]:
        """The settings that decide a branch's weights, the base aside, as JSON values."""
        keys = {"trainable", "dtype", *(("lora", "quantize") if self.trainable == "lora" else ())}
        return self.model_dump(mode="json", include=keys)
