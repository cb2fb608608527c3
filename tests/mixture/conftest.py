"""Three small tokenizers: byte-level (loses nothing), one that drops what it does not know, one that writes <unk>."""

import string
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from merit.hf.base import default_chat_template
from merit.recipe.load import parse_recipe

CORPUS = [
    "User:\nHow many cats are in the garden?\n\nAssistant:\nThere are two cats in the garden.",
    "The answer is 4. The other answer is 12, and the sum of both is 16.",
]


@pytest.fixture(scope="session")
def byte_level():
    """BPE over bytes with ChatML's special tokens, in the manner of GPT-2 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    made.chat_template = default_chat_template()
    return made


@pytest.fixture(scope="session")
def dropping():
    """Letters and a few signs, byte fallback without byte tokens: unknown characters vanish, and offsets with them."""
    signs = [*string.ascii_letters, *"0123456789", ".", ",", "!", "?", ":", "\n", "▁"]
    # Joins over a line end, as a tokenizer trained on plain text has them.
    merges = [("T", "h"), ("Th", "e"), ("\n", "The"), (".", "\n"), ("i", "s"), ("is", "▁"), ("t", "h")]
    tokens = ["<unk>", "<s>", "</s>", *signs, *(a + b for a, b in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = default_chat_template()
    return made


@pytest.fixture(scope="session")
def unknowing():
    """One token per character; whatever it does not know becomes <unk>."""
    tokens = ["<unk>", "</s>", *string.ascii_letters, *" .:\n"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    made.chat_template = default_chat_template()
    return made


WORDS = ["User", "Assistant", "which", "is", "it", "that", "the", "cat", "I"]


@pytest.fixture(scope="session", params=["words", "words and signs", "word pieces"])
def whole_words(request):
    """Whole words and hardly a single letter; a word that it does not know becomes <unk>, whatever its letters."""
    tokens = ["<unk>", "</s>", *WORDS, *([] if request.param == "words" else [".", "!", ":"])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if request.param == "word pieces":
        tokenizer = Tokenizer(models.WordPiece({**vocabulary, "##s": len(vocabulary)}, unk_token="<unk>"))
        tokenizer.decoder = decoders.WordPiece()
    else:
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    made.chat_template = default_chat_template()
    return made


@pytest.fixture(scope="session")
def seeing(tmp_path_factory):
    """A tiny LLaVA, which sees images."""
    from tests.builders import make_vision_base

    from merit.hf.base import open_base

    return open_base(make_vision_base("llava", tmp_path_factory.mktemp("llava")))


@pytest.fixture
def recipe(tmp_path: Path):
    """A function that makes a recipe from ``mixture`` settings (and other blocks by keyword)."""

    def make(mixture: dict, **blocks):
        data = {"name": "t", "model": {"base": "none"}, "mixture": mixture, **blocks}
        return parse_recipe(data, folder=tmp_path)

    return make
