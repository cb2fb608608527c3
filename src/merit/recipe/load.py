"""The recipe as a file: YAML and ``--set`` in, validated; resolved YAML out; errors that name the key.

What the settings are is :mod:`merit.recipe.schema`'s business. It reads no data and no model, and imports no ML library.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from merit.errors import RecipeError, nearest
from merit.recipe.methods import methods_of
from merit.recipe.schema import DatasetSettings, MixtureSettings, PrepareSettings, Recipe, Settings
from merit.recipe.suites import OWN_TASK


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, refusing duplicate keys in a block and reading 1e-5 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_MOST_VALUES = 1_000_000
"""Far more than any recipe has; a few lines of aliases to aliases can expand to billions."""

_UniqueKeyLoader.add_implicit_resolver(  # YAML 1.1 reads 1e-5 (no dot) as a string
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe; relative paths in it become absolute.

    Args:
        path: A YAML file.
        overrides: ``a.b=value`` strings; the value is read as YAML.

    Raises:
        RecipeError: The file is missing or not a YAML mapping, a key is unknown, or a value is invalid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist.", "`merit init` writes a commented starter recipe.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}.", "A recipe is a UTF-8 YAML file.") from None
    data = _parse_yaml(text, where=str(path))
    if not isinstance(data, dict):
        found = "it is empty" if data is None else "expected a YAML mapping (key: value)"
        raise RecipeError(f"{path} has no settings: {found}.", "`merit init` writes a commented starter recipe.")
    return parse_recipe(data, overrides, where=str(path), folder=path.resolve().parent)


def parse_recipe(
    data: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "recipe", folder: Path | None = None
) -> Recipe:
    """Validate a recipe given as a mapping; see :func:`load_recipe`. ``folder`` is where relative paths are looked up."""
    try:
        merged = json.loads(json.dumps(data, default=str))
    except (ValueError, TypeError, RecursionError) as error:
        raise RecipeError(f"{where} is not a plain mapping of settings: {str(error).splitlines()[0]}.") from None
    for override in overrides:
        _override(merged, override)
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(*_explain(error, where)) from None
    try:
        methods_of(recipe)
    except ValueError as error:
        raise RecipeError(f"{where}: study.methods: {error}.") from None
    return _resolve_paths(recipe, folder or Path.cwd())


def refuse_placeholders(recipe: Recipe) -> None:
    """Refuse what the starter recipe leaves open.

    Raises:
        RecipeError: A placeholder is left; the message names every one.
    """
    left = {"model.base": recipe.model.base, "mixture.folder": recipe.mixture.folder or ""}
    keys = [key for key, value in left.items() if Path(value).name.startswith("PATH_")]
    if keys:
        raise RecipeError(
            f"{recipe.name}: {' and '.join(keys)} still {'has' if len(keys) == 1 else 'have'} the starter recipe's "
            "placeholder.",
            "Set model.base to a checkpoint's folder or hub id, and mixture.folder to the folder of your datasets.",
        )


def changed(recipe: Recipe, changes: Iterable[tuple[str, Any]]) -> Recipe:
    """The recipe with other values at some keys (``train.epochs``), validated again.

    Raises:
        RecipeError: A value is invalid.
    """
    data = recipe.model_dump(mode="json")
    for key, value in changes:
        *path, last = key.split(".")
        block = data
        for part in path:
            block = block[part]
        block[last] = value
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        said = ", ".join(f"{key}={value}" for key, value in changes)
        raise RecipeError(*_explain(error, f"{recipe.name} with {said}")) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every setting, defaults included."""
    values = recipe.model_dump(mode="json")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    if yaml.safe_load(text) != values:  # some line separators survive only when escaped
        text = yaml.safe_dump(values, sort_keys=False, width=120)
    return text


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe (for editors)."""
    return Recipe.model_json_schema()


def _parse_yaml(text: str, where: str) -> Any:
    try:
        loader = _UniqueKeyLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if (values := _expanded(node, {})) > _MOST_VALUES:
            count = "infinitely many" if values == math.inf else f"{values:,}"
            raise RecipeError(
                f"{where} expands to {count} values once its anchors are followed; at most {_MOST_VALUES:,} are read.",
                "Write blocks out, or use fewer anchors (&a, *a).",
            )
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{where} is not valid YAML{place}: {getattr(error, 'problem', error)}.") from None
    except (ValueError, TypeError, RecursionError) as error:  # an invalid date, endlessly nested blocks
        raise RecipeError(f"{where} cannot be read as YAML: {str(error).splitlines()[0]}.") from None


def _expanded(node: yaml.Node, known: dict[int, float]) -> float:
    """Number of values of a block with every alias expanded; infinite if it contains itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # while it is open: an alias to it would never end
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise RecipeError(
            f"--set {override!r} is not of the form a.b=value.", "Example: --set train.learning_rate=2e-5"
        )
    node: Any = data
    for depth, part in enumerate(parts[:-1]):
        child = node[_item(node, part, override)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(child, dict | list):
            raise RecipeError(f"--set {override}: {'.'.join(parts[: depth + 1])} is a value, not a block.")
        node = child
    last = _item(node, parts[-1], override) if isinstance(node, list) else parts[-1]
    node[last] = _parse_yaml(value, where=f"--set {override}")


def _item(items: list[Any], part: str, override: str) -> int:
    """Index of a list's item: its number from 0, or its name."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = ", ".join(str(name) for name in names if name is not None) or f"0 to {len(items) - 1}"
    raise RecipeError(f"--set {override}: the list has no item {part!r}; it has {known}.")


_PLAINLY = {
    "string_pattern_mismatch": "a name may contain only A-Z, a-z, 0-9 and . _ + -, and must start with a letter or digit",
    "model_type": "must be a block of keys",
    "model_attributes_type": "must be a block of keys",
    "dict_type": "must be a block of keys",
    "list_type": "must be a list",
}
"""Pydantic's words for some kinds of errors in those of a recipe; Name is the only pattern."""


def _explain(error: ValidationError, where: str) -> list[str]:
    """One line per problem: where, what was expected, what was found, and the nearest right name."""
    problems: dict[str, str] = {}
    for item in error.errors():
        location = ".".join(str(part) for part in item["loc"] if not _is_union_label(part)) or "recipe"
        if item["type"] == "extra_forbidden":
            known = _fields_at(item["loc"][:-1])
            text = f"unknown key {location}.{nearest(str(item['loc'][-1]), known)}"
            text += f" Known here: {', '.join(known)}." if known else ""
        elif item["type"] == "missing":
            text = f"{location} is missing."
        else:
            found = json.dumps(item["input"], default=str)
            found = found if len(found) <= 80 else found[:77] + "..."
            message = _PLAINLY.get(item["type"]) or item["msg"].removeprefix("Value error, ")
            shown = "" if item["type"] == "value_error" else f"; found {found}"
            text = f"{location}: {message[0].lower() + message[1:]}{shown}."
            if item["type"] == "literal_error" and isinstance(item["input"], str):
                options = re.findall(r"'([^']+)'", str(item.get("ctx", {}).get("expected", "")))
                text += nearest(item["input"], options)
        problems[location] = f"{problems[location]} Or: {text}" if location in problems else text
    lines = list(problems.values())
    first = f"{where}: {lines[0]}" if len(lines) == 1 else f"{where}: {len(lines)} settings are wrong."
    return [
        first,
        *(lines if len(lines) > 1 else []),
        "`merit schema` lists every key; `merit init` writes a starter recipe.",
    ]


def _is_union_label(part: object) -> bool:
    """Pydantic adds the tried union member (such as ``literal['auto']`` or ``constrained-int``) to a location."""
    return isinstance(part, str) and bool(re.search(r"[\[\]()]|^constrained-|^(int|float|str|bool)$", part))


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    node: Any = Recipe
    for part in location:
        if isinstance(part, int) or _is_union_label(part):
            continue
        field = node.model_fields.get(part)
        if field is None:
            return []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        candidates += [inner for candidate in candidates for inner in getattr(candidate, "__args__", ())]
        blocks = [c for c in candidates if isinstance(c, type) and issubclass(c, Settings)]
        if not blocks:
            return []
        node = blocks[0]
    return list(node.model_fields)


_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


def is_hub_id(text: str) -> bool:
    """Whether a path in the recipe that does not exist can be a hub id."""
    return _HUB_ID.match(text) is not None


def locate(text: str, folder: Path) -> str:
    """Absolute path for a path in the recipe: next to it, else in the working directory; hub ids and built-ins stay.

    A path that does not exist and cannot be a hub id is returned as the absolute path next to the recipe, so that the
    error that follows names it.

    Raises:
        RecipeError: No path can be written like that.
    """
    if text.startswith("builtin:"):
        return text
    try:
        path = Path(text).expanduser()
        found = [root / path for root in (folder, Path.cwd()) if (root / path).exists()]
        if path.is_absolute():
            return str(path)
        return str(found[0].resolve()) if found else text if is_hub_id(text) else str((folder / path).resolve())
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, the home of nobody
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(f"The recipe names a path that cannot be one ({reason}): {text[:80]!r}.") from None


def _resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    def here(text: str | None) -> str | None:
        return None if text is None else locate(text, folder)

    def dataset(item: DatasetSettings) -> DatasetSettings:
        return item.model_copy(update={"path": here(item.path), "test": here(item.test), "images": here(item.images)})

    def datasets(mixture: MixtureSettings) -> MixtureSettings:
        return mixture.model_copy(
            update={
                "folder": here(mixture.folder),
                "path": here(mixture.path),
                "test": here(mixture.test),
                "datasets": mixture.datasets and [dataset(item) for item in mixture.datasets],
                "added": [dataset(item) for item in mixture.added],
                "images": mixture.images.model_copy(update={"folder": here(mixture.images.folder)}),
            }
        )

    def preparation(prepare: PrepareSettings) -> PrepareSettings:
        joined = prepare.assemble
        stages = [stage.model_copy(update={"mixture": datasets(stage.mixture)}) for stage in prepare.stages]
        assemble = joined and joined.model_copy(update={"vision_from": here(joined.vision_from)})
        return prepare.model_copy(update={"assemble": assemble, "stages": stages})

    evaluate = recipe.evaluate
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(
                update={"base": here(recipe.model.base), "chat_template": here(recipe.model.chat_template)}
            ),
            "prepare": recipe.prepare and preparation(recipe.prepare),
            "mixture": datasets(recipe.mixture),
            "conflict": recipe.conflict.model_copy(update={"cache": here(recipe.conflict.cache)}),
            "evaluate": evaluate.model_copy(
                update={
                    "kept_folder": here(evaluate.kept_folder),
                    "kept": [dataset(item) for item in evaluate.kept],
                    "unseen_folder": here(evaluate.unseen_folder),
                    "suites": [here(name) if name.endswith(OWN_TASK) else name for name in evaluate.suites],
                }
            ),
        }
    )
