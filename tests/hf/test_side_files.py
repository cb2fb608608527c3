"""Foreign files of a checkpoint folder: which are carried along, and what they may say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merit.errors import CheckpointError
from merit.hf import side_files
from merit.hf.side_files import chat_template, copy_side_files, input_files, parse_json, read_json, set_config_dtype

TOKENIZER = (
    *("sentencepiece.bpe.model", "tekken.json", "qwen.tiktoken", "tokenizer.model", "source.spm", "spiece.model"),
    *("additional_chat_templates/tool_use.jinja", "chat_template.jinja"),
)
LICENCES = ("NOTICE", "Notice.txt", "LICENSE.txt", "license.md", "LICENCE", "USE_POLICY.md", "COPYING")


def test_every_kind_of_tokenizer_and_licence_file_is_carried_along(tmp_path: Path) -> None:
    """Fails on commit f5727a1, which carried a fixed list of names along (finding B11)."""
    source, target = tmp_path / "source", tmp_path / "target"
    for name in (*TOKENIZER, *LICENCES, "config.json", "README.md", "record.json", "optimizer.pt", "modeling_x.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    target.mkdir()
    names = copy_side_files(source, target)
    assert set(names) == {*TOKENIZER, *LICENCES, "config.json", "modeling_x.py"}
    assert names[-1] == "config.json"
    for name in names:
        assert (target / name).read_text() == name
    assert set(input_files(source)) == set(TOKENIZER)


@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "tekken.json", "additional_chat_templates/x.jinja"])
def test_they_are_part_of_what_is_hashed(tmp_path: Path, name: str) -> None:
    before = side_files.side_files(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    assert set(side_files.side_files(tmp_path)) - set(before) == {name}


def test_named_chat_templates(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert chat_template(tmp_path) == "plain"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several[:1]}))
    assert chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(CheckpointError, match="chat_template is 3, expected a text"):
        chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="cannot be read"):
        chat_template(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        pytest.param(b'{"a": ' * 100_000, "nested too deeply", id="deep"),
        (b"3", "not a JSON object but 3"),
        (b'{"a": {"b": true}}', "a.b is true, expected a whole number"),
        (b'{"a": {"b": "x"}}', 'a.b is "x", expected a whole number'),
        (b'{"c": [1]}', "c is [1], expected a list of texts"),
        (b'{"d": "high"}', "expected a number"),
    ],
)
def test_what_is_expected_and_what_was_found_is_told(text: bytes, words: str) -> None:
    """Fails on commit f5727a1 with a traceback for most of these (finding B3)."""
    with pytest.raises(CheckpointError) as caught:
        parse_json(text, "the file", {"a.b": int, "c": [str], "d": float})
    assert str(caught.value).startswith("the file")
    assert words in str(caught.value)


def test_null_and_absent_values_are_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": null, "d": 1}')
    assert read_json(tmp_path / "x.json", {"a": int, "b.c": str, "d": float}) == {"a": None, "d": 1}
    with pytest.raises(CheckpointError, match=r"y\.json is missing"):
        read_json(tmp_path / "y.json")


def test_every_block_of_a_config_gets_the_dtype() -> None:
    """Fails on commit f5727a1, which left the dtypes of the inner blocks as they were (finding B16)."""
    config = {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "hidden_size": 8},
        "vision_config": {"torch_dtype": "float16", "rope_parameters": {"dtype": "kept"}},
        "quiet": {"dtype": "kept"},
    }
    assert set_config_dtype(config, "float32") == {
        "dtype": "float32",
        "text_config": {"dtype": "float32", "hidden_size": 8},
        "vision_config": {"dtype": "float32", "rope_parameters": {"dtype": "kept"}},
        "quiet": {"dtype": "kept"},
    }
    assert set_config_dtype({"model_type": "llama"}, "float32") == {"model_type": "llama", "dtype": "float32"}
