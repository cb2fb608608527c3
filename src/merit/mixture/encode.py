"""From chats to token ids with a mask of the tokens that the loss predicts.

It tokenises a rendered conversation once and maps the assistant's characters to tokens; :mod:`merit.mixture.template`
renders.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence
from typing import Literal

import jinja2
import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from merit.errors import MixtureError
from merit.hf.image_inputs import ImageInputs
from merit.hf.images import ImageRef
from merit.hf.rows import EncodedRow
from merit.mixture.chat import BadRow, Chat, Message
from merit.mixture.representable import CharacterInventory
from merit.mixture.template import ChatTemplate, Span

__all__ = ["ChatEncoder", "DropReason", "encode_chat"]

DropReason = Literal[
    "no_target_after_truncation", "answer_lost", "refused_by_template", "image_token_in_text", "image_refused"
]

_BATCH_ROWS = 512
_TEMPLATE_WAY_OUT = "Use the base's tokenizer files and chat template as they were published."


def encode_chat(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> EncodedRow | DropReason:
    """Encode one conversation; :class:`ChatEncoder` encodes many faster.

    Args:
        messages: Turns with ``role`` and ``content``; at least one is the assistant's.
        tokenizer: A fast tokenizer with a chat template.
        max_length: Longest row in tokens; the rest is cut at the end.

    Raises:
        MixtureError: The tokenizer or its template cannot be used for assistant-only targets.
    """
    return ChatEncoder(tokenizer, max_length).encode([Chat(list(messages))])[0]


class ChatEncoder:
    """Encodes chats in batches with one tokenizer and template.

    Attributes:
        template: The chat template in use.
        inventory: What the tokenizer can represent.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int, images: ImageInputs | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise MixtureError(
                f"{type(tokenizer).__name__} is a slow tokenizer: it cannot say which token covers which character, so "
                "targets cannot be found.",
                "Save the base with its fast tokenizer (tokenizer.json).",
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.images = images
        self.inventory = CharacterInventory(tokenizer)
        self.template = ChatTemplate(tokenizer, None if images is None else images.place)
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._added = "|".join(re.escape(token) for token in added) or r"(?!)"
        self._pattern, self._pattern_size = re.compile(r"(?!)"), 0
        self._prefix: list[int] = [] if self.images is None else _automatic_prefix(tokenizer)

    def encode(self, chats: Sequence[Chat]) -> list[EncodedRow | DropReason]:
        """Encode chats, in order; a row that cannot be used comes back as the reason why.

        Raises:
            MixtureError: The template's output cannot be split into turns.
        """
        rows: list[EncodedRow | DropReason] = []
        for start in range(0, len(chats), _BATCH_ROWS):
            rows += self._encode_batch(chats[start : start + _BATCH_ROWS])
        return rows

    def _encode_batch(self, chats: Sequence[Chat]) -> list[EncodedRow | DropReason]:
        rendered = [self._render(chat) for chat in chats]
        good = [index for index, item in enumerate(rendered) if not isinstance(item, str)]
        rows: list[EncodedRow | DropReason] = list(rendered)  # type: ignore[arg-type]  # the good ones follow
        if not good:
            return rows
        self.inventory.learn(rendered[index][0] for index in good)
        cleaned = [self._without_dropped(*rendered[index]) for index in good]
        cleaned = [self._with_images(chats[index], *item) for index, item in zip(good, cleaned, strict=True)]
        encodings = self._tokenize([text for text, _ in cleaned])
        for index, (text, spans), encoding in zip(good, cleaned, encodings, strict=True):
            chat = chats[index]
            rows[index] = "answer_lost" if self._answers_lost(chat) else self._row(chat, text, spans, encoding)
        return rows

    def _answers_lost(self, chat: Chat) -> bool:
        """Whether nothing but white space is left of every target turn."""
        answers = _answers(chat)
        return bool(answers) and all(self.inventory.nothing_kept(answer) for answer in answers)

    def _tokenize(self, texts: list[str]) -> list[Encoding]:
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return encoded.encodings or []

    def _render(self, chat: Chat) -> tuple[str, list[Span]] | DropReason:
        """The rendered text and the character spans of its target turns, or why the row cannot be used."""
        if self.images is None and chat.images:
            raise MixtureError(
                "A row has images, but the base is text-only.",
                "Use a vision-language base, or leave the dataset out with mixture.exclude.",
            )
        if self.images is not None and any(
            token in turn["content"] for turn in chat.messages for token in (self.images.token, self.images.place)
        ):
            return "image_token_in_text"  # it would be read as a place for an image
        try:
            text, spans = self.template.render(chat.messages, len(chat.images), chat.tools)
        except jinja2.TemplateError:
            return "refused_by_template"
        try:
            for image in chat.images:
                self.images.text(image)  # type: ignore[union-attr]  # computed once per size
        except ValueError:
            return "image_refused"
        return text, list(itertools.compress(spans, chat.targets))

    def _with_images(self, chat: Chat, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """Put each image's tokens in its token's place, as the family's processor does, before tokenising."""
        if self.images is None or not chat.images:
            return text, spans
        token = self.images.place
        places = [match.start() for match in re.finditer(re.escape(token), text)]
        longer = [self.images.text(image) for image in chat.images]
        pieces, cursor = [], 0
        for place, run in zip(places, longer, strict=True):
            pieces += [text[cursor:place], run]
            cursor = place + len(token)
        pieces.append(text[cursor:])
        added = list(itertools.accumulate((len(run) - len(token) for run in longer), initial=0))

        def shift(at: int) -> int:
            return at + added[bisect.bisect_left(places, at)]

        return "".join(pieces), [(shift(start), shift(end)) for start, end in spans]

    def fault(self, reason: str, chat: Chat) -> BadRow | None:
        """The message about a row that cannot be encoded because of its own content."""
        if reason == "refused_by_template":
            said = self.template.refusal(chat.messages, len(chat.images), chat.tools)
            return BadRow(reason, f"the base's chat template refuses the row: {said}")
        if reason == "image_token_in_text" and (sight := self.images) is not None:
            return BadRow(reason, f"its text contains {sight.token}, which the base reads as a place for an image")
        if reason == "imagefault":
            shapes = ", ".join(f"{image.width} x {image.height}" for image in chat.images)
            return BadRow(reason, f"the base's image processor refuses an image of its shape (pixels: {shapes})")
        return None

    def template_characters_lost(self) -> str:
        """Characters of the template's own text (role markers) that the tokenizer cannot represent."""
        text, _ = self.template.apply([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}])
        return "".join(sorted(self.inventory.count_lost([re.sub(self._added, "", text)])))

    def _without_dropped(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """Take out characters for which the tokenizer yields no token at all.

        The ids stay the same, but such a tokenizer's character offsets count only what it kept: with the characters
        left in, every later offset, and so every target, would be shifted.
        """
        dropped = self.inventory.dropped(text)
        if not dropped:
            return text, spans
        known = self.inventory.all_dropped
        if len(known) != self._pattern_size:  # characters are learned as they appear; the pattern covers all of them
            self._pattern = re.compile(f"({self._added})|[{re.escape(''.join(sorted(known)))}]")
            self._pattern_size = len(known)
        pattern = self._pattern
        pieces, new_spans, position, length = [], [], 0, 0
        for start, end in spans:
            for is_span, piece in ((False, text[position:start]), (True, text[start:end])):
                pieces.append(pattern.sub(lambda match: match.group(1) or "", piece))
                if is_span:
                    new_spans.append((length, length + len(pieces[-1])))
                length += len(pieces[-1])
            position = end
        pieces.append(pattern.sub(lambda match: match.group(1) or "", text[position:]))
        return "".join(pieces), new_spans

    def _row(self, chat: Chat, text: str, spans: list[Span], encoding: Encoding) -> EncodedRow | DropReason:
        ids = encoding.ids
        ranges = [_token_range(encoding, start, end) for start, end in spans]
        crossing = any(
            r is not None and _starts_before(encoding, r[0], span[0]) for r, span in zip(ranges, spans, strict=True)
        )
        if crossing and (pieces := self._piecewise(text, spans, ids)) is not None:
            ids, ranges = pieces
        if self._prefix and not text.startswith(str(self.tokenizer.bos_token)):
            # As the published processors do: the tokenizer's own beginning, unless the template has written it.
            ids = [*self._prefix, *ids]
            ranges = [found and (found[0] + len(self._prefix), found[1] + len(self._prefix)) for found in ranges]
        input_ids = np.asarray(ids, dtype=np.int32)
        targets = np.zeros(len(ids), dtype=bool)
        for token_range in ranges:
            if token_range is not None:
                targets[slice(*token_range)] = True
        targets[:1] = False
        truncated = len(input_ids) > self.max_length
        input_ids, targets = input_ids[: self.max_length], targets[: self.max_length]
        if not targets.any():
            return "no_target_after_truncation"
        images = chat.images
        if images and truncated:  # nothing after the last target counts, and a cut image would have too few tokens
            end = int(np.flatnonzero(targets)[-1]) + 1
            input_ids, targets = input_ids[:end], targets[:end]
        if self.images is not None:
            images = self._images_in(input_ids, images)
        answers = _answers(chat)
        prompt_length, answer = 0, ""
        for token_range, content in zip(ranges, answers, strict=False):
            if token_range is not None and max(token_range[0], 1) < min(token_range[1], self.max_length):
                prompt_length, answer = max(token_range[0], 1), content
        return EncodedRow(input_ids, targets, prompt_length, truncated, answer, images)

    def _images_in(self, input_ids: np.ndarray, images: tuple[ImageRef, ...]) -> tuple[ImageRef, ...]:
        """The images whose tokens are in ``input_ids``: the first ones, each with all of its tokens."""
        assert self.images is not None
        sizes = [self.images.text(image).count(self.images.token) for image in images]
        found = int(np.count_nonzero(input_ids == self.images.token_id))
        wanted = list(itertools.accumulate(sizes, initial=0))
        if found not in wanted:
            raise MixtureError(
                f"A row with images of {sizes} tokens has {found} image tokens: the base's tokenizer and chat template do "
                "not keep its image token whole.",
                _TEMPLATE_WAY_OUT,
            )
        return images[: wanted.index(found)]

    def _piecewise(
        self, text: str, spans: list[Span], joint: list[int]
    ) -> tuple[list[int], list[tuple[int, int] | None]] | None:
        """Tokenise prompt and answer apart where one token would span both.

        Generation starts from the tokens of the prompt alone; a token that joins the prompt's last character with the
        answer's first would make training differ from it. A lead in front of a later piece, taken off again, keeps the
        tokenizer from treating the piece as the beginning of a text. None if no lead reads back as the same text.
        """
        cuts = [0, *(start for start, _ in spans), len(text)]
        first, *later = (text[a:b] for a, b in itertools.pairwise(cuts))
        for lead in filter(None, (self.tokenizer.eos_token, ":", ".", "a", "0")):
            lead_ids = self._tokenize([lead])[0].ids
            size = len(lead_ids)
            head, *tails = self._tokenize([first, *(lead + piece for piece in later)])
            ids: list[int] = list(head.ids)
            ranges: list[tuple[int, int] | None] = []
            for tail, (start, end) in zip(tails, spans, strict=True):
                found = _token_range(tail, len(lead), len(lead) + end - start)
                shift = len(ids) - size
                ranges.append((found[0] + shift, found[1] + shift) if found else None)
                ids += tail.ids[size:]
            clean = all(tail.ids[:size] == lead_ids for tail in tails)
            if clean and self.tokenizer.decode(ids) == self.tokenizer.decode(joint):
                return ids, ranges
        return None


def _answers(chat: Chat) -> list[str]:
    """The texts of the turns that are targets."""
    answers = [turn["content"] for turn in chat.messages if turn["role"] == "assistant"]
    return list(itertools.compress(answers, chat.targets))


def _automatic_prefix(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What the tokenizer puts in front of every text by itself (its beginning-of-sequence token, or nothing)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    at = next((i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain), 0)
    return list(whole[:at])


def _token_range(encoding: Encoding, start: int, end: int) -> tuple[int, int] | None:
    """Half-open token range that covers the characters [start, end); None if no token does.

    A last token that reaches into the next turn is the next turn's: a model ends its turn before it.
    """
    first = next((t for p in range(start, end) if (t := encoding.char_to_token(p)) is not None), None)
    last = next((t for p in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(p)) is not None), None)
    if first is None or last is None:
        return None
    while last + 1 < len(encoding) and (o := encoding.token_to_chars(last + 1)) and start <= o[0] < end:
        last += 1  # several tokens can share one character (bytes)
    while last > first and (o := encoding.token_to_chars(last)) and o[1] > end:
        last -= 1
    return first, last + 1


def _starts_before(encoding: Encoding, token: int, start: int) -> bool:
    offsets = encoding.token_to_chars(token)
    return offsets is not None and offsets[0] < start
