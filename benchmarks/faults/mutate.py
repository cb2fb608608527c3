"""One change to a valid value: of JSON kind (objects, lists, texts, numbers), or to the bytes of a file."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

DEEP = 100_000


def _nested(depth: int, *, lists: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if lists else {"a": value}
    return value


def pool() -> list[Any]:
    """Values that stand where another is expected."""
    texts = [
        "",
        " ",
        "x" * 5000,
        "../../x",
        "/",
        "a\0b",
        "\ud800",
        "\u2028",
        "\ufeff",
        "<image>",
        "{{",
        "é" * 300,
        "NaN",
        "1",
    ]
    numbers = [-1, 0, 1, 7, 2**31, 2**63, -(2**64), 10**30, 10**320, 0.5, -0.0, 1e308, float("nan"), float("inf")]
    return [
        *(None, True, False, *texts, *numbers, [], {}, [[]], [None], [{}], {"": 0}, {"a": None}, {"type": "image"}),
        *([1, "a", None], ["a", "a"], ["*"], _nested(60, lists=True), _nested(60, lists=False), list(range(300))),
    ]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a value, itself aside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: list[tuple[Any, ...]] = []
    for key, item in items:
        found += [(*path, key), *places(item, (*path, key))]
    return found


def mutate(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy with one change, and what it is."""
    value = copy.deepcopy(value)
    found = places(value)
    if not found:
        return rng.choice(pool()), "replaced"
    path = rng.choice(found)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, old = path[-1], holder[path[-1]]
    what = rng.choice(("replace", "replace", "replace", "drop", "wrap", "twice", "rename", "unknown", "type", "swap"))
    name = ".".join(map(str, path))
    if what == "drop":
        del holder[key]
    elif what == "wrap":
        holder[key] = rng.choice(([old], {"value": old}, [old, old]))
    elif what == "twice" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(old))
    elif what == "rename" and isinstance(holder, dict):
        holder[rng.choice((key + "x", key.upper(), key[:-1], "", key + " "))] = holder.pop(key)
    elif what == "unknown" and isinstance(old, dict):
        old[rng.choice(("unknown", "type", "images", "__class__"))] = rng.choice(pool())
    elif what == "type":
        holder[key] = str(old) if not isinstance(old, str) else rng.choice((1, 1.5, [old], None, True))
    elif what == "swap":
        other = value
        for step in rng.choice(found):
            other = other[step]
        holder[key] = copy.deepcopy(other)
    else:
        what = "replace"
        holder[key] = rng.choice(pool())
    return value, f"{what} {name}"


def encode(value: Any) -> bytes:
    """JSON as others may write it: NaN and half characters included."""
    return json.dumps(value).encode()


def deep(text: bytes, rng: random.Random) -> bytes:
    """JSON text with something 100,000 deep in place of one value, or of all."""
    nest = rng.choice((b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP + b"1" + b"}" * DEEP, b"[" * DEEP))
    place = text.find(b": ", rng.randrange(len(text)))
    return nest if place < 0 or rng.random() < 0.3 else text[: place + 2] + nest + text[place + 2 :]


def spoil(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Change the bytes of a file in one place."""
    what = rng.choice(("bit", "byte", "cut", "twice", "insert", "start", "end", "empty", "line"))
    place = rng.randrange(len(data)) if data else 0
    lines = data.splitlines(keepends=True)
    return {
        "bit": data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :] if data else b"x",
        "byte": data[:place] + rng.choice((b"\0", b"\xff", b'"', b"{", b"\t", b"\r", b"\\", b"9")) + data[place + 1 :],
        "cut": data[:place],
        "twice": data + data,
        "insert": data[:place]
        + rng.choice((b"\n", b"\0\0", b"\xed\xa0\x80", b"1e999", b"[", b"}", b"\\ud800"))
        + data[place:],
        "start": rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n", b"#", b"%YAML 9.9\n---\n", b"\x1f\x8b\x08")) + data,
        "end": data + rng.choice((b"\n---\nname: x\n", b"\0", b"{", b"]", b"\x80")),
        "empty": b"",
        "line": b"".join(lines[:1] * 2 + lines[2:]),
    }[what], f"{what} at {place}"
