"""The one place where tests get tiny real models, rows, recipes and runs from. Equal arguments give equal bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import string
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from typer.testing import CliRunner

from merit.hf.rows import EncodedRow
from merit.mixture.dataset import EncodedDataset

# ---- rows -----------------------------------------------------------------------------------------------------------

TASKS = {
    "upper": lambda word: word.upper(),
    "reverse": lambda word: word[::-1],
    "first": lambda word: word[0],
    "last": lambda word: f"The last letter is {word[-1]}.",
    "length": lambda word: str(len(word)),
    "double": lambda word: f"Twice {word} is {word}{word}.",
}


def write_rows(file: Path, rows: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def task_rows(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(f"{task}/{seed}")
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 6))) for _ in range(count)]
    return [
        {
            "messages": [
                {"role": "user", "content": f"{task} {word}"},
                {"role": "assistant", "content": TASKS[task](word)},
            ]
        }
        for word in words
    ]


def encoded(
    name: str, rows: int, *, seed: int = 0, low: int = 1, high: int = 61, lengths: tuple[int, int] = (5, 15)
) -> EncodedDataset:
    """Encoded rows whose tokens (``low`` to ``high`` - 1) follow a pattern of their own, so that datasets differ."""
    rng = np.random.default_rng(seed)
    step = int(rng.integers(1, 20))
    made = []
    for _ in range(rows):
        length = int(rng.integers(lengths[0], lengths[1] + 1))
        ids = (low + (rng.integers(0, 8) + step * np.arange(length)) % (high - low)).astype(np.int32)
        start = int(rng.integers(1, length - 1))
        made.append(EncodedRow(ids, np.arange(length) >= start, start))
    return EncodedDataset(name, made)


# ---- language models ------------------------------------------------------------------------------------------------


def char_tokenizer() -> Any:
    """One token per printable ASCII character; <pad> 0, <s> 1, </s> 2, <unk> 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", "<unk>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_base(
    folder: Path, *, hidden: int = 16, seed: int = 0, dtype: str = "float32", tied: bool = True, **config: Any
) -> Path:
    """Write a Llama of two layers with a character tokenizer.

    Args:
        folder: Where the checkpoint goes.
        hidden: Width.
        seed: Decides the weights.
        dtype: Of the file.
        tied: Whether input and output embeddings are one tensor.
        config: Further settings of LlamaConfig, such as ``vocab_size``.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = char_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**settings | config)).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- vision-language models -----------------------------------------------------------------------------------------
# Folders are laid out as the published checkpoints are: byte-level tokenizers (Qwen2's class without merges), random
# weights, the families' own chat templates in short, and processor files with the keys that the hub's folders have.

QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + '</s>' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
IDEFICS3_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA3_TEMPLATE = (
    "<bos>{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}<start_of_image>"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
FAMILIES = ("qwen2_5_vl", "llava", "idefics3")
ALL_FAMILIES = (*FAMILIES, "qwen2_vl", "qwen3_vl", "smolvlm", "gemma3", "internvl")


def byte_symbols() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_tokenizer(specials: list[str], eos: str, pad: str) -> Any:
    from transformers import Qwen2Tokenizer

    vocabulary = {symbol: index for index, symbol in enumerate([*specials, *byte_symbols()])}
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token=pad, eos_token=eos, pad_token=pad, extra_special_tokens=specials
    )


def make_vision_base(
    family: str,
    folder: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    processor: dict[str, Any] | None = None,
) -> Path:
    """Write a tiny base of ``family`` into ``folder``; equal arguments give equal bytes.

    ``text``, ``vision`` and ``processor`` change single settings of a Qwen base's config and image processor.
    """
    import torch

    torch.manual_seed(seed)
    if family.startswith("qwen"):
        model, tokenizer, template, preprocessor, published = _qwen(family, text or {}, vision or {}, processor or {})
    else:
        make = {"llava": _llava, "gemma3": _gemma3, "internvl": _internvl}.get(family, _idefics3)
        model, tokenizer, template, preprocessor, published = make(family)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    if published:
        (folder / "processor_config.json").write_text(json.dumps(published, indent=2))
    return folder


def _qwen(family: str, text: dict[str, Any], vision: dict[str, Any], processor: dict[str, Any]) -> tuple[Any, ...]:
    import transformers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
    specials += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(specials, "<|im_end|>", "<|endoftext|>")
    text = {**TEXT, "vocab_size": len(tokenizer), **text}
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    side = half * 3 // 8
    rope: dict[str, Any] = {
        "rope_type": "default",
        "mrope_section": [half - 2 * side, side, side],
        "rope_theta": 10000.0,
    }
    if family == "qwen3_vl":
        rope["mrope_interleaved"] = True
        seen = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 4}
        seen |= {"out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        text["head_dim"] = 16
    elif family == "qwen2_vl":
        seen = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 4}
    else:
        seen = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
        seen |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    prefix = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    ids = {
        key: tokenizer.convert_tokens_to_ids(token)
        for key, token in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }
    config = getattr(transformers, f"{prefix}Config")(
        text_config={**text, "rope_scaling": rope, "rope_parameters": rope}, vision_config={**seen, **vision}, **ids
    )
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor" + ("Fast" if family == "qwen3_vl" else ""),
        "processor_class": f"{prefix}Processor",
        "min_pixels": 64,
        "max_pixels": 4096,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        **processor,
    }
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    return model, tokenizer, QWEN_TEMPLATE, preprocessor, None


def _llava(family: str) -> tuple[Any, ...]:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    tokenizer = byte_tokenizer(["<pad>", "</s>", "<image>"], "</s>", "<pad>")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = LlavaConfig(
        text_config=Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": 8,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    return LlavaForConditionalGeneration(config), tokenizer, LLAVA_TEMPLATE, preprocessor, processor


def _gemma3(family: str) -> tuple[Any, ...]:
    import transformers

    marks = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    tokenizer = byte_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *marks], "<eos>", "<pad>"
    )
    boi, eoi, image = tokenizer.convert_tokens_to_ids(marks)
    text = {"vocab_size": len(tokenizer), "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 512}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT, **text),
        vision_config=transformers.SiglipVisionConfig(**sizes, image_size=32, patch_size=8),
        mm_tokens_per_image=4,
        boi_token_index=boi,
        eoi_token_index=eoi,
        image_token_index=image,
        tie_word_embeddings=False,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(0, 0.1)  # the library draws zeros
    preprocessor = {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pan_and_scan": None,
        "do_convert_rgb": None,
    }
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    return model, tokenizer, GEMMA3_TEMPLATE, preprocessor, processor


def _internvl(family: str) -> tuple[Any, ...]:
    import transformers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    tokenizer = byte_tokenizer(specials, "<|im_end|>", "<|endoftext|>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        vision_config={**sizes, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    preprocessor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "size": {"height": 16, "width": 16},
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 6,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    return transformers.InternVLForConditionalGeneration(config), tokenizer, INTERNVL_TEMPLATE, preprocessor, processor


def _idefics3(family: str) -> tuple[Any, ...]:
    import transformers

    tiles = [f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)]
    specials = ["<pad>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
    tokenizer = byte_tokenizer([*specials, *tiles], "<end_of_utterance>", "<pad>")
    prefix = "Idefics3" if family == "idefics3" else "SmolVLM"
    config = getattr(transformers, f"{prefix}Config")(
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=len(tokenizer), pad_token_id=0),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    preprocessor = {
        "image_processor_type": f"{prefix}ImageProcessor",
        "processor_class": f"{prefix}Processor",
        "size": {"longest_edge": 32},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": True,
        "do_pad": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 1,
    }
    processor = {"processor_class": f"{prefix}Processor", "image_seq_len": 4}
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    return model, tokenizer, IDEFICS3_TEMPLATE, preprocessor, processor


# ---- recipes and runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A recipe in a folder of its own, with everything that it names."""

    folder: Path
    settings: dict[str, Any]

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def write(self, **changes: Any) -> Path:
        merged = {**self.settings, **changes}
        self.recipe.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")
        return self.recipe


