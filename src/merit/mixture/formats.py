"""Row formats: recognise the four common ones and turn a row into one chat form.

It covers ``messages``, ``prompt_completion``, ``alpaca`` and ``sharegpt`` rows. It reads no file, knows no tokenizer,
and says only what is wrong with a row (:class:`BadRow`), never where it stands; the caller knows that.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from merit.errors import nearest
from merit.images import ImageRef

RowFormat = Literal["messages", "prompt_completion", "alpaca", "sharegpt"]
Message = dict[str, str]

IMAGE = "\ufffc"
"""Stands in a turn's content where an image stands (Unicode's object replacement character)."""

COLUMNS: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
"""The columns that a format must have. Where a row fits several, the first here is taken."""

_ROLES: dict[RowFormat, dict[str, str]] = {
    "messages": {"system": "system", "user": "user", "assistant": "assistant"},
    "sharegpt": {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "assistant": "assistant",
    },
}


_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Chat:
    """One row in the one form that everything after this uses.

    Attributes:
        messages: ``{"role": "system" | "user" | "assistant", "content": text}`` in order; the last is the assistant's.
        first_target: Assistant turns before this message index are context, not targets (a list-valued ``prompt``).
        images: The row's images; the i-th ``IMAGE`` of all contents, in order, stands for the i-th. A row without images
            keeps an ``IMAGE`` that is part of its text.
    """

    messages: list[Message]
    first_target: int = 0
    images: tuple[ImageRef, ...] = ()


class BadRow(Exception):
    """A row that cannot be used.

    Attributes:
        reason: Key under which dropped rows are counted.
        detail: What is wrong, for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def recognise(columns: Iterable[str]) -> RowFormat | None:
    """The format that a file with these columns has, or None."""
    present = set(columns)
    return next((name for name, needed in COLUMNS.items() if present.issuperset(needed)), None)


def describe_formats(columns: Iterable[str]) -> str:
    """One sentence for an error: the columns found, those expected, and the nearest right name."""
    found = sorted(columns)
    known = [column for needed in COLUMNS.values() for column in needed]
    hints = "".join(dict.fromkeys(hint for column in found if (hint := nearest(column, known))))
    expected = "; ".join(f"{name}: {' + '.join(needed)}" for name, needed in COLUMNS.items())
    return f"found columns {found}; expected those of one format ({expected}).{hints}"


def to_chat(row: Mapping[str, Any], row_format: RowFormat) -> Chat:
    """Turn one row into a chat.

    Alpaca rows are joined as ``instruction``, or ``instruction + "\\n\\n" + input`` where there is an input. A prompt
    that is a list of messages is context: only the completion's assistant turns are targets. Turns after the last
    assistant turn are cut off, an empty system turn is left out.

    Raises:
        BadRow: no_assistant_turn, unknown_role, not_text, empty_answer, empty_prompt.
    """
    if row_format == "alpaca":
        question = _text(row.get("instruction"), "instruction")
        extra = row.get("input")
        if extra is not None and _text(extra, "input").strip():
            question = f"{question}\n\n{extra}" if question.strip() else extra
        return _checked([_turn("user", question), _turn("assistant", _text(row.get("output"), "output"))])
    if row_format == "prompt_completion":
        prompt, completion = row.get("prompt"), row.get("completion")
        before = _turns(prompt, "messages", "prompt") if _is_list(prompt) else [_turn("user", _text(prompt, "prompt"))]
        after = (
            _turns(completion, "messages", "completion")
            if _is_list(completion)
            else [_turn("assistant", _text(completion, "completion"))]
        )
        if not any(turn["role"] == "assistant" for turn in after):
            raise BadRow("no_assistant_turn", "the completion has no assistant turn")
        before = [turn for turn in before if turn["role"] != "system" or turn["content"].strip()]
        return _checked(before + after, first_target=len(before))
    column = COLUMNS[row_format][0]
    return _checked(_turns(row.get(column), row_format, column))


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        found = "null or missing" if value is None else f"{type(value).__name__} {_shown(value)}"
        raise BadRow("not_text", f"{where} must be text; found {found}")
    refuse_surrogates(value, where)
    return value


def refuse_surrogates(text: str, where: str) -> None:
    """Half of a surrogate pair (a cut emoji in JSON) is no character: no tokenizer and no file takes it.

    Raises:
        BadRow: ``text`` has one.
    """
    if not text.isascii() and (found := _SURROGATE.search(text)):
        raise BadRow(
            "not_text",
            f"{where} holds half of a surrogate pair ({found.group()!r} at character {found.start() + 1}), "
            "which is no character",
        )


def _content(value: Any, where: str) -> str:
    """The text of a turn; a list of text parts is joined."""
    if not isinstance(value, list):
        return _text(value, where)
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind != "text":
            found = f"a part of type {kind!r}" if kind is not None else _shown(part)
            raise BadRow("not_text", f"{where}, part {index}, must be a text part (type 'text'); found {found}")
        texts.append(_text(part.get("text"), f"{where}, part {index},"))
    return "".join(texts)


def _turns(value: Any, row_format: RowFormat, where: str) -> list[Message]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # a CSV cell holds a list as JSON
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
        turns.append(_turn(roles[role], _content(content, f"the content of {where}[{index}] ({role})")))
    return turns


def _checked(turns: list[Message], first_target: int = 0) -> Chat:
    last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if last < first_target:
        roles = [turn["role"] for turn in turns]
        raise BadRow("no_assistant_turn", f"no assistant turn to learn from; roles found: {roles}")
    kept: list[Message] = []
    for index, turn in enumerate(turns[: last + 1]):
        if not turn["content"].strip():
            if turn["role"] == "system":
                first_target -= index < first_target
                continue
            reason = "empty_answer" if turn["role"] == "assistant" else "empty_prompt"
            raise BadRow(reason, f"turn {index} ({turn['role']}) has no text")
        kept.append(turn)
    return Chat(kept, first_target)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
