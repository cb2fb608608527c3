"""Joining a vision encoder and a language model: tensors unchanged, what is new is seeded, what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.builders import TEXT, byte_tokenizer
from tests.builders import make_vision_base as make_base

from merit.errors import CheckpointError
from merit.hf import checkpoint
from merit.hf.base import open_base
from merit.hf.families import FAMILIES
from merit.hf.models import file_names, load_model
from merit.hf.side_files import chat_template
from merit.prepare.assemble import assemble
from merit.prepare.plan import join_configs, parameter_shapes, parameter_sizes, plan_assembly, read_model_config
from merit.recipe.schema import ModelSettings

IMAGE_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]


def llama_tokenizer() -> Any:
    """LlamaTokenizer in small: single characters, bytes for what it lacks, a mark instead of spaces."""
    from transformers import LlamaTokenizer

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return LlamaTokenizer(vocab=vocabulary, merges=[], bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_language_model(
    folder: Path, kind: str = "Qwen2", *, image_tokens: bool = True, tokenizer: Any = None, **changes: Any
) -> Path:
    """A tiny causal LM in bf16 files with its own byte-level tokenizer, or the one given."""
    import transformers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(IMAGE_TOKENS if image_tokens else [])]
    tokenizer = tokenizer or byte_tokenizer(specials, "<|im_end|>", "<|endoftext|>")
    rows = len(tokenizer) + changes.pop("unused_rows", 0)
    dtype = getattr(torch, changes.pop("dtype", "bfloat16"))
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**{**TEXT, **ids, "vocab_size": rows, **changes})
    torch.manual_seed(11)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # norms and biases too, so that a swapped tensor shows
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def givers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("givers")
    for family in ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava", "idefics3"):
        make_base(family, folder / family)
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Raw values of every stored tensor, by its name on disk."""
    held = checkpoint.read_headers(folder)
    return {name: checkpoint.read_tensor(held, name) for name in held.tensors}


def logits(folder: Path, ids: list[int], *, causal: bool) -> torch.Tensor:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind: Any = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def test_every_tensor_on_disk_is_its_sources(givers: Path, tmp_path: Path) -> None:
    language, vision = make_language_model(tmp_path / "lm"), givers / "qwen2_5_vl"
    facts = assemble(plan_assembly(language, vision), tmp_path / "joined", seed=0)
    joined, left, right = tensors(tmp_path / "joined"), tensors(language), tensors(vision)
    assert set(joined) == set(left) | {name for name in right if name.startswith("visual.")}
    for name, value in joined.items():
        source = right[name] if name.startswith("visual.") else left[name]
        assert value.dtype == source.dtype, f"{name} keeps the dtype of its file"
        assert np.array_equal(value, source), name
    assert facts.tensors_drawn == ()
    assert facts.tensors_copied == len(joined)


@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [
        ("qwen2_5_vl", "Qwen2", {}),
        ("qwen2_5_vl", "Qwen2", {"hidden_size": 48, "tie_word_embeddings": True, "rope_theta": 50000.0}),
        ("qwen2_vl", "Qwen2", {"hidden_size": 64}),
        ("qwen3_vl", "Qwen3", {"hidden_size": 48, "head_dim": 24}),
        ("llava", "Llama", {"hidden_size": 48, "image_tokens": False}),
        ("idefics3", "Qwen2", {"hidden_size": 48, "image_tokens": False, "tie_word_embeddings": True}),
    ],
)
def test_the_joined_model_reads_text_as_its_language_model_does(
    givers: Path, tmp_path: Path, family: str, kind: str, changes: dict[str, Any]
) -> None:
    language = make_language_model(tmp_path / "lm", kind, dtype="float32", **changes)
    plan = plan_assembly(language, givers / family, projector="new")
    facts = assemble(plan, tmp_path / "joined", seed=0)
    ids = [5, 17, 40, 99, 3, 8, 61, 17, 200, 131]
    alone, joined = logits(language, ids, causal=True), logits(tmp_path / "joined", ids, causal=False)
    assert torch.equal(alone, joined[:, : alone.shape[1]])
    assert facts.parameters == {
        role: sum(size for name, size in parameter_sizes(plan).items() if plan.family.role(name) == role)
        for role in ("language", "projector", "vision")
    }
    config = json.loads((tmp_path / "joined" / "config.json").read_text())
    tied = bool(changes.get("tie_word_embeddings"))
    assert config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in {name.removeprefix("language_model.") for name in tensors(tmp_path / "joined")}) != tied


def test_sizes_are_told_by_the_names_in_files(givers: Path, tmp_path: Path) -> None:
    plan = plan_assembly(make_language_model(tmp_path / "lm"), givers / "qwen2_5_vl")
    assemble(plan, tmp_path / "joined", seed=0)
    held = checkpoint.read_headers(tmp_path / "joined").tensors
    assert parameter_sizes(plan) == {name: tensor.size for name, tensor in held.items()}


