"""Which characters a tokenizer cannot represent.

Some tokenizers drop a character without a word, or write ``<unk>``; a row can lose its whole answer that way. This module
tells, character by character, which ones. It decides nothing about datasets; the mixture stage applies the recipe's limit.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

# Control and format characters (other than tab and line ends) carry no text; normalisers take them out on purpose.
_SILENT = {"Cc", "Cf"}
_COUNTED_CONTROLS = "\t\n\r"


class CharacterInventory:
    """Remembers for every character seen whether the tokenizer keeps it.

    A character is *dropped* when writing it between two letters gives the same tokens as leaving it out, and *unknown*
    when it gives the unknown token. Byte-level and byte-fallback tokenizers have neither. Characters that a normaliser
    rewrites (case, width, quotes) are kept.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._seen: set[str] = set()
        self._dropped: set[str] = set()
        self._unknown: set[str] = set()
        self._anchor = self._find_anchor()

    def dropped(self, text: str) -> set[str]:
        """The characters of ``text`` that yield no token."""
        self.learn([text])
        return self._dropped.intersection(text)

    @property
    def all_dropped(self) -> set[str]:
        """Every character seen so far that yields no token."""
        return self._dropped

    def lost(self, texts: Iterable[str]) -> set[str]:
        """The characters of ``texts`` that are dropped or unknown; pure control and format characters do not count."""
        characters = self.learn(texts)
        gone = characters & (self._dropped | self._unknown)
        return {c for c in gone if c in _COUNTED_CONTROLS or unicodedata.category(c) not in _SILENT}

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _find_anchor(self) -> str:
        unknown = self._tokenizer.unk_token_id
        candidates = ["a", "A", "0", *sorted(token for token in self._tokenizer.get_vocab() if len(token) == 1)]
        for letter in candidates:
            single, double = self._ids([letter, letter * 2])
            if single and unknown not in double and single != double:
                return letter
        return "a"

    def learn(self, texts: Iterable[str]) -> set[str]:
        """Try out every new character of ``texts`` in one go; the set of all their characters."""
        characters: set[str] = set().union(*texts)
        new = sorted(characters - self._seen)
        if not new:
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
