"""Tiny real models, a character tokenizer and encoded rows, built in memory."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from merit.hf.rows import EncodedRow
from merit.mixture import EncodedDataset

SPECIAL = ["<pad>", "<eos>", "<end>", "<user>", "<bot>", "<unk>"]
VOCABULARY = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz0123456789 |-+"]
END = SPECIAL.index("<end>")
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),  # absolute positions: a shift by the left padding would show
}


def tiny_model(family: str = "qwen2", seed: int = 0, context: int = 64, sharpness: float = 6.0):
    """A random float32 model whose predictions are far from uniform (so that greedy answers vary)."""
    config, kind = FAMILIES[family]
    torch.manual_seed(seed)
    model = kind(
        config(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            **({} if family == "gpt2" else {"intermediate_size": 48, "num_key_value_heads": 2}),
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=context,
            initializer_range=0.25,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; <end> ends a turn and is special, though it is not the tokenizer's <eos>."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_row(prompt: np.ndarray, answer: np.ndarray) -> EncodedRow:
    """<user> prompt <bot> answer <end>; the answer and its end are targets."""
    ids = np.concatenate([[3], prompt, [4], answer, [END]]).astype(np.int32)
    start = len(prompt) + 2
    return EncodedRow(ids, np.arange(len(ids)) >= start, start, False, "".join(VOCABULARY[i] for i in answer))


def make_dataset(name: str, rows: int, seed: int = 0, longest: int = 5) -> EncodedDataset:
    rng = np.random.default_rng([seed, *name.encode()])

    def letters(low: int, high: int) -> np.ndarray:
        return rng.integers(len(SPECIAL), len(SPECIAL) + 36, size=rng.integers(low, high + 1))

    return EncodedDataset(name, [make_row(letters(1, 20), letters(1, longest)) for _ in range(rows)])


def as_rows(prompts):
    """Token ids as rows to be continued."""
    return [EncodedRow(prompt, np.zeros(len(prompt), dtype=bool), len(prompt)) for prompt in prompts]
