"""The reference pages of the site, written from the code: every recipe key from the schema, every command from itself."""

from __future__ import annotations

import re
import types
import typing
from typing import Any

import click
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.cli import get_docs_for_click

from merit.cli.commands import app
from merit.recipe.schema import Recipe


def recipe_page() -> str:
    """Every key of a recipe: type, default, meaning; a block per section."""
    lines = [
        "# Recipe reference",
        "",
        "Written from the schema by `scripts/write_reference.py`; `merit schema` prints the same as JSON schema. Every key "
        "can be set on the command line: `--set train.learning_rate=2e-5`. Unknown keys are refused with the nearest known "
        "one.",
        "",
    ]
    lines += _block("Top level", "", Recipe, set())
    return "\n".join(lines).rstrip() + "\n"


def _block(title: str, prefix: str, model: type[BaseModel], seen: set[type[BaseModel]]) -> list[str]:
    lines = [f"## {title}", "", *([_words(model.__doc__), ""] if model.__doc__ else [])]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        nested = _model_in(field.annotation)
        key = f"{prefix}{name}"
        if nested is not None:
            inner.append((f"{key}[]" if _is_list(field.annotation) else key, nested))
        kind = f"[block](#{_anchor(inner[-1][0])})" if nested else _type(field.annotation, field.metadata)
        lines.append(f"| `{name}` | {kind} | {_default(field)} | {_words(field.description)} |")
    lines.append("")
    for key, nested in inner:
        if nested in seen:
            lines += [f"## `{key}`", "", f"The same keys as any other `{nested.__name__}` block above.", ""]
            continue
        seen.add(nested)
        lines += _block(f"`{key}`", f"{key}.", nested, seen)
    return lines


def _anchor(key: str) -> str:
    return re.sub(r"[^\w-]", "", key.lower())


def _model_in(kind: Any) -> type[BaseModel] | None:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((found for inner in typing.get_args(kind) if (found := _model_in(inner))), None)


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is list or any(_is_list(inner) for inner in typing.get_args(kind))


def _type(kind: Any, metadata: typing.Sequence[Any] = ()) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _type(inner[0], [part for item in inner[1:] for part in getattr(item, "metadata", [item])])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(item) if item is not type(None) else "null" for item in inner))
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin in (dict, typing.Mapping):
        return f"{_type(inner[0])} → {_type(inner[1])}" if len(_type(inner[0])) < 60 else f"name → {_type(inner[1])}"
    if origin is tuple:
        return ", ".join(_type(item) for item in inner)
    plain = {
        "str": "text",
        "int": "integer",
        "float": "number",
        "bool": "true, false",
        "NoneType": "null",
        "Any": "any",
    }
    name = getattr(kind, "__name__", str(kind))
    return plain.get(name, name) + _bounds(metadata)


def _bounds(metadata: typing.Sequence[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{sign} {getattr(item, key):g}" for item in metadata for key, sign in signs.items() if hasattr(item, key)]
    return f" {', '.join(found)}" if found else ""


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return ""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text else '`""`'


def _words(text: str | None) -> str:
    return re.sub(r"``([^`]+)``", r"`\1`", " ".join((text or "").split())).replace("|", "\\|")


def cli_page() -> str:
    """Every command with its options, as `--help` says them."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=click.Context(command), name="merit", title="Command line reference")
    for name, found in getattr(command, "commands", {}).items():  # Typer cuts them at 45 characters
        text = re.sub(rf"(?m)^\* `{name}`: .*$", f"* `{name}`: {found.get_short_help_str(300)}", text)
    text = "\n".join(line.rstrip() for line in text.splitlines())
    note = (
        "Written from the commands themselves by `scripts/write_reference.py`; `merit COMMAND --help` says the same.\n"
    )
    return text.replace("\n\n", f"\n\n{note}\n", 1).rstrip() + "\n"


PAGES = {"recipe.md": recipe_page, "cli.md": cli_page}
