"""Loading and saving models: what is refused, what stays bit-identical, and the one loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.e2e.conftest import make_base

from merit.errors import CheckpointError, RecipeError
from merit.hf.base import open_base
from merit.hf.batches import IGNORE, Batcher, accepts, length_sorted_batches, target_losses
from merit.hf.models import load_model, save_branch, trainable_parameters
from merit.hf.rows import EncodedRow
from merit.recipe.schema import ModelSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


def rows(seed: int, count: int = 5) -> list[EncodedRow]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        n = int(rng.integers(4, 20))
        targets = rng.random(n) < 0.4
        targets[0], targets[-1] = False, True
        found.append(EncodedRow(rng.integers(4, 100, n).astype(np.int32), targets))
    return found


def test_the_loss_is_that_of_an_unbatched_float64_pass(folder: Path) -> None:
    model = load_model(open_base(ModelSettings(base=str(folder))), CPU)
    batch = rows(1)
    losses, counts = target_losses(model, Batcher(0)(batch))
    exact = model.double()
    for row, loss, count in zip(batch, losses, counts, strict=True):
        logits = exact(input_ids=torch.from_numpy(row.input_ids).long()[None]).logits[0]
        log_p = logits.log_softmax(-1)
        places = np.flatnonzero(row.targets)
        wanted = -sum(log_p[i - 1, int(row.input_ids[i])] for i in places)
        assert int(count) == len(places)
        assert float(loss) == pytest.approx(float(wanted), rel=2e-6)


def test_padding_is_no_target_and_no_input(folder: Path) -> None:
    batch = Batcher(7)(rows(2))
    for row, ids, mask, labels in zip(
        rows(2), *(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        n = len(row.input_ids)
        assert mask.sum() == n
        assert (ids[n:] == 7).all()
        assert (labels[n:] == IGNORE).all()
        assert int((labels != IGNORE).sum()) == int(row.targets.sum())


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = length_sorted_batches(lengths, budget)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    assert [max(lengths[i] for i in b) for b in batches] == sorted(
        (max(lengths[i] for i in b) for b in batches), reverse=True
    )


def in_bfloat16(folder: Path, target: Path) -> Path:
    make_base(target)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("save_dtype", ["base", "float32"])
def test_an_untrained_branch_is_the_base_bit_for_bit(folder: Path, tmp_path: Path, save_dtype: str) -> None:
    base = in_bfloat16(folder, tmp_path / "base")
    settings = ModelSettings(base=str(base))
    model = load_model(open_base(settings), CPU, trainable=True)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    save_branch(model, tmp_path / "out", open_base(settings), save_dtype=save_dtype)
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(new) == set(old), "a tied tensor keeps the one name that the base's files have"
    for name, tensor in new.items():
        assert tensor.dtype == (torch.bfloat16 if save_dtype == "base" else torch.float32)
        assert torch.equal(tensor, old[name].to(tensor.dtype))


def test_the_base_s_tokenizer_files_are_copied_and_not_rewritten(folder: Path, tmp_path: Path) -> None:
    settings = ModelSettings(base=str(folder))
    base = open_base(settings)
    assert base.template.origin == "default"
    save_branch(load_model(base, CPU), tmp_path / "out", base, save_dtype="base")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == base.template.text
    again = open_base(ModelSettings(base=str(tmp_path / "out")))
    assert again.template.origin == "base", "the template that was trained with is the branch's own now"
    assert again.tokenizer.chat_template == base.tokenizer.chat_template


def test_missing_and_left_over_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing"):
        load_model(open_base(ModelSettings(base=str(base))), CPU)
    save_file({**tensors, "model.extra.weight": torch.zeros(2)}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="unexpected"):
        load_model(open_base(ModelSettings(base=str(base))), CPU)


def test_trainable_subsets(folder: Path) -> None:
    everything = trainable_parameters(load_model(open_base(ModelSettings(base=str(folder))), CPU, trainable=True))
    assert "lm_head.weight" not in everything, "tied weights count once"
    some = ModelSettings(base=str(folder), trainable=["model.layers.1.*"])
    names = trainable_parameters(load_model(open_base(some), CPU, trainable=True))
    assert names
    assert all(name.startswith("model.layers.1.") for name in names)
    assert not trainable_parameters(load_model(open_base(some), CPU))
    with pytest.raises(RecipeError, match="nothing"):
        load_model(open_base(ModelSettings(base=str(folder), trainable=["nothing*"])), CPU, trainable=True)
    lora = ModelSettings(base=str(folder), trainable="lora")
    first, second = (load_model(open_base(lora), CPU, trainable=True, seed=3) for _ in range(2))
    assert accepts(first, "logits_to_keep"), "seen through the adapter's wrapper"
    for name, parameter in trainable_parameters(first).items():
        assert "lora_" in name
        assert torch.equal(parameter, trainable_parameters(second)[name]), "every branch starts from the same adapters"


def test_the_facts_of_a_base_come_from_its_headers(folder: Path) -> None:
    info = open_base(ModelSettings(base=str(folder)))
    config = json.loads((folder / "config.json").read_text())
    assert info.architecture == "LlamaForCausalLM"
    assert info.context == config["max_position_embeddings"]
    assert info.parameters == sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
