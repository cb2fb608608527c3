"""Vision-language bases see what the published processors and the library's own classes would show them."""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.builders import ALL_FAMILIES, FAMILIES
from tests.builders import make_vision_base as make_base
from tests.hf.vision_cases import picture, picture_chats, save
from transformers import AutoImageProcessor

from merit.errors import CheckpointError, MixtureError, RecipeError
from merit.evaluation.decode import decode
from merit.evaluation.drift import Reference, measure_drift
from merit.evaluation.forward import Forward
from merit.hf.base import Base, open_base
from merit.hf.batches import target_losses
from merit.hf.families import FAMILIES as KNOWN
from merit.hf.images import read_image
from merit.hf.models import (
    file_names,
    load_model,
    mark_trainable,
    save_branch,
    trainable_parameters,
)
from merit.hf.rows import EncodedRow
from merit.hf.side_files import edit_json
from merit.mixture.dataset import EncodedDataset
from merit.mixture.encode import ChatEncoder
from merit.mixture.formats import IMAGE, Chat
from merit.recipe.schema import ModelSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vision")
    for family in ALL_FAMILIES:
        make_base(family, root / family, dtype="bfloat16" if family == "llava" else "float32")
    return root


def settings(folder: Path, family: str, **changes: Any) -> ModelSettings:
    return ModelSettings(base=str(folder / family), **changes)


def encoder_of(base: Base, length: int) -> ChatEncoder:
    return ChatEncoder(base.tokenizer, length, base.images)


def encoded(folder: Path, family: str, count: int = 9, length: int = 512) -> tuple[Base, list[EncodedRow]]:
    base = open_base(settings(folder, family))
    rows = encoder_of(base, length).encode(picture_chats(folder / "pictures", count))
    assert all(isinstance(row, EncodedRow) for row in rows), rows
    return base, rows  # type: ignore[return-value]


def library_processor(folder: Path, where: str, tokenizer: Any, family: str = "") -> Any:
    """The family's published processor, put together without the parts that need torchvision."""
    from transformers import AutoImageProcessor, Gemma3Processor, Idefics3Processor, LlavaProcessor
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    family = family or where
    images = AutoImageProcessor.from_pretrained(folder / where, backend="pil")
    template = json.loads((folder / where / "chat_template.json").read_text())["chat_template"]
    published = folder / where / "processor_config.json"
    options = json.loads(published.read_text()) if published.is_file() else {}
    options.pop("processor_class", None)
    if family == "llava":
        return LlavaProcessor(images, tokenizer, chat_template=template, **options)
    if family in ("idefics3", "smolvlm"):  # SmolVLM writes images as Idefics3 does
        return Idefics3Processor(images, tokenizer, chat_template=template, **options)
    if family == "gemma3":
        for key, mark in (("boi", "<start_of_image>"), ("eoi", "<end_of_image>"), ("image", "<image_soft_token>")):
            setattr(tokenizer, f"{key}_token", mark)
            setattr(tokenizer, f"{key}_token_id", tokenizer.convert_tokens_to_ids(mark))
        return Gemma3Processor(images, tokenizer, chat_template=template, **options)
    if family == "internvl":
        return internvl_processor(images, tokenizer, template)

    class ImagesOnly(Qwen2_5_VLProcessor):
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            self.image_processor, self.tokenizer, self.chat_template = image_processor, tokenizer, chat_template

        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    return ImagesOnly(images, tokenizer, template)


