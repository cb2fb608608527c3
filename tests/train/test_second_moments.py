"""Second moments that a branch leaves, against AdamW's recursion written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.builders import encoded

from merit.errors import RecipeError
from merit.hf import checkpoint
from merit.hf.base import open_base
from merit.recipe.schema import ModelSettings, TrainSettings
from merit.train import branch as training
from merit.train.branch import train_branch
from merit.train.requirements import check_requirements


def test_moments_are_the_bias_corrected_mean_of_squared_gradients(base: Path, tmp_path: Path, monkeypatch) -> None:
    gradients: list[dict[str, np.ndarray]] = []
    step = torch.optim.AdamW.step

    def watched(optimizer, closure=None):
        gradients.append({id(p): p.grad.double().numpy().copy() for g in optimizer.param_groups for p in g["params"]})
        return step(optimizer, closure)

    names: dict[int, str] = {}
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    make = training._load

    def loaded(*words):
        found = make(*words)
        names.update({id(p): n for n, p in found.model.named_parameters()})
        return found

    monkeypatch.setattr(training, "_load", loaded)
    settings = TrainSettings(batch_size=4, learning_rate=1e-3, betas=(0.9, 0.95), save_second_moments=True)
    opened = open_base(ModelSettings(base=str(base), dtype="float32"))
    result = train_branch({"a": encoded("a", 14, high=40)}, opened, tmp_path / "b", settings)
    moments = load_file(tmp_path / "b" / "second_moments.safetensors")
    assert result.steps == len(gradients) == 4
    assert moments.keys() == checkpoint.read_headers(base).tensors.keys()
    for place, name in names.items():
        v = sum((1 - 0.95) * 0.95 ** (3 - t) * gradients[t][place] ** 2 for t in range(4))
        np.testing.assert_allclose(moments[name].double().numpy(), v / (1 - 0.95**4), rtol=1e-4, atol=1e-14)


def test_they_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match="save_second_moments needs optimizer: adamw"):
        TrainSettings(optimizer="sgd", save_second_moments=True)
    with pytest.raises(RecipeError, match="save_second_moments"):
        check_requirements(TrainSettings(save_second_moments=True), ModelSettings(base="b", trainable="lora"))


def test_not_saving_them_changes_no_key() -> None:
    assert "save_second_moments" not in TrainSettings().deciding()
    assert TrainSettings(save_second_moments=True).deciding()["save_second_moments"] is True
