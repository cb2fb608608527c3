"""A tiny real base (Llama architecture, character tokenizer), a small mixture, and the command line called in-process."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

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


def make_base(folder: Path, *, hidden: int = 16, seed: int = 0) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", "<unk>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


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


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


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
        "evaluate": {"max_new_tokens": 8, "drift": {"prompts": 6, "tokens": 8}},
        **changes,
    }
    case = Case(folder, settings)
    case.write()
    return case


@pytest.fixture
def case(tmp_path: Path, base: Path) -> Case:
    return make_case(tmp_path, base)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def merit() -> Callable[..., Result]:
    from merit.cli import app

    runner = CliRunner()

    def call(*words: Any) -> Result:
        result = runner.invoke(app, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Result(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, base: Path, merit: Callable[..., Result]) -> Case:
    """One whole run with both usual baselines; read-only for the tests that share it."""
    case = make_case(tmp_path_factory.mktemp("finished"), base, baselines=["joint", "random"])
    result = merit("run", case.recipe, "--output", case.run, "--quiet")
    assert result.code == 0, result.err
    return case
