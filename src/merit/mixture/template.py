"""The chat template at work: one conversation in, its text and the assistant's characters out.

Which characters are the assistant's:

1. A template with ``{% generation %}`` markers marks it itself.
2. Otherwise turn by turn: what turn i adds to ``messages[:i]`` with the generation prompt is its text, end of turn included.
   Where a template writes earlier turns in another way once later ones follow (it drops their thinking, or ends the last
   turn with another token), the text is put together of the turns as each is written when it is the last: what a model
   generates.

Whatever the generation prompt already gives is prompt, not target, also where a template marks it; whatever stands between
the generation prompt and the marked text is target. A probe conversation checks before the first row that the text before a
target is the generation prompt and that the target ends in a token. It tokenises nothing but that probe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from merit.errors import MixtureError
from merit.mixture.chat import IMAGE, Message

TemplateSource = Literal["generation markers", "turn by turn"]
Span = tuple[int, int]
Tools = Sequence[dict[str, Any]] | None

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE: list[Message] = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
_SENTINEL = "\ue000\ue001"  # private use: in no real text
_WAY_OUT = (
    "Set model.chat_template to a file with a template that has {% generation %} markers around the assistant's text and "
    "end-of-turn token, and whose generation prompt is what stands before them (docs/mixture.md; ready-made: "
    "builtin:llava-1.5, builtin:deepseek-r1)."
)


class ChatTemplate:
    """A tokenizer's chat template, ready for training.

    Args:
        tokenizer: A tokenizer with a chat template.
        image_token: Text of the base's image token; None for a text-only base.

    Attributes:
        text: The Jinja template in use.
        source: How the assistant's characters are found (module docstring).

    Raises:
        MixtureError: There is no template, it leaves out the assistant's text, its training text and generation prompt do
            not agree, no token ends a turn, or the tokenizer does not read its special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_token: str | None = None) -> None:
        template = tokenizer.chat_template
        self.text = str((template.get("default") if isinstance(template, dict) else template) or "")
        if not self.text:
            raise MixtureError("The base's tokenizer has no chat template.", "Set model.chat_template to a Jinja file.")
        self.source: TemplateSource = "generation markers" if _MARKER.search(self.text) else "turn by turn"
        self.tokenizer = tokenizer
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        tokens = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self._image_token = image_token
        self._image_parts = True
        self._parts = False  # content as a list of parts, as the templates of vision-language models want it
        self._given = ""  # what a marked turn repeats of the generation prompt
        self._between = ""  # what stands between generation prompt and marked text
        self._header = ""  # what the generation prompt adds to a conversation
        self._written: dict[str, bool] = {}
        self._probe()
        if self._image_token is not None:
            self._probe_images(self._image_token)

    def render(self, messages: list[Message], images: int = 0, tools: Tools = None) -> tuple[str, list[Span]]:
        """Render a conversation.

        Args:
            messages: The turns.
            images: Number of images in it; where there are any, each :data:`merit.mixture.chat.IMAGE` stands for one and
                comes out as one image token.
            tools: JSON schemas of the functions that the assistant may call.

        Returns:
            Its text, and one character span per assistant turn, in order.

        Raises:
            jinja2.TemplateError: The template refuses the conversation.
            MixtureError: The template does not tell the assistant's turns apart.
        """
        if any(turn.get("tool_calls") for turn in messages) and not self.writes("tool_calls"):
            raise jinja2.TemplateError("it does not write tool calls")
        if any(turn["role"] == "tool" for turn in messages) and not self.writes("tool"):
            raise jinja2.TemplateError("it does not write the results of tools")
        if self.source == "turn by turn":
            return self._turn_by_turn(messages, images, tools)
        text, marked = self.apply(messages, markers=True, images=images, tools=tools)
        spans: list[Span] = []
        for start, end in marked:
            if spans and start == spans[-1][1]:
                spans[-1] = (spans[-1][0], end)  # text and end of turn in separate blocks
            elif end > start:
                spans.append((start, end))
        turns = sum(turn["role"] == "assistant" for turn in messages)
        if len(spans) != turns:
            raise MixtureError(
                f"The base's chat template marks {len(spans)} stretches of text as the assistant's where the conversation "
                f"has {turns} assistant turns.",
                _WAY_OUT,
            )
        return text, [(self._start(text, start), end) for start, end in spans]

    def writes(self, feature: Literal["tools", "tool_calls", "tool", "reasoning_content"]) -> bool:
        """Whether the template writes descriptions of tools, calls, their results, or reasoning."""
        if feature not in self._written:
            name = "xyzzy"
            call = {"type": "function", "id": "a1b2c3d4e", "function": {"name": name, "arguments": {"a": 1}}}
            described = {"name": name, "description": "d", "parameters": {"type": "object", "properties": {}}}
            question, answer = _PROBE
            calling = {"role": "assistant", "content": "", "tool_calls": [call]}
            result = {"role": "tool", "content": name, "name": "n", "tool_call_id": "a1b2c3d4e"}
            plain = {**calling, "tool_calls": [{**call, "function": {"name": "n", "arguments": {}}}]}
            conversations = {
                "tools": _PROBE,
                "tool_calls": [question, calling],
                "tool": [question, plain, result, answer],
                "reasoning_content": [question, {**answer, "reasoning_content": name}],
            }
            tools = [{"type": "function", "function": described}] if feature == "tools" else None
            try:
                self._written[feature] = name in self.apply(conversations[feature], tools=tools)[0]
            except jinja2.TemplateError:
                self._written[feature] = False
        return self._written[feature]

    def refusal(self, messages: list[Message], images: int = 0, tools: Tools = None) -> str:
        """What the template says about a conversation that it refuses (for an error message)."""
        try:
            self.render(messages, images, tools)
        except jinja2.TemplateError as error:
            return str(error)
        return "no reason given"

    def apply(
        self,
        messages: list[Message],
        *,
        prompt: bool = False,
        markers: bool = False,
        images: int = 0,
        tools: Tools = None,
    ) -> tuple[str, list[Span]]:
        """The template's plain output: text and, with ``markers``, the spans of its generation blocks."""
        conversation: list[Any] = messages
        if images and not self._image_parts:
            conversation = [
                {**turn, "content": turn["content"].replace(IMAGE, str(self._image_token))} for turn in messages
            ]
        if self._parts or (images and self._image_parts):
            conversation = [{**turn, "content": _parts(turn["content"], bool(images))} for turn in conversation]
        try:
            # Declared to return a string; it returns the texts and the spans, one per conversation.
            rendered: Any = render_jinja_template(
                conversations=[conversation],
                tools=list(tools) if tools else None,
                chat_template=self.text,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=markers,
                **self._special,
            )
        except TypeError as error:  # text and parts of a content do not add up
            raise jinja2.TemplateError(str(error)) from None
        texts, spans = rendered
        return texts[0], spans[0] if markers else []

    def _start(self, text: str, start: int) -> int:
        """Where the target of a marked stretch begins: where the generation prompt ends."""
        if self._between and text.endswith(self._between, 0, start):
            return start - len(self._between)
        return start + len(self._given) * text.startswith(self._given, start)

    def _turn_by_turn(self, messages: list[Message], images: int, tools: Tools) -> tuple[str, list[Span]]:
        def plain(turns: list[Message], prompt: bool = False) -> str:
            return self.apply(turns, prompt=prompt, images=images, tools=tools)[0]

        whole = plain(messages)
        turns = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
        before, upto = {}, {}
        for index in turns:
            upto[index] = plain(messages[: index + 1]) if index + 1 < len(messages) else whole
            before[index] = plain(messages[:index], prompt=True) if index else self._opening(upto[index])
            if not upto[index].startswith(before[index]) or len(upto[index]) == len(before[index]):
                raise MixtureError(
                    "The base's chat template has no {% generation %} markers, and an answer does not continue the text "
                    f"that its generation prompt gives (turn {index} of {len(messages)}), so the assistant's tokens "
                    "cannot be told apart.",
                    _WAY_OUT,
                )
        if all(whole.startswith(text) for text in upto.values()):
            return whole, [(len(before[index]), len(upto[index])) for index in turns]
        text, spans = "", list[Span]()
        for place, index in enumerate(turns):
            if not place:
                text = before[index]
            else:
                last = turns[place - 1]
                stand_in = {**messages[last], "content": _SENTINEL}
                as_last = _after(plain([*messages[:last], stand_in]))
                followed = _after(plain([*messages[:last], stand_in, *messages[last + 1 : index]], prompt=True))
                if as_last is None or followed is None or not text.endswith(as_last):
                    raise MixtureError(
                        "The base's chat template has no {% generation %} markers, and its text for the first turns "
                        f"changes when later turns follow (turn {last} of {len(messages)}), so the assistant's tokens "
                        "cannot be told apart.",
                        _WAY_OUT,
                    )
                end = self._end_of_turn(as_last, followed)
                text = text[: len(text) - len(as_last)] + followed[:end]
                spans[-1] = (spans[-1][0], len(text))
                text += followed[end:]
            spans.append((len(text), len(text) + len(upto[index]) - len(before[index])))
            text += upto[index][len(before[index]) :]
        return text, spans

    def _opening(self, text: str) -> str:
        """What stands before the answer where a conversation begins with one: all up to the end of the turn's header."""
        header = self._header.lstrip()
        at = text.find(header)
        if at < 0:
            raise jinja2.TemplateError("it writes no header for a conversation that begins with the assistant")
        return text[: at + len(header)]

    def _end_of_turn(self, as_last: str, followed: str) -> int:
        """Characters of ``followed`` that end a turn: what it shares with the end of a last turn, at least one token."""
        end = _shared(as_last, followed)
        for text in (as_last, followed):
            end = next(
                (found.start() for found in self._token.finditer(text) if found.start() < end < found.end()), end
            )
        if not self._token.search(followed[:end]) and (found := self._token.search(followed)):
            return found.end()
        return end

    # ---- the probe ---------------------------------------------------------------------------------------------------

    def _probe(self) -> None:
        """Find out how the template wants its content, and check that prompt, answer and end of turn fit together."""
        problem = "it leaves out the assistant's text"
        for self._parts in (False, True):
            try:
                text, [(start, end)] = self.render(_PROBE)
                prompt, _ = self.apply(_PROBE[:1], prompt=True)
                question, _ = self.apply(_PROBE[:1])
            except (jinja2.TemplateError, MixtureError) as error:
                if self._parts and isinstance(error, MixtureError):
                    raise
                problem = problem if self._parts else str(error)
                continue
            if _PROBE[1]["content"] in text[start:end]:
                break
        else:
            raise MixtureError(f"The base's chat template cannot render a question and an answer: {problem}.", _WAY_OUT)
        same = _shared(prompt, question)
        self._header = prompt[
            min([same, *(m.start() for m in self._token.finditer(prompt) if m.start() < same < m.end())]) :
        ]
        if prompt.startswith(text[:start]):
            self._given = prompt[start : start + _shared(text[start:end], prompt[start:])]
        elif text[:start].startswith(prompt):
            self._between = text[len(prompt) : start]
        start = self._start(text, start)
        if text[:start] != prompt:
            raise MixtureError(
                f"The base's chat template trains an answer after {text[:start][-40:]!r}, but its generation prompt ends in "
                f"{prompt[-40:]!r}: a model would be asked something else than it was taught.",
                _WAY_OUT,
            )
        after = text[text.index(_PROBE[1]["content"], start) + len(_PROBE[1]["content"]) : end]
        if not self._token.search(after):
            raise MixtureError(
                f"The base's chat template ends an answer with {after!r}, which has no token to stop at: a model would "
                "never learn to end its turn.",
                _WAY_OUT,
            )
        self._check_tokens(text)

    def _check_tokens(self, text: str) -> None:
        [encoding] = self.tokenizer([text], add_special_tokens=False).encodings
        for token in self.tokenizer.all_special_tokens:
            if token in text and self.tokenizer.convert_tokens_to_ids(token) not in encoding.ids:
                raise MixtureError(
                    f"The chat template writes {token!r}, but the tokenizer does not read it as that special token "
                    f"(it reads {encoding.tokens}), so a model could not learn to end its turn.",
                    "Correct the base's tokenizer (the added token's `normalized` flag), or set model.chat_template.",
                )

    def _probe_images(self, token: str) -> None:
        """Find out how the template takes an image: as a part of the content, or as the image token in its text."""
        question = [{"role": "user", "content": f"{IMAGE}{_PROBE[0]['content']}"}, _PROBE[1]]
        for self._image_parts in (True, False):
            try:
                text, [(start, end)] = self.render(question, images=1)
            except (jinja2.TemplateError, MixtureError):
                continue
            if text[:start].count(token) == text.count(token) == 1 and _PROBE[1]["content"] in text[start:end]:
                return
        raise MixtureError(
            f"The base's chat template does not write its image token {token!r} for an image in a user turn.",
            "Use the chat template that was published with the base, or set model.chat_template to one that does.",
        )


def _after(text: str) -> str | None:
    """What follows the stand-in for an answer; None where it does not come out once."""
    _, found, after = text.partition(_SENTINEL)
    return after if found and _SENTINEL not in after else None


def _shared(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _parts(content: str, images: bool) -> list[dict[str, str]]:
    """A turn's content as a list of parts, each image marker an image part."""
    if not images:
        return [{"type": "text", "text": content}]
    found: list[dict[str, str]] = []
    for number, text in enumerate(content.split(IMAGE)):
        found += [{"type": "image"}] * bool(number) + [{"type": "text", "text": text}] * bool(text)
    return found
