"""`merit demo --vision`, with little of everything: every form of image data through every stage."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from demo_data.pictures import BASE_STYLE, MIXTURE, SKILLS
from merit.demo import base_folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_vision_demo_command_with_little_of_everything(tmp_path: Path, merit) -> None:
    little = [f"--set={text}" for text in (
        "mixture.samples=4", "conflict.examples=2", "evaluate.max_examples=1", "evaluate.drift.prompts=1",
        "evaluate.max_new_tokens=2", "train.threads=1", "split.axes=1", "baselines=[joint]",
    )]  # fmt: skip
    run = tmp_path / "demo"
    result = merit("demo", "--vision", "--output", run, "--jobs", 1, *little)
    assert result.code == 0, result.err
    for word in ("joint", "merged", "kept", "drift"):
        assert word in result.out

    datasets = {item["name"]: item for item in json.loads((run / "mixture" / "datasets.json").read_text())}
    assert set(datasets) == set(MIXTURE)
    pictures = {name: SKILLS[d.skill].pictures * (not name.startswith("text_")) for name, d in MIXTURE.items()}
    assert {name: item["images"] for name, item in datasets.items()} == {n: 4 * count for n, count in pictures.items()}
    assert datasets["two_colours"]["image_tokens"] == 2 * 4 * 36
    groups = json.loads((run / "split" / "split.json").read_text())["groups"]
    assert sorted(name for group in groups for name in group) == sorted(MIXTURE)
    kept = json.loads((run / "evaluation" / "kept.json").read_text())
    assert all(set(scores) >= set(BASE_STYLE) for scores in kept.values())

    base, merged = tensors(base_folder(vision=True)), tensors(run / "merged" / "model")
    assert base.keys() == merged.keys()
    same = {name for name in base if torch.equal(base[name].view(torch.uint8), merged[name].view(torch.uint8))}
    frozen = {name for name in base if "vision_tower" in name or "multi_modal_projector" in name}
    assert len(frozen) > 20
    assert frozen <= same, "the vision encoder and the projector stay as they are, bit for bit"
    assert len(same) < len(base)
