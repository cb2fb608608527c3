"""Tiny real bases, groups and recipes for the training tests; run as a script it trains one group in its own process.

As a script: ``python cases.py FOLDER [--kill-after-step N] [--kill-in-save N] [--set a.b=c]...`` trains the
group of :func:`make_group` from ``FOLDER/base`` into ``FOLDER/branch``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from merit.errors import MeritError
from merit.hf.base import open_base
from merit.hf.rows import EncodedRow
from merit.launch.outcome import Outcome, own_outcome
from merit.mixture import EncodedDataset
from merit.recipe.load import parse_recipe
from merit.recipe.schema import Recipe
from merit.train import branch, checkpoint
from merit.train.branch import train_branch
from merit.train.log import StepLog
from merit.train.result import BranchResult

VOCABULARY = 40


def make_base(folder: Path, dtype: str = "float32", tied: bool = True) -> Path:
    """A Llama of two layers and width 16, seeded, with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    words["<unk>"] = words.pop("w3")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def make_group(rows: tuple[int, int] = (13, 8), seed: int = 0) -> dict[str, EncodedDataset]:
    """Two datasets of rows of 4 to 20 tokens whose last third or so are targets."""
    random = np.random.default_rng(seed)
    group = {}
    for name, count in zip(("apple", "pear"), rows, strict=True):
        made = []
        for _ in range(count):
            length = int(random.integers(4, 21))
            ids = random.integers(3, VOCABULARY, length).astype(np.int32)
            start = int(random.integers(1, length))
            made.append(EncodedRow(input_ids=ids, targets=np.arange(length) >= start, prompt_length=start))
        group[name] = EncodedDataset(name, made)
    return group


def make_recipe(base: Path, *overrides: str) -> Recipe:
    """A recipe for :func:`make_base`; the mixture named in it is not read by training."""
    data = {
        "name": "tiny",
        "seed": 3,
        "model": {"base": str(base)},
        "mixture": {"folder": str(base)},
        "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "device": "cpu"},
    }
    return parse_recipe(data, overrides)


def train(root: Path, *overrides: str, group: dict[str, EncodedDataset] | None = None, **options: Any) -> BranchResult:
    """Train ``group`` from ``root/base`` into ``root/branch``."""
    recipe = make_recipe(root / "base", "train.threads=1", *overrides)
    base = open_base(recipe.model)
    return train_branch(group or make_group(), base, root / "branch", recipe.train, seed=recipe.seed, **options)


def weights(root: Path, branch: str = "branch") -> dict[str, torch.Tensor]:
    (file,) = (root / branch / "model").glob("*.safetensors")
    return load_file(file)


def log_rows(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "branch" / "log.jsonl").read_text().splitlines()]


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def train_elsewhere(root: Path, *options: str) -> int:
    """Train in a forked process; returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = main([str(root), *options])
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def signal_at(step: int | None, number: int, place: str) -> None:
    """Send this process a signal when ``place`` (step, log or state) of this training step is done; None: never."""

    def wrapped(module: object, name: str, now: Callable[..., int | None]) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if step is not None and now(*args) == step:
                os.kill(os.getpid(), number)
            return result

        setattr(module, name, call)

    if place == "step":  # the step after ``step`` others has been taken, and not yet been noted
        wrapped(branch, "_take_step", lambda training, *_: training.schedule.last_epoch - 2)
    elif place == "log":
        wrapped(StepLog, "note", lambda _, number, *__: number)
    else:  # in a checkpoint, between the weights and the rest
        wrapped(checkpoint, "save_file", lambda _, path: checkpoint.step_of(path.parent))


def main(words: list[str] | None = None) -> int:
    """Train in this process, and die or be told to stop where the options say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-after-step", type=int)
    parser.add_argument("--kill-in-save", type=int)
    parser.add_argument("--stop-after-step", type=int)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args(words)
    signal_at(options.kill_after_step, signal.SIGKILL, "log")
    signal_at(options.kill_in_save, signal.SIGKILL, "save")
    signal_at(options.stop_after_step, signal.SIGTERM, "step")
    outcome = Outcome()
    try:
        train(options.folder, *options.set)
    except MeritError as error:
        print(error, file=sys.stderr)
        outcome = Outcome.of(error)
    outcome.save(own_outcome(options.folder / "outcome.json"))
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
