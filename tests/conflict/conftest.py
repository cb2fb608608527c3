"""A tiny real base (Llama architecture, tied embeddings) and a small mixture of encoded rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from merit.conflict.result import Geometry
from merit.conflict.stage import measure_gradients
from merit.hf.base import open_base
from merit.hf.models import load_model
from merit.hf.rows import EncodedRow
from merit.mixture.dataset import EncodedDataset
from merit.recipe.load import parse_recipe

torch.set_num_threads(1)
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({"<pad>": 0, **{f"w{i}": i for i in range(1, 61)}}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<pad>", pad_token="<pad>").save_pretrained(folder)
    return folder


def make_dataset(name: str, rows: int, seed: int, low: int = 1, high: int = 61) -> EncodedDataset:
    """Rows whose tokens follow a pattern of their own, so that datasets differ and examples of one dataset agree."""
    rng = np.random.default_rng(seed)
    step = int(rng.integers(1, 20))
    made = []
    for _ in range(rows):
        length = int(rng.integers(5, 16))
        ids = (low + (rng.integers(0, 8) + step * np.arange(length)) % (high - low)).astype(np.int32)
        targets = np.arange(length) >= int(rng.integers(1, length - 1))
        made.append(EncodedRow(ids, targets))
    return EncodedDataset(name, made)


@pytest.fixture
def mixture():
    return {f"d{i}": make_dataset(f"d{i}", 14 + 5 * i, seed=i) for i in range(6)}


@pytest.fixture
def make_recipe(base, tmp_path):
    def make(**conflict):
        model = {"base": str(base), **conflict.pop("model", {})}
        settings = {"examples": 12, "sketch_size": 4096, **conflict}
        return parse_recipe(
            {"name": "t", "model": model, "mixture": {"folder": str(tmp_path)}, "conflict": settings, "seed": 3}
        )

    return make


def run(recipe, mixture, folder, **options) -> Geometry:
    """The stage as a recipe asks for it."""
    return measure_gradients(
        mixture, open_base(recipe.model), recipe.conflict, recipe.seed, folder, device=CPU, **options
    )


@pytest.fixture
def model(base, make_recipe):
    return load_model(open_base(make_recipe().model), CPU, trainable=True)
