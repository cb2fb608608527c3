"""Everything in a checkpoint folder except its weights: config, tokenizer, processor, chat template, licence. Storage only.

These files come from other programs, so JSON is validated in one place (:func:`read_json`): an invalid file is a
:class:`merit.errors.CheckpointError` that names the file, what was expected and what was found.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from merit.errors import CheckpointError
from merit.files import write_json

CONFIG_FILES = ("config.json", "generation_config.json", "adapter_config.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken"),
)
"""Names and patterns; ``*.model`` are sentencepiece's (tokenizer.model, spiece.model, sentencepiece.bpe.model)."""
LICENCE_FILES = ("LICEN[SC]E*", "NOTICE*", "COPYING*", "COPYRIGHT*", "USE_POLICY*", "ACCEPTABLE_USE*")
"""Matched case-insensitively."""

DOWNLOADED = (
    *("*.json", "*.safetensors", "*.model", "*.spm", "*.tiktoken", "*.txt", "*.jinja", "*.py", "README.md"),
    *("[Ll][Ii][Cc][Ee][Nn][SsCc][Ee]*", "[Nn][Oo][Tt][Ii][Cc][Ee]*", "COPY*", "*USE_POLICY*"),
)
"""Patterns of the files downloaded for a hub id: weights and side files."""

Kinds = Mapping[str, type | tuple[type, ...] | list[type]]
"""Expected type by (dotted) key; ``[str]`` is a list of strings. A key that is absent or null is always valid."""

CONFIG: Kinds = {
    **{"model_type": str, "architectures": [str], "auto_map": dict, "quantization_config": dict},
    **{"text_config": dict, "text_config.max_position_embeddings": int, "max_position_embeddings": int},
    **{"vision_config": dict, "vision_config.model_type": str, "vision_config.patch_size": (int, list)},
    **{"vision_config.image_size": (int, list), "vision_feature_select_strategy": str, "scale_factor": int},
    **{"image_token_id": int, "image_token_index": int, "downsample_ratio": float, "mm_tokens_per_image": int},
    **{"tie_word_embeddings": bool, "text_config.tie_word_embeddings": bool},
}
PROCESSOR: Kinds = {
    **{"patch_size": int, "num_additional_image_tokens": int, "image_seq_len": int, "image_seq_length": int},
    **{"image_processor": dict},
}


def read_json(path: Path, kinds: Kinds | None = None) -> dict[str, Any]:
    """A JSON object that another program wrote.

    Args:
        path: The file.
        kinds: Expected types by dotted key.

    Raises:
        CheckpointError: It is missing, not JSON, not an object, or a value is of another type.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    return parse_json(text, str(path), kinds)


def parse_json(text: bytes, where: str, kinds: Kinds | None = None) -> dict[str, Any]:
    """Like :func:`read_json`, for bytes from ``where``; duplicate keys in an object are refused."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise CheckpointError(f"{where} is not valid JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not a JSON object but {_shown(value)}.")
    for key, kind in (kinds or {}).items():
        inner: Any = value
        for part in key.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        if inner is not None and not _is(inner, kind):
            raise CheckpointError(f"{where}: {key} is {_shown(inner)}, expected {_named(kind)}.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return result


def _is(value: object, kind: type | tuple[type, ...] | list[type]) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(isinstance(item, tuple(kind)) for item in value)
    wanted = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):
        return bool in wanted
    return isinstance(value, (*wanted, int) if float in wanted else wanted)


_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def _named(kind: type | tuple[type, ...] | list[type]) -> str:
    if isinstance(kind, list):
        return "a list of texts"
    return " or ".join(_WORDS[item] for item in (kind if isinstance(kind, tuple) else (kind,)))


def _shown(value: object) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= 60 else text[:57] + "..."


def reason(error: BaseException) -> str:
    """The first line of a library's error, or its class name if it has no message."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    unreachable = line.removeprefix("Got: ")  # huggingface_hub's way to say so
    return line if unreachable == line else f"the hub cannot be reached ({unreachable})"


# ---- what the files say --------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        CheckpointError: See :func:`read_json`.
    """
    return read_json(folder / "config.json", CONFIG)


def chat_template(folder: Path) -> str | None:
    """The folder's chat template, from its files only: chat_template.jinja, .json, or tokenizer_config.json's; else None.

    Of several named ones, the one named ``default``.

    Raises:
        CheckpointError: A file that should contain it is damaged.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}.") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = folder / name
        template = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(template, list):  # [{"name": ..., "template": ...}, ...]
            template = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
        if isinstance(template, dict):
            template = template.get("default")
        if template is not None:
            if not isinstance(template, str):
                raise CheckpointError(f"{file}: chat_template is {_shown(template)}, expected a text.")
            return template
    return None


def set_config_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config of the same model with its weights in another dtype, in every block that names one.

    Args:
        config: A config.json.
        dtype: PyTorch's name, such as ``float32``.
    """
    return {**_with_dtype(config, dtype), "dtype": dtype}


def _with_dtype(block: dict[str, Any], dtype: str) -> dict[str, Any]:
    changed = {
        key: _with_dtype(value, dtype) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in block.items()
        if key not in ("dtype", "torch_dtype")
    }
    return changed | ({"dtype": dtype} if "dtype" in block or "torch_dtype" in block else {})


# ---- which files there are -----------------------------------------------------------------------------------------


def side_files(folder: Path) -> dict[str, Path]:
    """Config, tokenizer, processor and chat template files that exist, by sorted name inside the folder."""
    return _matching(folder, (*CONFIG_FILES, *TOKENIZER_FILES, *PROCESSOR_FILES, *TEMPLATE_FILES))


def input_files(folder: Path) -> dict[str, Path]:
    """Those of :func:`side_files` that turn rows into model inputs: tokenizer, processor and chat template."""
    return _matching(folder, (*TOKENIZER_FILES, *PROCESSOR_FILES, *TEMPLATE_FILES))


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files, without its chat template."""
    return _matching(folder, TOKENIZER_FILES)


def processor_files(folder: Path) -> dict[str, Path]:
    """The image processor's and processor's files."""
    return _matching(folder, PROCESSOR_FILES)


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy the base's side files, licences and code (``*.py``) into ``target``, and return their names.

    config.json comes last, so that a half-copied folder does not load.
    """
    licences = {p.name: p for p in source.iterdir() if p.is_file() and _licence(p.name)}
    files = {**side_files(source), **_matching(source, ("*.py",)), **licences}
    return copy_files(dict(sorted(files.items(), key=lambda item: (item[0] == "config.json", item[0]))), target)


def copy_files(files: Mapping[str, Path], target: Path) -> list[str]:
    """Copy files under their names into ``target``, in order; return the names."""
    for name, path in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
    return list(files)


def edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Set keys of a JSON object in a file; None removes one."""
    value = {**read_json(path), **changes}
    write_json(path, {key: item for key, item in value.items() if not (key in changes and item is None)})


def _licence(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.upper(), pattern) for pattern in LICENCE_FILES)


def _matching(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    found = {p for pattern in patterns for p in folder.glob(pattern) if p.is_file()}
    return {p.relative_to(folder).as_posix(): p for p in sorted(found)}
