"""Training, resuming and gradients with pictures, on the real classes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.builders import FAMILIES, make_vision_base
from tests.hf.vision_cases import picture_chats
from tests.train import cases

from merit.conflict.gradients import GradientMeter
from merit.conflict.sketch import Sketch
from merit.conflict.store import Sums
from merit.hf.base import Base, open_base
from merit.hf.batches import target_losses
from merit.hf.checkpoint import read_headers
from merit.hf.families import FAMILIES as KNOWN
from merit.hf.models import load_model, trainable_parameters
from merit.hf.rows import EncodedRow
from merit.mixture.dataset import EncodedDataset
from merit.mixture.encode import ChatEncoder
from merit.recipe.load import parse_recipe
from merit.recipe.schema import Recipe
from merit.train.branch import train_branch
from merit.train.result import BranchResult

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vision")
    for family in FAMILIES:
        make_vision_base(family, root / family, dtype="bfloat16")
    return root


def make_recipe(folder: Path, family: str, *overrides: str) -> Recipe:
    data = {
        "name": "pictures",
        "seed": 3,
        "model": {"base": str(folder / family)},
        "mixture": {"folder": str(folder)},
        "conflict": {"sketch_size": 1024},
        "train": {
            "epochs": 1,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "device": "cpu",
            "max_length": 512,
            "threads": 1,
        },
    }
    return parse_recipe(data, overrides)


def datasets(folder: Path, recipe: Recipe) -> tuple[Base, dict[str, EncodedDataset]]:
    base = open_base(recipe.model)
    assert base.images is not None
    encoder = ChatEncoder(base.tokenizer, 512, base.images)
    group = {}
    for seed, name in enumerate(("apple", "pear")):
        rows = encoder.encode(picture_chats(folder / "pictures", 12, seed))
        group[name] = EncodedDataset(name, rows, seeing=base.images.settings)  # type: ignore[arg-type]
    return base, group


def train(folder: Path, recipe: Recipe, target: Path) -> BranchResult:
    base, group = datasets(folder, recipe)
    return train_branch(group, base, target, recipe.train, seed=recipe.seed)


def in_a_killed_child(action: Any) -> None:
    """Run ``action`` in a forked copy of this process, which must die by SIGKILL."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)  # reached only if nobody killed it
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("family", FAMILIES)
def test_killed_and_resumed_is_bit_identical_and_frozen_tensors_stay(folder: Path, family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    recipe = make_recipe(folder, family, "train.checkpoint_steps=2")
    facts = train(folder, recipe, tmp_path / "whole")
    assert facts.steps == 6
    assert facts.samples == 24

    def killed() -> None:
        cases.signal_at(5, signal.SIGKILL, "log")
        train(folder, recipe, tmp_path / "parts")

    in_a_killed_child(killed)
    assert not (tmp_path / "parts" / "model").exists()
    again = train(folder, recipe, tmp_path / "parts")
    assert again.resumed_from == (4,)
    assert again.target_tokens == facts.target_tokens
    files = [tmp_path / part / "model" / "model.safetensors" for part in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    before, after = load_file(folder / family / "model.safetensors"), load_file(files[0])
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved
    assert {KNOWN[family].role(name) for name in moved} == {"language"}
    assert {n: t.dtype.tag for n, t in read_headers(files[0].parent).tensors.items()} == {
        n: t.dtype.tag for n, t in read_headers(folder / family).tensors.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_projector_alone(folder: Path, family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    train(folder, make_recipe(folder, family, "model.trainable=projector"), tmp_path / "branch")
    before, after = (
        load_file(folder / family / "model.safetensors"),
        load_file(tmp_path / "branch/model/model.safetensors"),
    )
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved
    assert {KNOWN[family].role(name) for name in moved} == {"projector"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory", ["held", "streamed"])
def test_gradient_sums_equal_autograd_row_by_row(folder: Path, family: str, memory: Any) -> None:
    recipe = make_recipe(folder, family)
    base, group = datasets(folder, recipe)
    rows = [group["apple"][i] for i in range(12)]
    assert {len(row.images) for row in rows} == {0, 1, 2}
    model, batcher = load_model(base, CPU, trainable=True), base.batcher
    found = np.zeros((4, 1024), np.float32)
    meter = GradientMeter(model, recipe.conflict, seed=7, batcher=batcher, device=CPU, memory=memory)
    meter.measure("apple", rows, found, Sums())
    for part in range(4):
        sketch = Sketch(1024, 7, CPU)
        for row in rows[part::4]:
            model.zero_grad()
            losses, counts = target_losses(model, batcher([row]))
            (losses / counts).sum().backward()
            for name, parameter in trainable_parameters(model).items():
                if parameter.grad is not None:
                    sketch.add(name, parameter.grad)
        wanted = sketch.vector().numpy()
        assert np.abs(found[part] - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_adapters_lie_in_the_language_decoder(folder: Path, tmp_path: Path) -> None:
    import json

    recipe = make_recipe(folder, "qwen2_5_vl", "model.trainable=lora", "model.lora.rank=2")
    train(folder, recipe, tmp_path / "branch")
    names = [name for name in read_headers(tmp_path / "branch" / "model").tensors if "lora_A" in name]
    assert names
    assert not [name for name in names if "visual" in name]
    assert json.loads((tmp_path / "branch/model/adapter_config.json").read_text())["r"] == 2


def test_rows_are_never_packed(folder: Path) -> None:
    recipe = make_recipe(folder, "llava")
    base, group = datasets(folder, recipe)
    batch = base.batcher([group["apple"][i] for i in range(4)])
    assert batch["input_ids"].shape[0] == 4
    assert all(isinstance(group["apple"][i], EncodedRow) for i in range(4))
