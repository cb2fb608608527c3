"""What a recipe's training settings need on this machine, checked without a model and without loading a library."""

from __future__ import annotations

import os
from importlib.util import find_spec

from merit.errors import RecipeError, ResourceError, install_hint
from merit.recipe.schema import ModelSettings, TrainSettings

_TRACKERS = {"comet_ml": "comet_ml", "dvclive": "dvclive"}
"""Module of a tracker, where it is not its name."""


def check_requirements(train: TrainSettings, model: ModelSettings) -> None:
    """Refuse settings that need a package which is not installed.

    Raises:
        RecipeError: A tracker is not installed, or the settings do not go together.
        ResourceError: bitsandbytes or DeepSpeed is not installed.
    """
    for tracker in train.report_to:
        if find_spec(_TRACKERS.get(tracker, tracker)) is None:
            raise RecipeError(
                f"train.report_to: {tracker} is not installed.", f"Install it (pip install {tracker}), or leave it out."
            )
    if train.optimizer.startswith("adamw_8bit"):
        _need_bitsandbytes(f"train.optimizer: {train.optimizer}", "train.optimizer: adamw")
    if model.quantize != "none":
        _need_bitsandbytes(f"model.quantize: {model.quantize}", "model.quantize: none")
    if train.sharding == "deepspeed":
        _check_deepspeed(model)
    if train.save_second_moments and model.trainable == "lora":
        raise RecipeError(
            "train.save_second_moments cannot be combined with model.trainable: lora: an adapter's moments are not those "
            "of the weights that are merged.",
            "Leave it out, or train full weights.",
        )


def _need_bitsandbytes(setting: str, instead: str) -> None:
    if find_spec("bitsandbytes") is None:
        raise ResourceError(
            f"{setting} needs bitsandbytes, which is not installed.",
            f"Install it ({install_hint('quantize')}), or use {instead}.",
        )


def _check_deepspeed(model: ModelSettings) -> None:
    if model.dtype == "float16":
        raise RecipeError(
            "train.sharding: deepspeed cannot be combined with model.dtype: float16.",
            "Its loss scaling needs weights in float16, and ours stay float32. Use bfloat16 or float32, or sharding: fsdp2.",
        )
    if model.quantize != "none":
        raise RecipeError(
            f"train.sharding: deepspeed cannot be combined with model.quantize: {model.quantize}.",
            "Adapters are small: use train.sharding: none.",
        )
    if find_spec("deepspeed") is None:
        raise ResourceError(
            "train.sharding: deepspeed needs DeepSpeed, which is not installed.",
            f"Install it ({install_hint('deepspeed')}), or use train.sharding: fsdp2.",
        )


def processes_here() -> int:
    """Processes that a launcher started to work together, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_processes(train: TrainSettings) -> None:
    """Refuse to train with another number of processes than the recipe's.

    Raises:
        ResourceError: The launcher started more or fewer.
    """
    if processes_here() != train.processes:
        raise ResourceError(
            f"train.processes is {train.processes}, but this is one of {processes_here()} processes (WORLD_SIZE).",
            "`merit train` and `merit run` start the processes themselves; with another launcher (torchrun, accelerate "
            "launch), give it the same number.",
        )
