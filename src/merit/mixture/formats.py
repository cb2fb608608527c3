"""Row formats: recognise the common ones and turn a row into one chat form, its images in their places.

It covers ``messages``, ``prompt_completion``, ``alpaca``, ``flan``, ``sharegpt`` (LLaVA's form too) and ``cauldron`` rows.
It reads no file, opens no image, knows no tokenizer, and says only what is wrong with a row (:class:`BadRow`); the caller
knows where it is.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from merit.errors import nearest
from merit.mixture import keys
from merit.mixture.chat import IMAGE, BadRow, Chat, Message, RawImage
from merit.mixture.images import raw_image, row_images
from merit.progress import count

RowFormat = Literal["messages", "prompt_completion", "alpaca", "flan", "sharegpt", "cauldron"]
PLACEHOLDER = "<image>"
"""Marks the place of an image in a row's text."""

COLUMNS: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "cauldron": ("texts", "images"),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "flan": ("inputs", "targets"),
}
"""The columns that a format must have. A row that fits several formats is read as the first of them."""

_ROLES: dict[RowFormat, dict[str, str]] = {
    "messages": {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"},
    "sharegpt": {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "assistant": "assistant",
        "function_call": "assistant",
        "observation": "tool",
        "tool": "tool",
    },
}

_SURROGATE = re.compile("[\ud800-\udfff]")
# LLaVA's own code removes the placeholder and white space and writes the placeholder and its own line end: the line
# end between a turn's text and a placeholder at its edge belongs to the placeholder, and chat templates write their own.
_LEADING = re.compile(rf"(?:{PLACEHOLDER}\n?)+")
_TRAILING = re.compile(rf"(?:\n?{PLACEHOLDER})+\Z")


def recognise(columns: Iterable[str]) -> RowFormat | None:
    """The format that a file with these columns has, or None."""
    present = set(columns)
    return next((name for name, needed in COLUMNS.items() if present.issuperset(needed)), None)


def describe_formats(columns: Iterable[str]) -> str:
    """For an error: the columns found, those expected, the nearest right name, and how to name others."""
    found = sorted(columns)
    known = [column for needed in COLUMNS.values() for column in needed]
    hints = "".join(dict.fromkeys(hint for column in found if (hint := nearest(column, known, 0.75))))
    expected = "; ".join(f"{name}: {' + '.join(needed)}" for name, needed in COLUMNS.items())
    names = "columns: {prompt: question, response: answer}"
    return (
        f"found columns {found}; expected those of one format ({expected}).{hints} Columns of other names are named in the "
        f"recipe, as mixture.{names} for all datasets or {names} next to a dataset's path."
    )


def to_chat(row: object, row_format: RowFormat) -> Chat:
    """Turn one row into a chat.

    Alpaca rows are joined as ``instruction``, or ``instruction + "\\n\\n" + input`` where there is an input. A prompt
    that is a list of messages is context: only the completion's assistant turns are targets. Turns after the last
    assistant turn are cut off with their images, an empty system turn is left out.

    Images stand where an image part or, in rows without such parts, a ``<image>`` in the text says; images without a
    place go before the text of the first user turn. docs/mixture.md shows each form.

    Raises:
        BadRow: no_assistant_turn, unknown_role, not_text, empty_answer, empty_prompt, turn_weight, tools, tool_calls,
            system_twice, video_refused; image_count, image_turn,
            image_missing, image_format, image_url, image_damaged.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not_text", f"a row must be an object with named columns; found {row!r:.60}")
    first_target = 0
    if row_format == "alpaca":
        question = _text(row.get("instruction"), "instruction")
        extra = row.get("input")
        if extra is not None and _text(extra, "input").strip():
            question = f"{question}\n\n{extra}" if question.strip() else extra
        turns = [
            *_history(row.get("history")),
            _Turn("user", [question]),
            _Turn("assistant", [_text(row.get("output"), "output")]),
        ]
    elif row_format == "flan":
        turns = [
            _Turn(role, [_text(row.get(key), key)]) for role, key in (("user", "inputs"), ("assistant", "targets"))
        ]
    elif row_format == "prompt_completion":
        prompt, completion = row.get("prompt"), row.get("completion")
        before = (
            _turns(prompt, "messages", "prompt") if _is_list(prompt) else [_Turn("user", [_text(prompt, "prompt")])]
        )
        after = (
            _turns(completion, "messages", "completion")
            if _is_list(completion)
            else [_Turn("assistant", [_text(completion, "completion")])]
        )
        if not any(turn.role == "assistant" for turn in after):
            raise BadRow("no_assistant_turn", "the completion has no assistant turn")
        turns, first_target = before + after, len(before)
    elif row_format == "cauldron":
        turns = _pairs(row.get("texts"))
    else:
        column = COLUMNS[row_format][0]
        turns = _turns(row.get(column), row_format, column)
    if (system := row.get("system")) is not None and _text(system, "system").strip():
        first_target += _with_system(turns, system)
    raw = _place(turns, row)
    ignored = {key for turn in turns for key in turn.ignored} | set(keys.ignored_columns(row, row_format))
    if not raw:
        asked = [turn.content() for turn in turns if turn.role != "assistant"]
        ignored |= {word for word in (PLACEHOLDER, "<video>", "<audio>") if any(word in text for text in asked)}
    chat = _checked(turns, first_target, raw)
    tools = keys.tools(row.get("tools"))
    return replace(chat, tools=tools, ignored=frozenset(ignored)) if tools or ignored else chat


def _with_system(turns: list[_Turn], system: str) -> int:
    """Put a row's ``system`` column first, unless its turns already begin with it; returns the number of turns added."""
    if not turns or turns[0].role != "system":
        turns.insert(0, _Turn("system", [system]))
        return 1
    if turns[0].content() not in ("", system):
        raise BadRow("system_twice", "the row has a system column and a system turn with another text")
    turns[0].pieces = [system]
    return 0


def _history(value: object) -> list[_Turn]:
    """Alpaca's earlier turns: pairs of question and answer."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if value is None or value == "":
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        raise BadRow("not_text", f"history must be a list of pairs of question and answer; found {_shown(value)}")
    return [
        _Turn(role, [_text(text, f"history[{index}]")])
        for index, pair in enumerate(value)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


@dataclass
class _Slot:
    """A place for an image; ``image`` is None until one is bound to it."""

    image: RawImage | None = None


@dataclass
class _Turn:
    role: str
    pieces: list[str | _Slot]
    trained: bool = True
    extras: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def content(self) -> str:
        return "".join(piece if isinstance(piece, str) else IMAGE for piece in self.pieces)

    def slots(self) -> list[_Slot]:
        return [piece for piece in self.pieces if isinstance(piece, _Slot)]

    def split_text(self) -> None:
        """Turn every ``<image>`` in the text into a place."""
        text = "".join(piece for piece in self.pieces if isinstance(piece, str))
        for pattern in (_LEADING, _TRAILING):
            if found := (pattern.match(text) if pattern is _LEADING else pattern.search(text)):
                bare = PLACEHOLDER * found.group().count(PLACEHOLDER)
                text = text[: found.start()] + bare + text[found.end() :]
        first, *rest = text.split(PLACEHOLDER)
        self.pieces = [first, *(piece for part in rest for piece in (_Slot(), part))]


def _place(turns: list[_Turn], row: Mapping[str, Any]) -> tuple[RawImage, ...]:
    """Bind the row's images to their places in its turns; returns them in order."""
    own, named = row_images(row)
    slots = [slot for turn in turns for slot in turn.slots()]
    if not slots and named:
        for turn in turns:
            if turn.role != "assistant" and PLACEHOLDER in turn.content():
                turn.split_text()
        slots = [slot for turn in turns for slot in turn.slots()]
        first = next((turn for turn in turns if turn.role == "user"), None)
        if own and not slots and first is not None:
            first.pieces[:0] = slots = [_Slot() for _ in own]
    free = [slot for slot in slots if slot.image is None]
    if len(free) != len(own):
        raise BadRow(
            "image_count",
            f"the row has {count(len(own), 'image')} and {count(len(free), 'place')} for them ({PLACEHOLDER} in the "
            "text, or parts of type 'image' that name no image)",
        )
    for slot, image in zip(free, own, strict=True):
        slot.image = image
    if not slots:
        return ()
    for turn in turns:
        if turn.slots() and turn.role != "user":
            raise BadRow("image_turn", f"an image is in the {turn.role}'s turn; only the user's turns can have images")
        turn.pieces = [piece.replace(IMAGE, "") if isinstance(piece, str) else piece for piece in turn.pieces]
    return tuple(slot.image for slot in slots if slot.image is not None)


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        found = "null or missing" if value is None else f"{type(value).__name__} {_shown(value)}"
        raise BadRow("not_text", f"{where} must be text; found {found}")
    refuse_surrogates(value, where)
    return value


def refuse_surrogates(text: str, where: str) -> None:
    """Half of a surrogate pair (a cut emoji in JSON) is not a character: neither tokenizers nor files accept it.

    Raises:
        BadRow: ``text`` has one.
    """
    if not text.isascii() and (found := _SURROGATE.search(text)):
        raise BadRow(
            "not_text",
            f"{where} contains half of a surrogate pair ({found.group()!r} at character {found.start() + 1}), "
            "which is not a character",
        )


def _content(value: object, where: str) -> list[str | _Slot]:
    """A turn's text, or its text and image parts in order."""
    if not isinstance(value, list):
        return [_text(value, where)]
    pieces: list[str | _Slot] = []
    for index, part in enumerate(value):
        at = f"{where}, part {index},"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and kind == "text":
            pieces.append(_text(part.get("text"), at))
        elif isinstance(part, Mapping) and kind in ("image", "image_url"):
            given = [part[key] for key in ("image", "image_url", "path", "url") if part.get(key) is not None]
            inner = given[0].get("url") if given and isinstance(given[0], Mapping) and "url" in given[0] else None
            pieces.append(_Slot(raw_image(inner or given[0], at) if given else None))
        else:
            found = f"a part of type {kind!r}" if kind is not None else _shown(part)
            raise BadRow(
                "not_text", f"{at} must be a text or image part (type 'text', 'image' or 'image_url'); found {found}"
            )
    return pieces


def _pairs(value: object) -> list[_Turn]:
    """The Cauldron's ``texts``: questions and answers in turn."""
    if not isinstance(value, list):
        raise BadRow("not_text", f"texts must be a list of user and assistant texts; found {_shown(value)}")
    turns = []
    for index, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise BadRow("not_text", f"texts[{index}] must have a user and an assistant text; found {_shown(item)}")
        pair = [_Turn(role, [_text(item.get(role), f"texts[{index}].{role}")]) for role in ("user", "assistant")]
        pair[0].ignored = tuple(
            f"texts[].{key}" for key in item.keys() - {"user", "assistant"} if item[key] is not None
        )
        turns += pair
    return turns


def _turns(value: object, row_format: RowFormat, where: str) -> list[_Turn]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # in a CSV cell a list is written as JSON
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list):
        found = "null or missing" if value is None else f"{type(value).__name__} {_shown(value)}"
        raise BadRow("not_text", f"{where} must be a list of turns; found {found}")
    roles, turns = _ROLES[row_format], []
    for index, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise BadRow("not_text", f"{where}[{index}] must be one turn (role and text); found {_shown(item)}")
        role = item.get("from") if item.get("from") is not None else item.get("role")
        if not isinstance(role, str) or role not in roles:
            hint = nearest(role, list(roles)) if isinstance(role, str) else ""
            raise BadRow("unknown_role", f"{where}[{index}] has role {role!r}; known: {', '.join(roles)}.{hint}")
        content = item.get("value") if item.get("value") is not None else item.get("content")
        at = f"{where}[{index}] ({role})"
        extras = keys.extras(item, at)
        if role == "function_call":
            extras, content = {**extras, "tool_calls": [keys.call(content, at)]}, ""
        if content is None and extras.get("tool_calls"):
            content = ""
        turns.append(
            _Turn(
                roles[role],
                _content(content, f"the content of {at}"),
                roles[role] != "assistant" or keys.trained(item, at),
                extras,
                tuple(f"{where}[].{key}" for key in keys.ignored_in_turn(item, roles[role])),
            )
        )
    return turns


def _checked(turns: list[_Turn], first_target: int, raw: tuple[RawImage, ...]) -> Chat:
    learned = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
    last = max(learned, default=-1)
    if last < first_target:
        roles = [turn.role for turn in turns]
        raise BadRow("no_assistant_turn", f"no assistant turn to learn from; roles found: {roles}")
    kept: list[Message] = []
    untrained = set()
    for index, turn in enumerate(turns[: last + 1]):
        content = turn.content()
        if not content.strip() and not turn.extras.get("tool_calls") and turn.role != "tool":
            if turn.role == "system":
                first_target -= index < first_target
                continue
            reason = "empty_answer" if turn.role == "assistant" else "empty_prompt"
            raise BadRow(reason, f"turn {index} ({turn.role}) has no text")
        if not turn.trained:
            untrained.add(len(kept))
        kept.append({"role": turn.role, "content": content, **turn.extras})
    placed = sum(turn["content"].count(IMAGE) for turn in kept) if raw else 0
    return Chat(kept, first_target, raw=raw[:placed], untrained=frozenset(untrained))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
