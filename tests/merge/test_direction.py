"""A branch as a direction: full weights and adapters give the model that loading them gives."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests import builders

from merit.errors import MergeError
from merit.hf.base import open_base
from merit.hf.inplace import Folder, InPlace
from merit.hf.models import load_model
from merit.merge.direction import branch_direction
from merit.recipe.schema import ModelSettings

CPU = torch.device("cpu")


def test_an_adapter_moves_the_model_to_what_peft_makes_of_it(tmp_path: Path, base: Path) -> None:
    opened = open_base(ModelSettings(base=str(base), dtype="float32"))
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], modules_to_save=["norm"])
    adapted = get_peft_model(load_model(opened, CPU), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    expected = (
        PeftModel.from_pretrained(load_model(opened, CPU), str(tmp_path / "adapter")).merge_and_unload().state_dict()
    )
    model = load_model(opened, CPU)
    direction = branch_direction(Folder(base), tmp_path / "adapter", "branch 0")
    with InPlace(model, Folder(base)).at((1.0, direction)):
        for name, tensor in model.state_dict().items():
            assert torch.allclose(tensor, expected[name], atol=1e-6), name
    assert torch.equal(model.model.norm.weight, load_model(opened, CPU).model.norm.weight)


def test_full_weights_reach_the_branch_and_a_foreign_one_is_refused(tmp_path: Path, base: Path) -> None:
    other = builders.make_base(tmp_path / "other", seed=5)
    opened = open_base(ModelSettings(base=str(base), dtype="float32"))
    model = load_model(opened, CPU)
    with InPlace(model, Folder(base)).at((1.0, branch_direction(Folder(base), other, "branch 1"))):
        expected = load_model(open_base(ModelSettings(base=str(other), dtype="float32")), CPU).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.allclose(tensor, expected[name], atol=1e-7), name
    wide = builders.make_base(tmp_path / "wide", hidden=32)
    with pytest.raises(MergeError, match="branch 2"):
        branch_direction(Folder(base), wide, "branch 2")
