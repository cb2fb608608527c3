"""Recipes of version 0.1: every key that went to TRL is answered with its new name, or why it is gone."""

from __future__ import annotations

import re
from typing import Any

import pytest

from merit.errors import RecipeError
from merit.recipe.load import parse_recipe, recipe_schema
from merit.recipe.moved import TRAINER
from merit.recipe.schema import ModelSettings, TrainSettings

MINIMAL: dict[str, Any] = {"name": "x", "model": {"base": "b"}, "mixture": {"folder": "m"}}


def parse(**train: Any) -> TrainSettings:
    return parse_recipe({**MINIMAL, "train": train}).train


def test_each_key_of_the_trainer_is_answered_in_one_error() -> None:
    """On commit f5727a1 (B3) these values ended in a traceback of the trainer's, when a branch began."""
    with pytest.raises(RecipeError) as caught:
        parse(trainer={"adam_beta2": 7, "lr_scheduler_kwargs": {"nonsense": 1}, "packing": True, "save_step": 2})
    text = str(caught.value)
    for words in ("adam_beta2: now train.betas", "lr_scheduler_kwargs: now train.min_lr_ratio", "packing: gone"):
        assert words in text
    assert "save_step: gone" in text


def test_every_new_name_exists() -> None:
    known = {"train": TrainSettings.model_fields, "model": ModelSettings.model_fields}
    for old, new in TRAINER.items():
        if not new.startswith("gone"):
            for block, key in re.findall(r"\b(train|model)\.(\w+)", new):
                assert key in known[block], old
    assert recipe_schema()


def test_an_empty_trainer_and_old_optimizer_names_are_still_read() -> None:
    assert parse(trainer={}, optimizer="adamw_torch") == TrainSettings()
    assert parse(optimizer="adamw_torch_fused").optimizer == "adamw_fused"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"betas": [0.9, 7]}, "train.betas"),
        ({"epsilon": 0}, "train.epsilon"),
        ({"scheduler": "nonsense"}, "train.scheduler"),
        ({"min_lr_ratio": 2}, "train.min_lr_ratio"),
        ({"report_to": ["no-such-tracker"]}, "train.report_to"),
        ({"processes": 32}, "processes (32)"),
        ({"sharding": "fsdp2"}, "needs processes: 2"),
        ({"sharding": "fsdp2", "processes": 2, "optimizer": "adafactor"}, "cannot be sharded"),
        ({"sharding": "deepspeed", "processes": 2, "optimizer": "adamw_8bit"}, "cannot be sharded"),
        ({"sharding": "deepspeed", "processes": 2, "compile": True}, "cannot be combined with"),
    ],
)
def test_impossible_values_are_refused_by_name(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(key)):
        parse(**settings)


def test_quantized_weights_cannot_be_trained() -> None:
    with pytest.raises(RecipeError, match="needs trainable: lora"):
        parse_recipe({**MINIMAL, "model": {"base": "b", "quantize": "4bit"}})
