"""The chat template at work: one conversation in, its text and the assistant's characters out.

Which characters are the assistant's:

1. A template with ``{% generation %}`` markers says so itself.
2. For a known family without markers TRL's training variant of the same template is used.
3. Otherwise the conversation is rendered turn by turn: what turn i adds to ``messages[:i]`` with the generation prompt is
   its text, end of turn included. A template whose output is not a growing prefix is refused.

Whatever the generation prompt already gives is prompt, not target, also where a template marks it. A probe conversation
checks all of this before the first row. It tokenises nothing but that probe.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from merit.errors import MixtureError
from merit.mixture.chat import IMAGE, Message

TemplateSource = Literal["generation markers", "training variant", "turn by turn"]
Span = tuple[int, int]

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE: list[Message] = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
_WAY_OUT = (
    "Set model.chat_template to a file with a template that has {% generation %} markers around the assistant's text and "
    "end-of-turn token."
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
        MixtureError: There is no template, it leaves out the assistant's text, or the tokenizer does not read its
            special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_token: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._image_token = image_token
        self._image_parts = True
        self.text, self.source = _training_template(tokenizer)
        self._parts = False  # content as a list of parts, as the templates of vision-language models want it
        self._given = ""  # what a marked turn repeats of the generation prompt
        self._probe()
        if self._image_token is not None:
            self._probe_images(self._image_token)

    def render(self, messages: list[Message], images: int = 0) -> tuple[str, list[Span]]:
        """Render a conversation.

        Args:
            messages: The turns.
            images: Number of images in it; where there are any, each :data:`merit.mixture.formats.IMAGE` stands for one and
                comes out as one image token.

        Returns:
            Its text, and one character span per assistant turn, in order.

        Raises:
            jinja2.TemplateError: The template refuses the conversation.
            MixtureError: The template does not tell the assistant's turns apart.
        """
        if self.source == "turn by turn":
            return self._turn_by_turn(messages, images)
        text, marked = self.apply(messages, markers=True, images=images)
        spans: list[Span] = []
        for start, end in marked:
            if spans and start == spans[-1][1]:
                spans[-1] = (spans[-1][0], end)  # text and end of turn in blocks of their own
            elif end > start:
                spans.append((start, end))
        turns = sum(turn["role"] == "assistant" for turn in messages)
        if len(spans) != turns:
            raise MixtureError(
                f"The base's chat template marks {len(spans)} stretches of text as the assistant's where the conversation "
                f"has {turns} assistant turns.",
                _WAY_OUT,
            )
        given = self._given
        return text, [(start + len(given) * text.startswith(given, start), end) for start, end in spans]

    def refusal(self, messages: list[Message], images: int = 0) -> str:
        """What the template says about a conversation that it refuses (for an error message)."""
        try:
            self.render(messages, images)
        except jinja2.TemplateError as error:
            return str(error)
        return "no reason given"

    def apply(
        self, messages: list[Message], *, prompt: bool = False, markers: bool = False, images: int = 0
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
                chat_template=self.text,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=markers,
                **dict[str, Any](self.tokenizer.special_tokens_map),
            )
        except TypeError as error:  # text and parts of a content do not add up
            raise jinja2.TemplateError(str(error)) from None
        texts, spans = rendered
        return texts[0], spans[0] if markers else []

    def _turn_by_turn(self, messages: list[Message], images: int = 0) -> tuple[str, list[Span]]:
        whole, _ = self.apply(messages, images=images)
        spans = []
        for index, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            before, _ = self.apply(messages[:index], prompt=True, images=images) if index else ("", [])
            upto, _ = self.apply(messages[: index + 1], images=images)
            if not (whole.startswith(upto) and upto.startswith(before)) or len(upto) == len(before):
                raise MixtureError(
                    "The base's chat template has no {% generation %} markers, and its text for the first turns changes "
                    f"when later turns follow (turn {index} of {len(messages)}), so the assistant's tokens cannot be "
                    "told apart.",
                    _WAY_OUT,
                )
            spans.append((len(before), len(upto)))
        return whole, spans

    def _probe(self) -> None:
        """Find out how the template wants its content, and check that answer and end of turn arrive as tokens."""
        problem = "it leaves out the assistant's text"
        for self._parts in (False, True):
            try:
                text, [(start, end)] = self.render(_PROBE)
                prompt, _ = self.apply(_PROBE[:1], prompt=True)
            except (jinja2.TemplateError, MixtureError) as error:
                if self._parts and isinstance(error, MixtureError):
                    raise
                problem = problem if self._parts else str(error)
                continue
            if _PROBE[1]["content"] in text[start:end]:
                break
        else:
            raise MixtureError(f"The base's chat template cannot render a question and an answer: {problem}.", _WAY_OUT)
        if prompt.startswith(text[:start]):
            pairs = zip(text[start:end], prompt[start:], strict=False)
            self._given = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
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


def _parts(content: str, images: bool) -> list[dict[str, str]]:
    """A turn's content as a list of parts, each image marker an image part."""
    if not images:
        return [{"type": "text", "text": content}]
    found: list[dict[str, str]] = []
    for number, text in enumerate(content.split(IMAGE)):
        found += [{"type": "image"}] * bool(number) + [{"type": "text", "text": text}] * bool(text)
    return found


def _training_template(tokenizer: PreTrainedTokenizerFast) -> tuple[str, TemplateSource]:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise MixtureError(
            "The base's tokenizer has no chat template.",
            "Set model.chat_template to a Jinja file, or use the package's default (merit.mixture.default_chat_template).",
        )
    if _MARKER.search(template):
        return template, "generation markers"
    from trl.chat_template_utils import get_training_chat_template

    try:
        variant = get_training_chat_template(tokenizer)
    except Exception:  # a template that TRL does not know, or that its probes make fail
        variant = None
    return (variant, "training variant") if variant else (template, "turn by turn")


def default_chat_template() -> str:
    """Text of the template for a base that has none (docs/mixture.md shows what it renders)."""
    return (Path(__file__).parent / "default_chat_template.jinja").read_text(encoding="utf-8")