def test_a_new_projector_is_drawn_by_seed_and_nothing_else_is(givers: Path, tmp_path: Path) -> None:
    language, vision = make_language_model(tmp_path / "lm"), givers / "qwen2_5_vl"
    plan = plan_assembly(language, vision, projector="new")
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        facts = assemble(plan, tmp_path / name, seed=seed)
    a, again, b = tensors(tmp_path / "a"), tensors(tmp_path / "again"), tensors(tmp_path / "b")
    assert all(np.array_equal(a[name], again[name]) for name in a)
    differ = {name for name in a if not np.array_equal(a[name], b[name])}
    assert differ == {"visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight"}, "biases are 0, the norm is 1"
    assert all(FAMILIES["qwen2_5_vl"].role(name) == "projector" for name in facts.tensors_drawn)
    assert np.all(a["visual.merger.ln_q.weight"] == 1)
    assert np.all(a["visual.merger.mlp.0.bias"] == 0)
    std = float(a["visual.merger.mlp.0.weight"].std())
    assert std == pytest.approx(0.02, rel=0.1), "the family's own initialisation"


def test_tokens_that_the_language_model_lacks_are_added_with_seeded_rows(givers: Path, tmp_path: Path) -> None:
    language = make_language_model(tmp_path / "lm", image_tokens=False)
    plan = plan_assembly(language, givers / "qwen2_5_vl")
    assert plan.added == tuple(IMAGE_TOKENS)
    facts = assemble(plan, tmp_path / "a", seed=1)
    assemble(plan, tmp_path / "b", seed=1)
    assert facts.embedding_rows_added == 5
    old, new = tensors(language), tensors(tmp_path / "a")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert new[name].shape[0] == old[name].shape[0] + 5
        assert np.array_equal(new[name][:-5], old[name])
        assert np.array_equal(new[name], tensors(tmp_path / "b")[name])
    base = open_base(ModelSettings(base=str(tmp_path / "a")))
    assert base.images.token == "<|image_pad|>"
    assert base.tokenizer("<|image_pad|>", add_special_tokens=False)["input_ids"] == [base.images.token_id]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for key, token in (("image_token_id", "<|image_pad|>"), ("vision_start_token_id", "<|vision_start|>")):
        assert config[key] == base.tokenizer.convert_tokens_to_ids(token)


def test_unused_embedding_rows_are_taken_before_new_ones(givers: Path, tmp_path: Path) -> None:
    language = make_language_model(tmp_path / "lm", image_tokens=False, unused_rows=9)
    plan = plan_assembly(language, givers / "qwen2_5_vl")
    facts = assemble(plan, tmp_path / "joined", seed=0)
    assert (facts.embedding_rows_added, len(facts.tokens_added)) == (0, 5)
    assert np.array_equal(tensors(tmp_path / "joined")["lm_head.weight"], tensors(language)["lm_head.weight"])


def test_the_joined_folder_is_an_ordinary_base(givers: Path, tmp_path: Path) -> None:
    language, vision = make_language_model(tmp_path / "lm"), givers / "qwen2_5_vl"
    assemble(plan_assembly(language, vision), tmp_path / "joined", seed=0)
    settings = ModelSettings(base=str(tmp_path / "joined"))
    base = open_base(settings)
    assert base.family is FAMILIES["qwen2_5_vl"]
    assert base.tokenizer.chat_template == chat_template(vision)
    assert (tmp_path / "joined" / "tokenizer.json").read_bytes() == (language / "tokenizer.json").read_bytes()
    model = load_model(base, torch.device("cpu"), trainable=True)
    assert set(file_names(model).values()) == set(checkpoint.read_headers(tmp_path / "joined").tensors)
    assert {p.requires_grad for name, p in model.named_parameters() if "visual" in name} == {False}


