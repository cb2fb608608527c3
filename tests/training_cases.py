"""Tiny real bases, groups and recipes for the training tests; run as a script it trains one group in its own process.

As a script: ``python training_cases.py FOLDER [--kill-after-step N] [--kill-in-save N] [--set a.b=c]...`` trains the
group of :func:`make_group` from ``FOLDER/base`` into ``FOLDER/branch``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import numpy as np

from merit.hf.rows import EncodedRow
from merit.mixture import EncodedDataset
from merit.recipe.load import parse_recipe
from merit.recipe.schema import Recipe

VOCABULARY = 40


def make_base(folder: Path, dtype: str = "float32", tied: bool = True) -> Path:
    """A Llama of two layers and width 16, seeded, with a word-level tokenizer."""
    import torch
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


def train(root: Path, *overrides: str, group: dict[str, EncodedDataset] | None = None, **options: object) -> dict:
    """Train ``group`` from ``root/base`` into ``root/branch``."""
    from merit.hf.models import inspect_base, load_tokenizer, pick_device
    from merit.train.branch import train_branch

    recipe = make_recipe(root / "base", *overrides)
    return train_branch(
        recipe,
        group or make_group(),
        root / "branch",
        base=inspect_base(recipe.model),
        tokenizer=load_tokenizer(recipe.model),
        device=pick_device("cpu"),
        threads=1,
        provenance={"base": "b", "settings": "s"},
        **options,  # type: ignore[arg-type]
    )


def main() -> int:
    """Train in this process, and die or be told to stop where the options say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-after-step", type=int)
    parser.add_argument("--kill-in-save", type=int)
    parser.add_argument("--stop-after-step", type=int)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()

    from merit.errors import MeritError
    from merit.train import trainer

    def die_at(step: int | None, number: int, name: str) -> None:
        """Send this process a signal when the trainer's method ``name`` ends at ``step``."""
        method = getattr(trainer.GroupTrainer, name)

        def wrapped(self: trainer.GroupTrainer, *args: object, **kwargs: object) -> object:
            result = method(self, *args, **kwargs)
            if self.state.global_step == step:
                os.kill(os.getpid(), number)
            return result

        setattr(trainer.GroupTrainer, name, wrapped)

    die_at(options.kill_after_step, signal.SIGKILL, "note_step")
    die_at(options.kill_in_save, signal.SIGKILL, "_save_optimizer_and_scheduler")
    die_at(options.stop_after_step, signal.SIGTERM, "training_step")
    try:
        train(options.folder, *options.set)
    except MeritError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