def internvl_processor(images: Any, tokenizer: Any, template: str) -> Any:
    from transformers import InternVLProcessor

    class ImagesOnly(InternVLProcessor):
        def __init__(self) -> None:
            marks = {"start_image": "<img>", "end_image": "</img>", "image": "<IMG_CONTEXT>", "video": "<video>"}
            for key, mark in marks.items():
                setattr(self, f"{key}_token", mark)
                setattr(self, f"{key}_token_id", tokenizer.convert_tokens_to_ids(mark))
            self.image_seq_length, self.chat_template = 4, template
            self.image_processor, self.tokenizer = images, tokenizer
            self.multimodal_pattern = re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)")

        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    return ImagesOnly()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_ids_and_pixels_are_those_of_the_published_processor(folder: Path, family: str) -> None:
    base, rows = encoded(folder, family)
    processor = library_processor(folder, family, open_base(settings(folder, family)).tokenizer)
    batcher = base.batcher
    chats = picture_chats(folder / "pictures", 9)
    assert {len(chat.images) for chat in chats} == {0, 1, 2}
    for chat, row in zip(chats, rows, strict=True):
        turns = []
        for turn in chat.messages:
            before, *after = turn["content"].split(IMAGE)
            parts: list[dict[str, str]] = [{"type": "text", "text": before}] if before else []
            parts += [{"type": "image"}, {"type": "text", "text": after[0]}] if after else []
            turns.append({"role": turn["role"], "content": parts})
        text = processor.apply_chat_template(turns, chat_template=processor.chat_template, tokenize=False)
        pictures = [read_image(image) for image in chat.images]
        found = processor(images=pictures or None, text=[text], return_tensors="pt", add_special_tokens=False)
        assert row.input_ids.tolist() == found["input_ids"][0].tolist()
        batch = batcher([row])
        for key in ("pixel_values", "image_grid_thw", "pixel_attention_mask", "mm_token_type_ids", "token_type_ids"):
            assert (key in batch) == (key in found and bool(pictures)), key
            if key in batch:
                assert torch.equal(batch[key].flatten().float(), found[key].flatten().float()), key


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_batch_of_mixed_rows_gives_every_row_its_own_loss(folder: Path, family: str) -> None:
    base, rows = encoded(folder, family)
    model, batcher = load_model(base, CPU), base.batcher
    with torch.no_grad():
        together, counts = target_losses(model, batcher(rows))
        apart = [target_losses(model, batcher([row])) for row in rows]
        batch = batcher(rows)
        own = model(**{key: value for key, value in batch.items()}).loss  # the class's own loss, from labels
    assert torch.allclose(together, torch.cat([loss for loss, _ in apart]), atol=2e-5)
    assert counts.tolist() == [int(row.targets.sum()) for row in rows]
    assert float(together.sum() / counts.sum()) == pytest.approx(float(own), rel=1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_picture_reaches_the_model(folder: Path, family: str) -> None:
    base = open_base(settings(folder, family))
    encoder, model, batcher = (
        encoder_of(base, 512),
        load_model(base, CPU),
        base.batcher,
    )
    losses = []
    for colour in ("red", "blue"):
        ref = save(picture(colour, (32, 32)), folder / "pictures" / f"{colour}.png")
        turns = [{"role": "user", "content": f"{IMAGE}Which colour?"}, {"role": "assistant", "content": "red"}]
        rows = encoder.encode([Chat(turns, images=(ref,))])
        losses.append(float(target_losses(model, batcher(rows))[0]))  # type: ignore[arg-type]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_are_numbered_in_three_dimensions(folder: Path, family: str) -> None:
    """Without ``mm_token_type_ids`` Qwen2.5-VL numbers patches like words, without a word: another loss."""
    base, rows = encoded(folder, family)
    model, batch = load_model(base, CPU), base.batcher([rows[0]])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.ndim < 2 else 4.0)
        right = target_losses(model, batch)[0]
        positions, _ = model.model.get_rope_index(
            batch["input_ids"], batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"]
        )
        explicit = target_losses(model, {**batch, "position_ids": positions})[0]
        flat = torch.arange(batch["input_ids"].shape[1])[None, None].expand(3, 1, -1)
        wrong = target_losses(model, {**batch, "position_ids": flat})[0]
    assert torch.allclose(right, explicit, atol=1e-6)
    assert abs(float(right - wrong)) > 1e-4


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_greedy_answers_equal_growing_the_sequence_without_a_cache(folder: Path, family: str) -> None:
    base, rows = encoded(folder, family)
    model, batcher = load_model(base, CPU), base.batcher
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.ndim < 2 else 6.0)  # answers that depend on what was asked
    prompts = [row.prompt() for row in rows]

    def grow(prompt: EncodedRow, ends: tuple[int, ...]) -> list[int]:
        ids = prompt.input_ids.tolist()
        while len(ids) < len(prompt.input_ids) + 8 and (len(ids) == len(prompt.input_ids) or ids[-1] not in ends):
            row = EncodedRow(np.asarray(ids, np.int32), np.zeros(len(ids), bool), images=prompt.images)
            batch = batcher([row])
            del batch["labels"]
            with torch.no_grad():
                ids.append(int(model(**batch, use_cache=False).logits[0, -1].argmax()))
        return ids[len(prompt.input_ids) :]

    free = [grow(prompt, ()) for prompt in prompts]
    ends = (free[0][1], free[1][3], free[3][2])  # rows end at different steps and leave the batch early
    wanted = [next((a[: i + 1] for i, t in enumerate(a) if t in ends), a) for a in free]
    found = decode(model, prompts, [8] * len(prompts), ends, Forward(batcher, CPU, 10**6))
    assert [answer.tolist() for answer in found] == wanted
    assert len({len(answer) for answer in wanted}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_drift_of_the_base_from_itself_is_none_and_pictures_count(folder: Path, family: str, tmp_path: Path) -> None:
    base, rows = encoded(folder, family)
    model, batcher = load_model(base, CPU), base.batcher
    prompts = [row.prompt() for row in rows]
    answers = [np.asarray([7, 8, 9])] * len(prompts)
    reference = Reference.of_base(model, prompts, answers, tmp_path, Forward(batcher, CPU))
    found = measure_drift(model, reference, Forward(batcher, CPU))
    assert found.kl == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if KNOWN[family].role(name) == "projector":
                parameter.mul_(-3)
    assert measure_drift(model, reference, Forward(batcher, CPU)).kl > 1e-6


ROLE_OF_MODULE = {
    "qwen2_5_vl": {"model.visual.merger": "projector", "model.visual": "vision"},
    "qwen3_vl": {"model.visual.merger": "projector", "model.visual.deepstack": "projector", "model.visual": "vision"},
    "llava": {"model.multi_modal_projector": "projector", "model.vision_tower": "vision"},
    "idefics3": {"model.connector": "projector", "model.vision_model": "vision"},
    "gemma3": {"model.multi_modal_projector": "projector", "model.vision_tower": "vision"},
    "internvl": {"model.multi_modal_projector": "projector", "model.vision_tower": "vision"},
}


@pytest.mark.parametrize("family", ROLE_OF_MODULE)
def test_roles(folder: Path, family: str) -> None:
    def role_of(name: str) -> str:
        return next((role for prefix, role in ROLE_OF_MODULE[family].items() if name.startswith(prefix)), "language")

    for wanted in ("language", "projector", "vision", "all", ["vision", "projector"], ["projector", "*norm*"]):
        model = load_model(open_base(settings(folder, family)), CPU)
        names = file_names(model)
        mark_trainable(model, settings(folder, family, trainable=wanted), 0)
        for name, parameter in model.named_parameters():
            expected = wanted == "all" or role_of(name) in wanted or ("*norm*" in wanted and "norm" in names[name])
            assert parameter.requires_grad == expected, (wanted, name)
    model = load_model(open_base(settings(folder, family, trainable="lora")), CPU, trainable=True)
    adapted = [name for name in trainable_parameters(model) if "lora_A" in name]
    assert adapted
    assert {role_of(name.removeprefix("base_model.model.")) for name in adapted} == {"language"}
    with pytest.raises(RecipeError, match="matches none"):
        mark_trainable(
            load_model(open_base(settings(folder, family)), CPU), settings(folder, family, trainable=["nope.*"]), 0
        )


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_gradient_names_are_not_file_names_and_branches_have_the_bases(
    folder: Path, family: str, tmp_path: Path
) -> None:
    base = open_base(settings(folder, family))
    model = load_model(base, CPU, trainable=True)
    if family in ("qwen2_5_vl", "llava"):
        assert set(trainable_parameters(model)) - set(base.dtypes)  # the trap: these differ
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.5)
    save_branch(model, tmp_path / "branch", base, save_dtype="base")
    before, after = load_file(folder / family / "model.safetensors"), load_file(tmp_path / "branch/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        frozen = KNOWN[family].role(name) != "language"
        assert torch.equal(tensor, after[name]) == frozen, name
    again = load_model(open_base(settings(folder, family)), CPU, weights=tmp_path / "branch")
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.allclose(one, other, atol=0 if base.dtypes != "BF16" else 1, rtol=1e-2), name
    for file in ("preprocessor_config.json", "chat_template.json"):
        assert (tmp_path / "branch" / file).read_bytes() == (folder / family / file).read_bytes()
    assert open_base(ModelSettings(base=str(tmp_path / "branch"))).images.settings == (base.images.settings)


def test_published_llava_files_keep_their_names(folder: Path, tmp_path: Path) -> None:
    """They have ``vision_tower.vision_model.`` in their names, which today's modules do not."""
    old = tmp_path / "old"
    shutil.copytree(folder / "llava", old)
    state = load_file(old / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in state.items()}
    assert renamed.keys() != state.keys()
    save_file(renamed, old / "model.safetensors", metadata={"format": "pt"})
    wanted = ModelSettings(base=str(old))
    model = load_model(open_base(wanted), CPU, trainable=True)
    save_branch(model, tmp_path / "branch", open_base(wanted), save_dtype="base")
    assert load_file(tmp_path / "branch/model.safetensors").keys() == renamed.keys()


def test_names_that_would_change_are_refused_before_training(folder: Path, tmp_path: Path) -> None:
    """Files without the ``model.`` in front load, but would be written back with it."""
    old = tmp_path / "old"
    shutil.copytree(folder / "qwen3_vl", old)
    state = load_file(old / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in state.items()},
        old / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError):
        load_model(open_base(ModelSettings(base=str(old))), CPU, trainable=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_row_never_loses_part_of_an_image(folder: Path, family: str) -> None:
    """max_length cuts between images: what is left has every token of the images that it has."""
    chats = [chat for chat in picture_chats(folder / "pictures", 9) if len(chat.images) == 2]
    base, whole = encoded(folder, family)
    whole = [row for row in whole if len(row.images) == 2]
    token = base.images.token_id
    model, batcher = load_model(base, CPU), base.batcher
    seen = set()
    for length in range(8, len(whole[0].input_ids) + 2, 5):
        [row] = encoder_of(base, length).encode(chats[:1])
        if row == "no_target_after_truncation":
            continue
        assert isinstance(row, EncodedRow)
        assert len(row.input_ids) <= length
        sizes = [base.images.text(image).count(base.images.token) for image in row.images]
        assert int((row.input_ids == token).sum()) == sum(sizes)
        assert not row.targets[row.input_ids == token].any()
        assert row.images == chats[0].images[: len(row.images)]
        target_losses(model, batcher([row]))  # the model finds as many features as tokens
        decode(model, [row.prompt()], [2], (0,), Forward(batcher, CPU, 999))
        seen.add(len(row.images))
    assert seen == {1, 2}


def test_targets_are_the_assistants_alone(folder: Path) -> None:
    for family in FAMILIES:
        base, rows = encoded(folder, family)
        for row in rows:
            assert base.images.token_id not in row.input_ids[row.targets]
            text = base.tokenizer.decode(row.input_ids[row.targets], skip_special_tokens=True)
            assert "colour" not in text and "Say" not in text  # noqa: PT018


def test_an_image_token_in_the_text_is_no_image(folder: Path) -> None:
    base = open_base(settings(folder, "llava"))
    turns = [{"role": "user", "content": "What does <image> mean?"}, {"role": "assistant", "content": "a place"}]
    assert encoder_of(base, 99).encode([Chat(turns)]) == ["image_token_in_text"]


def test_images_for_a_text_base_are_refused(folder: Path, tmp_path: Path) -> None:
    from tests.e2e.conftest import make_base as text_base

    base = open_base(ModelSettings(base=str(text_base(tmp_path / "text"))))
    assert base.images is None
    with pytest.raises(MixtureError, match="text-only"):
        encoder_of(base, 99).encode(picture_chats(tmp_path, 1))


@pytest.mark.parametrize("limit", [784, 1600, 614656])
def test_max_pixels_limits_the_area_that_a_native_resolution_model_sees(folder: Path, limit: int) -> None:
    large = save(picture("red", (600, 400)), folder / "pictures" / "large.png")
    images = open_base(settings(folder, "qwen2_5_vl", max_pixels=limit)).images
    patches = int(images.tensors([large])["image_grid_thw"].prod())
    assert patches * 16 <= min(limit, 4096)
    assert images.count(600, 400) * 4 == patches
    assert bool(images.changed) == (limit < 4096)


@pytest.mark.parametrize("family", ["llava", "idefics3", "smolvlm", "gemma3", "internvl"])
def test_max_pixels_does_not_touch_families_that_choose_the_size_themselves(folder: Path, family: str) -> None:
    """Fails on commit f5727a1: for Idefics3 and SmolVLM the area became the length of an edge (finding A5)."""
    counts = {
        limit: [
            open_base(settings(folder, family, max_pixels=limit)).images.count(*size) for size in [(784, 784), (90, 40)]
        ]
        for limit in (784, 614656)
    }
    assert counts[784] == counts[614656]


def test_a_square_picture_costs_what_smolvlm_publishes(folder: Path, tmp_path: Path) -> None:
    """784 x 784 pixels are 4 x 4 tiles and the whole, 64 tokens each. Fails on commit f5727a1 with 64 (finding A5)."""
    shutil.copytree(folder / "smolvlm", tmp_path / "base")
    edit_json(
        tmp_path / "base" / "preprocessor_config.json",
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
    )
    edit_json(tmp_path / "base" / "processor_config.json", {"image_seq_len": 64})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["vision_config"] |= {"image_size": 512, "patch_size": 16}
    config["scale_factor"] = 4
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert open_base(tmp_path / "base").images.count(784, 784) == 1088


@pytest.mark.parametrize("trainable", ["language", "lora"])
def test_a_branch_is_used_with_the_pixels_that_it_was_trained_with(
    folder: Path, tmp_path: Path, trainable: str
) -> None:
    """Fails on commit f5727a1, where a branch kept the base's full-size processor (finding A5)."""
    base = open_base(settings(folder, "qwen2_5_vl", max_pixels=1600, trainable=trainable))
    save_branch(load_model(base, CPU, trainable=True), tmp_path / "branch", base, save_dtype="base")
    large = save(picture("red", (600, 400)), folder / "pictures" / "large.png")
    for where in ("", "again"):
        found = AutoImageProcessor.from_pretrained(tmp_path / "branch", backend="pil")
        pixels = found(images=[read_image(large)], return_tensors="pt")
        wanted = base.images.tensors([large])
        assert torch.equal(pixels["image_grid_thw"], wanted["image_grid_thw"])
        assert torch.equal(pixels["pixel_values"], wanted["pixel_values"])
        if not where:  # a folder in the library's newer layout
            found.save_pretrained(tmp_path / "branch")
            base.write_inputs(tmp_path / "branch")


SIZES = [
    (w, h) for rng in [random.Random(1)] for w, h in ((rng.randint(1, 200), rng.randint(1, 200)) for _ in range(200))
]


@pytest.mark.parametrize("family", ["llava", "idefics3", "smolvlm", "gemma3", "internvl", "qwen2_5_vl", "qwen3_vl"])
def test_tokens_of_200_sizes_are_those_of_processing_a_picture(folder: Path, family: str) -> None:
    """The size function against what the image processor makes of a blank picture (finding B10: 0.2 s for each)."""
    base = open_base(settings(folder, family))
    images = base.images
    for width, height in SIZES:
        if max(width, height) > 60 * min(width, height):
            continue
        found = images.pixels([Image.new("RGB", (width, height))])
        if family.startswith("qwen"):
            wanted = int(found["image_grid_thw"].prod()) // 4
        elif family == "llava":
            wanted = 16
            assert found["pixel_values"].shape[-2:] == (32, 32)
        else:
            tiles = found["pixel_values"].shape[1 if family in ("idefics3", "smolvlm") else 0]
            wanted = 4 * tiles
        assert images.count(width, height) == wanted, (width, height)


def test_no_picture_is_processed_to_count_its_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails on commit f5727a1 for LLaVA and Idefics3, which processed a blank picture for every new size (finding B10)."""
    opened = [open_base(settings(folder, family)).images for family in ALL_FAMILIES]  # this tries the processor once
    for images in opened:
        monkeypatch.setattr(
            type(images.processor), "preprocess", lambda *_, **__: pytest.fail("a picture was processed")
        )
        assert all(images.count(*size) > 0 for size in [(40, 24), (33, 90), (200, 170)])


@pytest.mark.parametrize(
    ("size", "crop"),
    [({"shortest_edge": 40}, True), ({"height": 24, "width": 40}, False), ({"shortest_edge": 32}, False)],
)
def test_llava_counts_what_its_processor_makes_of_other_settings(
    folder: Path, tmp_path: Path, size: dict[str, int], crop: bool
) -> None:
    shutil.copytree(folder / "llava", tmp_path / "base")
    edit_json(tmp_path / "base" / "preprocessor_config.json", {"size": size, "do_center_crop": crop})
    images = open_base(tmp_path / "base").images
    for width, height in SIZES[:40]:
        rows, columns = images.pixels([Image.new("RGB", (width, height))])["pixel_values"].shape[-2:]
        assert images.count(width, height) == (rows // 8) * (columns // 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_gets_as_many_tokens_as_the_model_makes_features(folder: Path, family: str) -> None:
    base = open_base(settings(folder, family))
    encoder, model, batcher = (
        encoder_of(base, 2048),
        load_model(base, CPU),
        base.batcher,
    )
    for size in [(1, 1), (3, 90), (90, 3), (17, 31), (33, 16), (200, 150)]:
        ref = save(picture("green", (max(size[0], 8), max(size[1], 8))).resize(size), folder / "pictures" / "any.png")
        turns = [{"role": "user", "content": IMAGE}, {"role": "assistant", "content": "ok"}]
        [row] = encoder.encode([Chat(turns, images=(ref,))])
        assert isinstance(row, EncodedRow), (size, row)
        target_losses(model, batcher([row]))


def test_a_shape_that_the_processor_refuses_is_told_before_training(folder: Path) -> None:
    ref = save(picture("red", (8, 8)).resize((801, 3)), folder / "pictures" / "thin.png")
    turns = [{"role": "user", "content": IMAGE}, {"role": "assistant", "content": "ok"}]
    for family in FAMILIES:  # LLaVA's processor would make a picture of 32 x 8544 pixels of it
        encoder = encoder_of(open_base(settings(folder, family)), 512)
        assert encoder.encode([Chat(turns, images=(ref,))]) == ["image_refused"]


def test_saved_rows_keep_their_images_and_notice_a_changed_one(folder: Path, tmp_path: Path) -> None:
    base, rows = encoded(folder, "llava")
    seeing = base.images.settings
    dataset = EncodedDataset("squares", rows, seeing=seeing)
    dataset.save(tmp_path / "train" / "squares.parquet")
    again = EncodedDataset.load(tmp_path / "train" / "squares.parquet")
    assert again.fingerprint == dataset.fingerprint
    assert [row.images for row in again] == [row.images for row in rows]  # type: ignore[attr-defined]
    other = {**seeing, "backend": "another"}
    assert EncodedDataset("squares", rows, seeing=other).fingerprint != dataset.fingerprint
    changed = [EncodedRow(r.input_ids, r.targets, images=tuple(reversed(r.images))) for r in rows]
    assert EncodedDataset("squares", changed, seeing=seeing).fingerprint != dataset.fingerprint
    ref = save(picture("red", (32, 32)), tmp_path / "a.png")
    read_image(ref)
    save(picture("blue", (32, 32)), tmp_path / "a.png")
    with pytest.raises(MixtureError, match="has changed since"):
        read_image(ref)
    (tmp_path / "a.png").unlink()
    with pytest.raises(MixtureError, match="can no longer be read"):
        read_image(ref)


def test_inputs_go_to_worker_processes(folder: Path) -> None:
    base, rows = encoded(folder, "idefics3")
    batcher = base.batcher
    again = pickle.loads(pickle.dumps(batcher))
    one, other = batcher(rows), again(rows)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_base_without_its_processor_is_refused(folder: Path, tmp_path: Path) -> None:
    """AutoProcessor would answer with a bare tokenizer, and images would be ignored."""
    shutil.copytree(folder / "qwen2_5_vl", tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="image processor"):
        _ = open_base(ModelSettings(base=str(tmp_path / "bare"))).images


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "llava", tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    config["image_token_index" if "image_token_index" in config else "image_token_id"] = 77
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="image token"):
        _ = open_base(ModelSettings(base=str(tmp_path / "mixed"))).images


def test_a_wrong_run_length_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "idefics3", tmp_path / "wrong")
    (tmp_path / "wrong" / "processor_config.json").write_text(json.dumps({"image_seq_len": 9}))
    with pytest.raises(CheckpointError, match="tile is 9 tokens"):
        _ = open_base(ModelSettings(base=str(tmp_path / "wrong"))).images


def test_the_librarys_new_folder_layout_loads_as_well(folder: Path, tmp_path: Path) -> None:
    """transformers 5 saves a processor as one ``processor_config.json`` with the image processor inside."""
    for family in ("llava", "idefics3"):
        new = tmp_path / family
        shutil.copytree(folder / family, new)
        processor = library_processor(folder, family, open_base(settings(folder, family)).tokenizer)
        for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
            (new / name).unlink()
        processor.save_pretrained(new)
        assert not (new / "preprocessor_config.json").exists()
        base = open_base(ModelSettings(base=str(new)))
        chats = picture_chats(tmp_path / "pictures", 6)
        _, wanted = encoded(folder, family, 6)
        rows = encoder_of(base, 512).encode(chats)
        for row, other in zip(rows, wanted, strict=True):
            assert isinstance(row, EncodedRow)
            assert row.input_ids.tolist() == other.input_ids.tolist()


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("blip-2", "Blip2ForConditionalGeneration"),
        ("gemma3n", "Gemma3nForConditionalGeneration"),
        ("gemma4", "Gemma4ForConditionalGeneration"),
        ("got_ocr2", "GotOcr2ForConditionalGeneration"),
        ("mllama", "MllamaForConditionalGeneration"),
        ("llama4", "Llama4ForConditionalGeneration"),
        ("llama", "LlamaForCausalLM"),  # with a vision part in its config
        ("some_new_model", "NewForCausalLM"),
    ],
)
def test_other_models_that_see_are_refused_by_name(
    folder: Path, tmp_path: Path, model_type: str, architecture: str
) -> None:
    """Fails on commit f5727a1, where Gemma 3n, Gemma 4 and GOT-OCR2 passed as text models (finding A6)."""
    shutil.copytree(folder / "llava", tmp_path / "other")
    edit_json(tmp_path / "other" / "config.json", {"model_type": model_type, "architectures": [architecture]})
    with pytest.raises(CheckpointError, match="qwen2_5_vl, qwen3_vl, llava") as caught:
        open_base(tmp_path / "other")
    assert architecture in str(caught.value)
    assert model_type in str(caught.value)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_tensor_has_exactly_one_role(folder: Path, family: str, tmp_path: Path) -> None:
    """Fails on commit f5727a1, where a tensor of no known part counted as language (finding A6)."""
    base = open_base(settings(folder, family))
    roles = {name: KNOWN[family].roles(name) for name in base.dtypes}
    assert {len(found) for found in roles.values()} == {1}
    assert {found[0] for found in roles.values()} == {"language", "projector", "vision"}
    model = load_model(base, CPU)
    assert {KNOWN[family].role(name) for name, _ in model.named_parameters()} == {"language", "projector", "vision"}
    shutil.copytree(folder / family, tmp_path / "odd")
    state = load_file(tmp_path / "odd" / "model.safetensors")
    state["model.audio_tower.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "odd" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.audio_tower\.weight is neither language"):
        open_base(tmp_path / "odd")


@pytest.mark.parametrize(
    ("family", "template"),
    [
        ("qwen2_5_vl", "qwen2_5_vl"),
        ("qwen3_vl", "qwen3_vl"),
        ("idefics3", "idefics3"),
        ("smolvlm", "smolvlm"),
        ("llava", "llava_next"),
    ],
)
def test_the_published_templates(folder: Path, family: str, template: str) -> None:
    """The real models' chat templates, as TRL ships them: an image each time, and nothing but answers as targets."""
    trl = pytest.importorskip("trl")

    file = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    base = open_base(settings(folder, family, chat_template=str(file)))
    chats = picture_chats(folder / "pictures", 9)
    for chat, row in zip(chats, encoder_of(base, 512).encode(chats), strict=True):
        assert isinstance(row, EncodedRow)
        assert row.images == chat.images
        text = base.tokenizer.decode(row.input_ids[row.targets], skip_special_tokens=True)
        answers = [turn["content"] for turn in chat.messages if turn["role"] == "assistant"]
        assert text.replace("\n", " ").split() == answers


def test_a_tokenizers_own_beginning_comes_first_as_in_the_library(folder: Path, tmp_path: Path) -> None:
    """LLaVA's template does not write it; its processor lets the tokenizer do so. A template that writes it is believed."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    base = tmp_path / "llava"
    shutil.copytree(folder / "llava", base)
    inner = Tokenizer.from_file(str(base / "tokenizer.json"))
    inner.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    inner.save(str(base / "tokenizer.json"))
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<pad>"}))
    [chat] = picture_chats(folder / "pictures", 1)
    [row] = encoder_of(open_base(ModelSettings(base=str(base))), 512).encode([chat])
    [plain] = encoder_of(open_base(settings(folder, "llava")), 512).encode([chat])
    assert isinstance(row, EncodedRow)
    assert isinstance(plain, EncodedRow)
    assert row.input_ids.tolist() == [0, *plain.input_ids.tolist()]
    assert row.targets.tolist() == [False, *plain.targets.tolist()]
    assert row.prompt_length == plain.prompt_length + 1
    processor = library_processor(base, ".", open_base(ModelSettings(base=str(base))).tokenizer, family="llava")
    turns = [
        {"role": "user", "content": [{"type": "image", "image": read_image(chat.images[0])}, text("Which colour?")]},
        {"role": "assistant", "content": [text(chat.messages[1]["content"])]},
    ]
    found = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
    assert row.input_ids.tolist() == found["input_ids"][0].tolist()
    template = (base / "chat_template.json").read_text()
    (base / "chat_template.json").write_text(template.replace('"chat_template": "', '"chat_template": "<pad>'))
    [written] = encoder_of(open_base(ModelSettings(base=str(base))), 512).encode([chat])
    assert isinstance(written, EncodedRow)
    assert written.input_ids.tolist() == row.input_ids.tolist()


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def test_a_template_for_text_alone_takes_the_image_token_inline(folder: Path, tmp_path: Path) -> None:
    """The package's default template, and those of text models, add a content to other text."""
    bare = tmp_path / "llava"
    shutil.copytree(folder / "llava", bare)
    (bare / "chat_template.json").unlink()
    base = open_base(ModelSettings(base=str(bare)))
    assert base.template.origin == "default"
    chats = picture_chats(folder / "pictures", 9)
    for chat, row in zip(chats, encoder_of(base, 512).encode(chats), strict=True):
        assert isinstance(row, EncodedRow)
        assert row.images == chat.images
    joined = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|im_end|>' }}{% endfor %}"
    (tmp_path / "joined.jinja").write_text(joined + "{% if add_generation_prompt %}<assistant>{% endif %}")
    wanted = settings(folder, "qwen2_5_vl", chat_template=str(tmp_path / "joined.jinja"))
    rows = encoder_of(open_base(wanted), 512).encode(chats)
    assert [len(row.images) for row in rows] == [len(chat.images) for chat in chats]  # type: ignore[union-attr]


PUBLISHED_LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_the_published_llava_template_without_an_end_of_turn_is_refused(folder: Path, tmp_path: Path) -> None:
    """Its answers end in a space, which is never a target. Fails on commit f5727a1, silently (finding A4)."""
    (tmp_path / "llava.jinja").write_text(PUBLISHED_LLAVA)
    base = open_base(settings(folder, "llava", chat_template=str(tmp_path / "llava.jinja")))
    with pytest.raises(MixtureError, match="end its turn"):
        encoder_of(base, 99)


def test_training_continues_the_generation_prompt_of_a_llava_template(folder: Path, tmp_path: Path) -> None:
    """The prompt ends in ``ASSISTANT:``, training in ``ASSISTANT: ``. Fails on commit f5727a1, silently (finding A4)."""
    ended = PUBLISHED_LLAVA.replace(
        "{{ content['text'] + ' '}}{% endgeneration %}", "{{ content['text'] + '</s>'}}{% endgeneration %}"
    )
    (tmp_path / "llava.jinja").write_text(ended)
    base = open_base(settings(folder, "llava", chat_template=str(tmp_path / "llava.jinja")))
    [chat] = picture_chats(folder / "pictures", 1)
    try:
        [row] = encoder_of(base, 512).encode([chat])
    except MixtureError:
        return  # refused in so many words is right, too
    assert isinstance(row, EncodedRow)
    prompt = base.tokenizer.decode(row.input_ids[: row.prompt_length])
    assert prompt.endswith("ASSISTANT:")
    assert base.tokenizer.decode(row.input_ids[row.targets]) == f" {chat.messages[1]['content']}</s>"


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_are_never_generated(folder: Path, family: str) -> None:
    base, rows = encoded(folder, family, 4)
    model, batcher = load_model(base, CPU), base.batcher
    token = base.images.token_id
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(0)))
        head[token] = 50 * torch.sign(torch.randn(head.shape[1], generator=torch.Generator().manual_seed(1)))
    prompts = [row.prompt() for row in rows]
    numbers = [np.linspace(0, 0.999, 8)] * len(prompts)
    for uniforms in (None, numbers):
        answers = decode(model, prompts, [8] * 4, (), Forward(batcher, CPU, 10**6), uniforms)
        assert all(token not in answer for answer in answers)
    with torch.no_grad():
        batch = batcher(rows)
        del batch["labels"]
        assert (model(**batch).logits.argmax(dim=-1) == token).any()  # it would have been


def test_llava_with_an_encoder_of_many_sizes_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "llava", tmp_path / "pixtral")
    config = json.loads((tmp_path / "pixtral" / "config.json").read_text())
    config["vision_config"]["model_type"] = "pixtral"
    (tmp_path / "pixtral" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="pixtral"):
        _ = open_base(ModelSettings(base=str(tmp_path / "pixtral"))).images


@pytest.mark.parametrize("trainable", [["lora"], ["lora", "projector"], ["all"], []])
def test_lists_that_mean_nothing_are_refused(trainable: list[str]) -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError):
        ModelSettings(base="x", trainable=trainable)