def make_encoder(folder: Path, kind: str, *, whole: bool) -> Path:
    """A tiny CLIP or SigLIP, with its text tower or without, as the hub has them."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = {**sizes, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**sizes, "num_hidden_layers": 1, "vocab_size": 99}, vision_config=vision
    )
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}Model" if whole else f"{kind}VisionModel")(
        config if whole else config.vision_config
    )
    model.to(torch.float16).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    processor = {"image_processor_type": f"{kind}ImageProcessor", "size": size, "crop_size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize(("kind", "whole"), [("CLIP", True), ("CLIP", False), ("Siglip", True)])
def test_a_bare_encoder_is_joined_as_llava_does(tmp_path: Path, kind: str, whole: bool) -> None:
    from PIL import Image
    from tests.hf.vision_cases import save

    vision = make_encoder(tmp_path / "encoder", kind, whole=whole)
    language = make_language_model(tmp_path / "lm", "Llama", image_tokens=False)
    assert "no projector to copy" in refused(language, vision)
    facts = assemble(plan_assembly(language, vision, projector="new"), tmp_path / "joined", seed=0)
    joined, left = tensors(tmp_path / "joined"), tensors(vision)
    copied = {name: value for name, value in joined.items() if FAMILIES["llava"].role(name) == "vision"}
    for name, value in copied.items():
        bare = name.removeprefix("vision_tower.")
        source = left[bare] if bare in left else left[f"vision_model.{bare.removeprefix('vision_model.')}"]
        assert value.dtype == source.dtype
        assert np.array_equal(value, source), name
    assert copied
    assert facts.tokens_added == ("<image>",)
    settings = ModelSettings(base=str(tmp_path / "joined"))
    base = open_base(settings)
    picture = save(Image.new("RGB", (50, 40), (9, 99, 200)), tmp_path / "picture.png")
    assert base.images.text(picture) == "<image>" * 16, "one token per patch, none for a class token"
    ids = base.tokenizer(base.images.text(picture), add_special_tokens=False)["input_ids"]
    model = load_model(base, torch.device("cpu"))
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[5, *ids, 7]]), **base.images.tensors([picture])).logits
    assert torch.isfinite(found).all(), "as many features as tokens"


def test_positions_are_shared_out_in_the_language_models_head_size(givers: Path, tmp_path: Path) -> None:
    language = make_language_model(tmp_path / "lm", hidden_size=64)
    plan = plan_assembly(language, givers / "qwen2_5_vl", projector="new")
    assert plan.config.text_config.rope_parameters["mrope_section"] == [4, 6, 6]
    assert any("[4, 6, 6]" in note for note in plan.notes)


def refused(language: Path, vision: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        plan_assembly(language, vision, **options)
    return str(caught.value)


def test_what_does_not_fit_is_refused_before_weights_are_read(givers: Path, tmp_path: Path) -> None:
    qwen = givers / "qwen2_5_vl"
    wide = make_language_model(tmp_path / "wide", hidden_size=64)
    for word in ("prepare.assemble.projector", "(32, 128)", "(64, 128)", "projector: new"):
        assert word in refused(wide, qwen)
    llama = make_language_model(tmp_path / "llama", "Llama")
    for word in ("model.base", "qwen2", "llama"):
        assert word in refused(llama, qwen)
    assert "vision_from" in refused(wide, llama)
    assert "prepare.assemble" in refused(qwen, qwen)
    odd = tmp_path / "odd"
    shutil.copytree(givers / "llava", odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "image_token_index": 9999, "image_token_id": 9999}))
    assert "image token" in refused(llama, odd)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty", qwen)


def test_a_tensor_that_is_written_wrong_is_found(givers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    language = make_language_model(tmp_path / "lm")
    plan = plan_assembly(language, givers / "qwen2_5_vl")
    write = PreTrainedModel.save_pretrained

    def lossy(self: Any, folder: Path, **options: Any) -> None:
        with torch.no_grad():
            self.model.visual.blocks[0].norm1.weight[0] += 1
        write(self, folder, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lossy)
    with pytest.raises(CheckpointError, match=r"visual\.blocks\.0\.norm1\.weight"):
        assemble(plan, tmp_path / "joined", seed=0)


PUBLISHED_TEXT = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "max_window_layers": 28, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "vocab_size": 152064, "torch_dtype": "bfloat16", "use_sliding_window": False,
}  # fmt: skip
PUBLISHED_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3, "out_hidden_size": 3584,
    "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip


def test_the_papers_own_pair_fits_by_its_published_configs(tmp_path: Path) -> None:
    """Qwen2.5-VL-7B's flat config of before, and Qwen2.5-7B-Instruct's: no weights, the whole architecture."""
    flat = {"model_type": "qwen2_5_vl", "max_position_embeddings": 128000, "vision_config": PUBLISHED_VISION}
    flat |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "image_token_id": 151655}
    for name, values in (("vlm", flat), ("lm", {"model_type": "qwen2", "max_position_embeddings": 32768})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**PUBLISHED_TEXT, **values}))
    vlm, lm = (read_model_config(tmp_path / name, "key") for name in ("vlm", "lm"))
    joined, notes = join_configs(vlm, lm, {"image_token_id": 151655}, 0)
    shapes = parameter_shapes(joined)
    assert shapes == parameter_shapes(vlm), "the projector fits as it is, and every layer"
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 8_292_166_656
    rope = joined.text_config.rope_parameters
    assert (rope["mrope_section"], rope["rope_theta"], rope["rope_type"]) == ([16, 24, 24], 1e6, "default")
    assert notes == ["the context is the language model's: 32768 tokens, not 128000"]
