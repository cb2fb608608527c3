"""The shipped base: small, loads offline, keeps its ids, and answers as its record says."""

import json
import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_data.words import BASE_STYLE, MIXTURE, draw_rows
from merit.demo import base_folder, demo_recipe, write_demo
from merit.recipe.load import load_recipe


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_folder(), local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(base_folder(), local_files_only=True).eval()


@pytest.fixture(scope="module")
def record():
    return json.loads((base_folder() / "training.json").read_text())


def test_the_package_data_is_small_and_complete():
    files = [path for path in base_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5_000_000
    names = {path.name for path in files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names


def test_the_weights_are_finite_float32(record):
    with safe_open(base_folder() / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    assert sum(tensor.numel() for tensor in tensors.values()) == record["parameters"] < 1_000_000
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())


def test_ids_survive_saving_and_reloading(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((base_folder() / "config.json").read_bytes())  # model_type decides the class
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    texts = ["plain words 123", "Ünïcode — 漢字 🙂", "a\n\n b\t  c", "<|user|>x<|end|><|assistant|>y<|end|>"]
    for text in texts:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_character_is_one_token_per_byte(tokenizer):
    text = "reverse tola! 漢"
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_template_marks_answer_and_end_of_turn(tokenizer):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}] * 2
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "yo<|end|>yo<|end|>"
    assert tokenizer.eos_token == "<|end|>" != tokenizer.pad_token
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>hi<|end|><|assistant|>"


@torch.no_grad()
def test_the_base_answers_as_recorded(tokenizer, model, record):
    """Greedy answers on fresh held-out cases; the recorded figure must lie within sampling error."""
    scores = []
    for name, dataset in BASE_STYLE.items():
        rows = list(islice(draw_rows(dataset, random.Random(f"{name}/fresh"), held_out=True), 12))
        prompts = [
            tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
            for row in rows
        ]
        inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(output, skip_special_tokens=True)
        scores += [a == row["messages"][1]["content"] for a, row in zip(answers, rows, strict=True)]
    found, recorded = sum(scores) / len(scores), record["heldout_exact_match_mean"]
    assert recorded >= 0.8
    assert abs(found - recorded) <= 4 * (recorded * (1 - recorded) / len(scores)) ** 0.5 + 0.01


def test_the_mixture_fits_the_recipe(tokenizer, tmp_path):
    recipe = load_recipe(write_demo(tmp_path / "demo", seed=5))
    assert recipe.seed == 5
    assert recipe.baselines == ["joint", "random"]
    assert Path(recipe.model.base) == tmp_path / "demo/base"
    assert Path(recipe.mixture.folder) == tmp_path / "demo/mixture"
    assert Path(recipe.evaluate.kept_folder) == tmp_path / "demo/kept"
    assert Path(recipe.evaluate.unseen_folder) == tmp_path / "demo/unseen"
    for path in (tmp_path / "demo").rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            messages = json.loads(line)["messages"]
            assert len(tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]) <= 96
            assert len(messages[1]["content"]) < recipe.evaluate.max_new_tokens


def test_the_recipe_and_the_card_say_true_things(record):
    assert yaml.safe_load(demo_recipe())["seed"] == 0
    assert f"{len(MIXTURE)} generated datasets" in demo_recipe()
    card = (base_folder() / "README.md").read_text()
    assert record["command"] in card
    assert f"{record['parameters']:,} parameters" in card
    for name, score in record["heldout_exact_match"].items():
        assert re.search(rf"\| {name} \| {score:.2f} \|", card)


def test_importing_the_demo_needs_no_ml_library():
    code = (
        "import sys, merit.demo; merit.demo.demo_recipe(); sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
