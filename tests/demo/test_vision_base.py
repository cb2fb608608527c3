"""The vision demo's base and the script that makes it: small, published in form, repeatable, as good as its record says."""

import json
import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor

import build_vision_demo_base as build
from demo_data.pictures import BASE_STYLE, MIXTURE, UNSEEN, base_stream, draw_examples
from merit.demo import base_folder, demo_recipe, write_demo
from merit.recipe.load import load_recipe

BASE = base_folder(vision=True)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


@pytest.fixture(scope="module")
def processor():
    """The published files, read by the library's own class."""
    return LlavaProcessor.from_pretrained(BASE, local_files_only=True, backend="pil")


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(BASE, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def record():
    return json.loads((BASE / "training.json").read_text())


def test_the_package_data_is_small_and_in_published_form():
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5_000_000
    names = {path.name for path in files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names
    assert {"preprocessor_config.json", "processor_config.json", "chat_template.jinja"} <= names
    config = json.loads((BASE / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert (config["vision_config"]["model_type"], config["text_config"]["model_type"]) == (
        "clip_vision_model",
        "qwen2",
    )


def test_the_weights_are_finite_bfloat16(record, model):
    with safe_open(BASE / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in tensors.values())
    assert sum(tensor.numel() for tensor in tensors.values()) == record["parameters"] < 2_500_000
    assert sum(record["parameters_by_role"].values()) == record["parameters"]
    assert isinstance(model, LlavaForConditionalGeneration)


def test_ids_survive_reloading_and_are_those_of_the_script(tokenizer):
    """Other ids would be an untrained model: the class that AutoTokenizer picks must keep the pre-tokenizer."""
    made = build.make_tokenizer()
    texts = [text for example in islice(base_stream(9), 60) for turn in example.turns for text in turn]
    texts += ["Ünïcode — 漢字 🙂", "a\n\n b\t  c 1234", "<|user|><image>x<|end|><|assistant|>y<|end|>"]
    for text in texts:
        assert tokenizer(text)["input_ids"] == made(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("Sure! The shape is red.")["input_ids"]) <= 7


def test_the_published_processor_gives_what_the_base_was_trained_on(processor, tokenizer):
    for example in islice(base_stream(3), 12):
        [question, answer], pictures = example.turns[0], list(example.pictures)
        parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
        messages = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        text = processor.apply_chat_template(messages, tokenize=False)
        found = processor(text=text, images=pictures or None, return_tensors="pt")
        alone = type(example)(example.turns[:1], example.pictures, example.cases)
        fixed = random.Random()
        fixed.random = lambda: 1.0  # no line end after the picture
        wanted = build.encode(tokenizer, [alone], fixed)
        assert torch.equal(found["input_ids"], wanted["input_ids"])
        assert int((found["input_ids"] == processor.image_token_id).sum()) == 36 * len(pictures)
        if pictures:
            assert torch.allclose(found["pixel_values"], wanted["pixel_values"], atol=1e-6)


def test_pictures_of_another_size_are_resized_as_clip_does(processor):
    picture = Image.fromarray(np.full((96, 120, 3), 200, np.uint8))
    found = processor(text="<image>x", images=picture, return_tensors="pt")
    assert found["pixel_values"].shape == (1, 3, 48, 48)
    assert torch.allclose(found["pixel_values"], torch.tensor((200 / 255 - 0.5) / 0.5), atol=1e-5)


def test_the_template_marks_answer_and_end_of_turn(tokenizer):
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "so?"},
        {"role": "assistant", "content": [{"type": "text", "text": "so."}]},
    ]
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "yo<|end|>so.<|end|>"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|><image>hi<|end|><|assistant|>"


@torch.no_grad()
def test_the_base_answers_as_recorded(tokenizer, model, record):
    """Greedy answers on fresh held-out cases; the recorded figure must lie within sampling error."""
    scores = []
    for name, dataset in BASE_STYLE.items():
        examples = list(islice(draw_examples(dataset, random.Random(f"{name}/fresh"), test=True), 12))
        given = build.answers(model, tokenizer, examples)
        scores += [a == e.turns[0][1] for a, e in zip(given, examples, strict=True)]
    found, recorded = sum(scores) / len(scores), record["heldout_exact_match_mean"]
    assert recorded >= 0.8
    assert abs(found - recorded) <= 4 * (recorded * (1 - recorded) / len(scores)) ** 0.5 + 0.01


@torch.no_grad()
def test_the_base_looks(tokenizer, model):
    """With another picture under the same question the answers become wrong."""
    examples = list(islice(draw_examples(BASE_STYLE["kept_colour"], random.Random(1), test=True), 24))
    swapped = [
        type(a)(a.turns, b.pictures, a.cases) for a, b in zip(examples, examples[1:] + examples[:1], strict=True)
    ]
    right, wrong = (
        sum(a == e.turns[0][1] for a, e in zip(build.answers(model, tokenizer, group), examples, strict=True))
        for group in (examples, swapped)
    )
    assert wrong < right / 2


def test_the_mixture_fits_the_recipe(tokenizer, tmp_path):
    recipe = load_recipe(write_demo(tmp_path / "demo", seed=5, vision=True))
    assert (recipe.seed, recipe.model.trainable, recipe.baselines) == (5, "language", ["joint", "random"])
    assert Path(recipe.model.base) == tmp_path / "demo/base"
    assert Path(recipe.mixture.folder) == tmp_path / "demo/mixture"
    assert Path(recipe.evaluate.kept_folder) == tmp_path / "demo/kept"
    assert Path(recipe.evaluate.unseen_folder) == tmp_path / "demo/unseen"
    for name, dataset in {**MIXTURE, **BASE_STYLE, **UNSEEN}.items():
        for example in islice(draw_examples(dataset, random.Random(name), test=False), 30):
            [(question, answer)] = example.turns
            assert len(tokenizer(answer)["input_ids"]) < recipe.evaluate.max_new_tokens
            length = len(tokenizer(question + answer)["input_ids"]) + 36 * len(example.pictures) + 6
            assert length <= recipe.train.max_length


def test_the_recipe_and_the_card_say_true_things(record):
    assert yaml.safe_load(demo_recipe(vision=True))["seed"] == 0
    pictures = sum(not name.startswith("text_") for name in MIXTURE)
    assert f"{len(MIXTURE)} generated datasets ({pictures} with images)" in demo_recipe(vision=True)
    card = (BASE / "README.md").read_text()
    assert record["command"] in card
    assert f"{record['parameters']:,} parameters" in card
    for name, score in record["heldout_exact_match"].items():
        assert re.search(rf"\| {name} \| {score:.2f} \|", card)


def test_handing_out_the_demo_needs_no_ml_framework(tmp_path):
    code = (
        "import sys; from pathlib import Path; from merit.demo import write_demo; "
        f"write_demo(Path({str(tmp_path)!r}), vision=True); sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
