"""A model moved in weight space and back: against float64 sums, and bit for bit at the end, whatever happened in between."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import builders
from tests.builders import weights

from merit.errors import CheckpointError
from merit.hf import inplace
from merit.hf.base import open_base
from merit.hf.inplace import Block, Folder, Held, InPlace, Noise, TaskVector, blocks_of, coefficient_of
from merit.hf.models import load_model
from merit.recipe.schema import ModelSettings


def load(folder: Path):
    base = open_base(ModelSettings(base=str(folder), dtype="float32"))
    return load_model(base, torch.device("cpu"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base in bf16 and two others of its shape, in float32."""
    root = tmp_path_factory.mktemp("points")
    made = [builders.make_base(root / "base", dtype="bfloat16", seed=1)]
    return made + [builders.make_base(root / str(seed), seed=seed) for seed in (2, 3)]


def entries(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    return {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model, before: dict[str, torch.Tensor]) -> bool:
    return all(
        torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)) for name, tensor in state(model).items()
    )


@pytest.mark.parametrize("block", [1 << 20, 64, 1])
def test_a_sum_is_that_of_float64_and_the_base_comes_back(folders: list[Path], block: int, monkeypatch) -> None:
    monkeypatch.setattr(inplace, "BLOCK", block)
    model = load(folders[0])
    before = state(model)
    place = InPlace(model, Folder(folders[0]))
    first, second = (TaskVector(Folder(folder)) for folder in folders[1:])
    expected = [entries(folder) for folder in folders]
    with place.moving() as move:
        for a, b in ((0.3, 0.9), (1.0, 0.0), (-1.5, 0.25)):
            move([(a, first), (b, second)])
            moved = model.state_dict()
            for name, zero in expected[0].items():
                exact = zero + a * (expected[1][name] - zero) + b * (expected[2][name] - zero)
                assert moved[name].numpy() == pytest.approx(exact, abs=1e-6, rel=1e-6)
    assert same_bits(model, before)
    assert place.size == sum(array.size for array in expected[0].values())


def test_it_comes_back_after_an_error_and_an_interrupt(folders: list[Path]) -> None:
    model = load(folders[0])
    before = state(model)
    place = InPlace(model, Folder(folders[0]))

    class Breaks:
        def change(self, block: Block, base: torch.Tensor) -> torch.Tensor:
            if "layers.1" in block.name:
                raise OSError("the disk is gone")
            return torch.full_like(base, torch.nan)

    with pytest.raises(OSError, match="gone"), place.at((1.0, Breaks())):
        pytest.fail("never entered")
    assert same_bits(model, before)
    with pytest.raises(KeyboardInterrupt), place.at((0.1, Noise(0))):
        assert not same_bits(model, before)
        raise KeyboardInterrupt
    assert same_bits(model, before)


def test_a_model_without_a_folder_and_one_in_bfloat16_come_back(folders: list[Path]) -> None:
    model = load(folders[1]).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    place = InPlace(model, Held.copy_of(model))
    with place.at((0.5, Noise(3))):
        assert not torch.equal(model.model.norm.weight, before["model.norm.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_only_the_named_tensors_move_each_with_its_own_coefficient(folders: list[Path]) -> None:
    model = load(folders[0])
    before = state(model)
    names = [name for name in entries(folders[0]) if "mlp" in name]
    place = InPlace(model, Folder(folders[0]), names)
    ones = Held({name: torch.ones(tensor.shape) for name, tensor in before.items()})
    with place.at(({"*layers.0.*": 0.25, "*down*": 0.0, "*": 2.0}, ones)):
        for name, tensor in model.state_dict().items():
            step = 0.0 if name not in names else 0.25 if "layers.0" in name else 0.0 if "down" in name else 2.0
            assert torch.equal(tensor, before[name] + step), name
    with pytest.raises(ValueError, match=r"none of the patterns 'a\*' matches lm_head"):
        coefficient_of({"a*": 1.0}, "lm_head")


def test_noise_depends_on_seed_and_tensor_alone(folders: list[Path]) -> None:
    model = load(folders[0])
    name = "model.layers.0.mlp.up_proj.weight"
    places = [InPlace(model, Folder(folders[0])), InPlace(model, Folder(folders[0]), [name])]
    drawn = []
    for place in places:
        with place.at((1.0, Noise(7))):
            drawn.append(model.state_dict()[name].clone())
    assert torch.equal(*drawn)
    zero = torch.zeros(400, 500)
    block = Block("x", 0, 400)
    first, again, other = (Noise(seed).change(block, zero) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert abs(float((first * other).mean())) < 0.01
    assert float(first.mean()) == pytest.approx(0, abs=0.01)
    assert float(first.std()) == pytest.approx(1, abs=0.01)
    relative = Noise(1, relative=True).change(block, zero + 3)
    assert torch.allclose(relative, 3 * first)


def test_tied_tensors_have_the_name_that_the_base_uses(tmp_path: Path, folders: list[Path]) -> None:
    model = load(folders[0])
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    values = {name: torch.from_numpy(array).float() for name, array in entries(folders[0]).items()}
    values["lm_head.weight"] = values.pop("model.embed_tokens.weight")
    place = InPlace(model, Held(values))
    assert "lm_head.weight" in place.tensors
    assert "model.embed_tokens.weight" not in place.tensors


def test_a_base_of_another_shape_is_refused(folders: list[Path], tmp_path: Path) -> None:
    wide = builders.make_base(tmp_path / "wide", hidden=32)
    with pytest.raises(CheckpointError, match=r"is \(104, 16\) in the model, but \(104, 32\) in its base"):
        InPlace(load(folders[0]), Folder(wide))


@given(st.lists(st.integers(0, 40), max_size=3), st.integers(1, 50))
def test_blocks_cover_every_row_once(shape: list[int], size: int) -> None:
    found = list(_blocks(shape, size))
    rows = [row for block in found for row in range(block.start, block.stop)]
    assert rows == ([] if 0 in shape else list(range(shape[0] if shape else 1)))


def _blocks(shape: list[int], size: int) -> list[Block]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inplace, "BLOCK", size)
        return list(blocks_of("x", shape))


def test_vision_language_tensors_are_moved_by_their_names_in_files(tmp_path: Path) -> None:
    folder = builders.make_vision_base("qwen2_5_vl", tmp_path / "vl")
    base = open_base(ModelSettings(base=str(folder), dtype="float32"))
    model = load_model(base, torch.device("cpu"))
    before = state(model)
    place = InPlace(model, Folder(folder))
    assert set(place.tensors) == set(weights(folder))
    with place.at((0.5, Noise(1))):
        assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert same_bits(model, before)
