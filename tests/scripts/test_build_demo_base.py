"""The script that pretrains the base: the same arguments give the same bytes, and only answers are trained on."""

import json
from itertools import islice

import build_demo_base as build
from demo_data.words import base_stream


def test_the_same_arguments_give_the_same_bytes(tmp_path, capsys):
    small = ["--batch-size", "4", "--hidden", "16", "--layers", "1", "--score-rows", "1"]
    small += ["--wide-steps", "2", "--settle-steps", "2", "--steps", "3"]
    for name, seed in (("a", "0"), ("c", "1")):
        build.main([*small, "--seed", seed, "--output", str(tmp_path / name)])
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "ac"}
    assert weights["a"] != weights["c"]
    record = json.loads((tmp_path / "c/training.json").read_text())
    assert [stage["rows"] for stage in record["stages"].values()] == [12, 8, 8]
    assert "--seed 1 --steps 3 --batch-size 4" in record["command"]
    build.main([*small, "--settle-steps", "0", "--output", str(tmp_path / "two")])
    build.main([*small, "--start", str(tmp_path / "two"), "--output", str(tmp_path / "three")])
    assert (tmp_path / "three/model.safetensors").read_bytes() == weights["a"], (
        "the same bytes, also where a stage is made alone"
    )


def test_targets_are_what_the_chat_template_marks():
    tokenizer = build.make_tokenizer()
    rows = list(islice(base_stream(3), 32))
    ids, labels = build.encode(tokenizer, rows)
    marked = tokenizer.apply_chat_template(
        [row["messages"] for row in rows],
        return_dict=True,
        return_assistant_tokens_mask=True,
        padding=True,
        return_tensors="pt",
    )
    assert (marked["input_ids"] == ids).all()
    assert ((labels != build.IGNORED) == marked["assistant_masks"].bool()).all()
    assert (labels[labels != build.IGNORED] == ids[labels != build.IGNORED]).all()


def test_byte_symbols_are_those_of_byte_level_tokenizers():
    from tokenizers import pre_tokenizers

    assert sorted(build.byte_symbols()) == sorted(pre_tokenizers.ByteLevel.alphabet())
