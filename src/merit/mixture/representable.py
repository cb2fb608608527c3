"""Which characters a tokenizer cannot represent.

Some tokenizers silently drop a character, or write ``<unk>``; a row can lose its whole answer that way. This module
tells which ones: character by character, or, for tokenizers of whole words, word by word. It decides nothing about
datasets; the mixture stage applies the recipe's limit.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

# Control and format characters (other than tab and line ends) carry no text; normalisers take them out on purpose.
_SILENT = {"Cc", "Cf"}
_COUNTED_CONTROLS = "\t\n\r"


class CharacterInventory:
    """Remembers for every character seen whether the tokenizer keeps it.

    A character is *dropped* when writing it between two letters gives the same tokens as leaving it out, and *unknown*
    when it gives the unknown token. Byte-level and byte-fallback tokenizers have neither. Characters that a normaliser
    rewrites (case, width, quotes) are kept.

    A tokenizer of whole words says nothing about single characters: ``cat`` may be a token and ``c`` none. For these
    (WordLevel with words, WordPiece, or no character that can be tried at all) the characters under unknown tokens
    count as lost, wherever they stand.

    Attributes:
        by_word: Losses are located by word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._seen: set[str] = set()
        self._dropped: set[str] = set()
        self._unknown: set[str] = set()
        self._anchor = self._find_anchor()
        model = type(tokenizer.backend_tokenizer.model).__name__
        words = model == "WordLevel" and any(len(token) > 1 and token.isalpha() for token in tokenizer.get_vocab())
        self.by_word = words or model == "WordPiece" or not self._anchor

    def dropped(self, text: str) -> set[str]:
        """The characters of ``text`` that yield no token."""
        self.learn([text])
        return self._dropped.intersection(text)

    @property
    def all_dropped(self) -> set[str]:
        """Every character seen so far that yields no token."""
        return self._dropped

    def kept(self, text: str) -> str:
        """``text`` without what is lost of it."""
        if not self.by_word:
            lost = self._lost([text])
            return "".join(c for c in text if c not in lost) if lost else text
        unknown, start, pieces = self._tokenizer.unk_token_id, 0, []
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for token, (first, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token == unknown:
                pieces += [text[start:first], *(c for c in text[first:end] if c.isspace() or _silent(c))]
                start = end
        return "".join([*pieces, text[start:]])

    def nothing_kept(self, text: str) -> bool:
        """Whether the tokenizer loses all of ``text`` but its white space."""
        kept = self.kept(text)
        return kept != text and not kept.strip()

    def count_lost(self, texts: Iterable[str]) -> Counter[str]:
        """How often each lost character stands in ``texts``; pure control and format characters do not count."""
        texts, counts = list(texts), Counter[str]()
        lost = set() if self.by_word else self._lost(texts)
        if self.by_word:
            for text in texts:
                counts += Counter(text) - Counter(self.kept(text))
        elif lost:
            for text in texts:
                counts.update(c for c in text if c in lost)
        return counts

    def _lost(self, texts: Iterable[str]) -> set[str]:
        characters = self.learn(texts)
        gone = characters & (self._dropped | self._unknown)
        return {c for c in gone if not _silent(c)}

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _find_anchor(self) -> str:
        unknown = self._tokenizer.unk_token_id
        candidates = ["a", "A", "0", *sorted(token for token in self._tokenizer.get_vocab() if len(token) == 1)]
        for letter in candidates:
            single, double = self._ids([letter, letter * 2])
            if single and unknown not in double and single != double:
                return letter
        return ""

    def learn(self, texts: Iterable[str]) -> set[str]:
        """Try out every new character of ``texts`` in one go; the set of all their characters."""
        characters: set[str] = set().union(*texts)
        new = sorted(characters - self._seen)
        if not new or self.by_word:
            return characters
        self._seen |= characters
        anchor, unknown = self._anchor, self._tokenizer.unk_token_id
        [plain] = self._ids([anchor * 2])
        between = self._ids([anchor + character + anchor for character in new])
        alone = self._ids(new)
        for character, ids, own in zip(new, between, alone, strict=True):
            if ids == plain:
                self._dropped.add(character)
            elif unknown is not None and unknown in ids and unknown in own:
                self._unknown.add(character)
        return characters


def _silent(character: str) -> bool:
    return character not in _COUNTED_CONTROLS and unicodedata.category(character) in _SILENT
