"""The keys of rows and turns: which are used, which are counted as ignored, which are refused; weights, tools, calls.

docs/mixture.md has the same as one table.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from merit.mixture.chat import BadRow

USED = {
    "messages": {"messages", "system", "tools"},
    "sharegpt": {"conversations", "system", "tools"},
    "prompt_completion": {"prompt", "completion", "system", "tools"},
    "alpaca": {"instruction", "input", "output", "system", "history"},
    "flan": {"inputs", "targets", "system"},
    "cauldron": {"texts", "system"},
}
"""Columns that a row format uses; ``images`` and ``image`` belong to all."""

_EVERYWHERE = {"images", "image"}
_TURN = {
    "role",
    "from",
    "content",
    "value",
    "weight",
    "train",
    "tool_calls",
    "reasoning_content",
    "name",
    "tool_call_id",
}
_PASSED_ON = ("reasoning_content", "name", "tool_call_id")
_REFUSED = ("video", "videos", "audio", "audios")
MATTERS = {
    *("weight", "train", "loss", "labels", "label_mask", "loss_mask", "mask", "chosen", "rejected"),
    *("thinking", "reasoning", "reasoning_content", "tools", "tool_calls", "functions", "function_call", "history"),
    *("system", "instruction", "input", "<image>", "<video>", "<audio>"),
}
"""Keys that change what is trained in data sets that have them: ignored ones are worth a warning."""


def ignored_columns(row: Mapping[str, Any], row_format: str) -> Iterator[str]:
    """Columns of a row that have content and are not used.

    Raises:
        BadRow: video_refused: it has a video or audio, without which its text means something else.
    """
    for key in row.keys() - USED[row_format] - _EVERYWHERE:
        if row[key] is None:
            continue
        if key in _REFUSED and row[key] not in ("", []):
            raise BadRow("video_refused", f"{key}: video and audio cannot be used; only text and images can")
        yield key


def ignored_in_turn(item: Mapping[str, Any], role: str) -> Iterator[str]:
    """Keys of a turn that have content and are not used."""
    for key in item.keys() - _TURN:
        if item[key] is not None:
            yield key
    if role != "assistant":
        yield from (key for key in ("weight", "train") if item.get(key) is not None)


def trained(item: Mapping[str, Any], where: str) -> bool:
    """Whether a turn is a target: ``weight`` 0 or ``train`` false say no.

    Raises:
        BadRow: turn_weight: another weight than 0 or 1.
    """
    for key in ("weight", "train"):
        value = item.get(key)
        if value is not None and value not in (0, 1):
            raise BadRow("turn_weight", f"{where} has {key} {value!r}; a turn is trained (1) or not (0)")
        if value is not None and not value:
            return False
    return True


def extras(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the chat template is given of a turn besides role and content.

    Raises:
        BadRow: tool_calls: they are not a list of calls.
    """
    found = {key: item[key] for key in _PASSED_ON if item.get(key) is not None and item[key] != ""}
    calls = _parsed(item.get("tool_calls"))
    if calls:
        if not isinstance(calls, list):
            raise BadRow("tool_calls", f"{where}: tool_calls must be a list of calls; found {calls!r:.60}")
        found["tool_calls"] = [call(entry, where) for entry in calls]
    return found


def call(entry: object, where: str) -> dict[str, Any]:
    """One call in the form that chat templates read: arguments as an object.

    Raises:
        BadRow: tool_calls: it names no function.
    """
    entry = _parsed(entry)
    function = entry.get("function", entry) if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow("tool_calls", f"{where}: a tool call must name a function; found {entry!r:.60}")
    arguments = _parsed(function.get("arguments"))
    made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return made | ({"id": entry["id"]} if entry.get("id") is not None else {})


def tools(value: object) -> tuple[dict[str, Any], ...]:
    """The functions that a row's ``tools`` column describes, as chat templates read them.

    Raises:
        BadRow: tools: it is not a list of objects.
    """
    value = _parsed(value)
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(_parsed(item), Mapping) for item in value):
        raise BadRow("tools", f"tools must be a list of function descriptions; found {value!r:.60}")
    described = [_without_null(_parsed(item)) for item in value]
    return tuple(item if "function" in item else {"type": "function", "function": item} for item in described)


def _parsed(value: object) -> Any:  # noqa: ANN401  a JSON value
    """A JSON text's value; other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _without_null(value: Any) -> Any:  # noqa: ANN401  a JSON value; files of columns fill absent fields with null
    if isinstance(value, Mapping):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