def make_case(folder: Path, base: Path, **changes: Any) -> Case:
    for number, task in enumerate(TASKS):
        write_rows(folder / "mixture" / task / "train.jsonl", task_rows(task, 24 + 8 * number, seed=0))
        write_rows(folder / "mixture" / task / "test.jsonl", task_rows(task, 6, seed=1))
    settings = {
        "name": "tiny",
        "model": {"base": str(base), "dtype": "float32"},
        "mixture": {"folder": "mixture"},
        "conflict": {"examples": 16, "sketch_size": 4096},
        "split": {"axes": 1},
        "train": {"learning_rate": 5e-3, "batch_size": 8, "max_length": 96, "threads": 1},
        "evaluate": {"max_new_tokens": 4, "drift": {"prompts": 4, "tokens": 4}},
        **changes,
    }
    case = Case(folder, settings)
    case.write()
    return case


@dataclass(frozen=True)
class Result:
    """What a command gave: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def call(*words: Any) -> Result:
    """Run a `merit` command in this process; what it should not raise is raised."""
    from merit.cli.commands import app

    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.stdout, result.stderr)


def start(*words: Any, log: Path, linger: str = "") -> multiprocessing.context.SpawnProcess:
    """A `merit` command in a process of its own, which can be killed; what it prints goes to ``log``.

    It is not forked: PyTorch's threads do not survive that. ``exitcode`` is minus the number of the signal that ended it.
    With ``linger`` it waits for a second after every checkpoint in a folder below one of that name, so that there is
    time to see the checkpoint.
    """
    process = multiprocessing.get_context("spawn").Process(target=_command, args=(list(map(str, words)), log, linger))
    process.start()
    return process


def _command(words: list[str], log: Path, linger: str) -> None:
    from merit.cli import main
    from merit.train import checkpoint

    save = checkpoint.save

    def save_and_wait(folder: Path, *others: Any, **settings: Any) -> None:
        save(folder, *others, **settings)
        if linger in folder.parts:
            time.sleep(1)

    checkpoint.save = save_and_wait

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        sys.stdout = sys.stderr = file
        sys.argv = ["merit", *words]
        main()


def until(process: multiprocessing.context.SpawnProcess, folder: Path, pattern: str) -> bool:
    """Wait until something below ``folder`` matches; False when the process ended before."""
    while process.is_alive():
        if next(folder.glob(pattern), None) is not None:
            return True
        time.sleep(0.005)
    return False


def ended(process: multiprocessing.context.SpawnProcess, log: Path, sent: int | None, code: int) -> str:
    """Send a command of :func:`start` a signal, if any, and wait for its end; returns what it printed.

    It has to end with ``code``, and without a traceback.
    """
    if sent is not None:
        assert process.pid is not None
        os.kill(process.pid, sent)
    process.join()
    said = log.read_text()
    assert process.exitcode == code, said
    assert "Traceback" not in said
    return said


def read(path: Path) -> Any:
    """A JSON file's value."""
    return json.loads(path.read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Tensors of a model folder with one file."""
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file, the locks aside."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
