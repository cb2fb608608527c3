"""The script that pretrains the vision demo's base: repeatable, and its targets are the answers and the facts."""

import json
import random
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer

import build_vision_demo_base as build
from demo_data.pictures import base_stream
from merit.demo import base_folder


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_folder(vision=True), local_files_only=True)


def test_the_same_arguments_give_the_same_bytes(tmp_path, capsys):
    small = ["--vision-steps", "2", "--vision-batch-size", "8", "--steps", "2", "--batch-size", "4", "--hidden", "16",
             "--layers", "1", "--score-rows", "1", "--settle-steps", "2"]  # fmt: skip
    for name, seed in (("a", "0"), ("c", "1")):
        build.main([*small, "--seed", seed, "--output", str(tmp_path / name)])
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "ac"}
    assert weights["a"] != weights["c"]
    record = json.loads((tmp_path / "c/training.json").read_text())
    assert record["stage_1"]["pictures"] == 16
    assert record["stage_2"]["conversations"] == record["stage_3"]["conversations"] == 8
    build.main([*small[:-1], "0", "--output", str(tmp_path / "second")])
    build.main([*small, "--second-stage", str(tmp_path / "second"), "--output", str(tmp_path / "third")])
    assert (tmp_path / "third/model.safetensors").read_bytes() == weights["a"], (
        "the same bytes, also where the last stage is made alone"
    )
    assert "--seed 1 --vision-steps 2 --vision-batch-size 8 --steps 2" in record["command"]


def test_targets_are_the_answers(tokenizer):
    examples = list(islice(base_stream(3), 24))
    batch = build.encode(tokenizer, examples, random.Random(0))
    for row, labels, example in zip(batch["input_ids"], batch["labels"], examples, strict=True):
        targets = labels != build.IGNORED
        assert torch.equal(labels[targets], row[targets])
        assert tokenizer.decode(row[targets]) == "".join(f"{answer}<|end|>" for _, answer in example.turns)
    assert len(batch["pixel_values"]) == sum(len(example.pictures) for example in examples)


def test_stage_one_asks_what_the_cases_say():
    case = {"cells": [0, 5], "shapes": ["ring", "circle"], "colours": ["red", "blue"]}
    assert build.label("cell shape", "many", case) == [6, 0, 0, 0, 0, 1, 0, 0, 0]
    assert build.label("cell colour", "many", case) == [1, 0, 0, 0, 0, 6, 0, 0, 0]
    assert build.label("count", "many", case) == [2]
    assert build.label("digit", "many", case) is None
    assert build.label("highest", "bars", {"colours": ["red", "green"], "levels": [2, 7]}) == [3]
