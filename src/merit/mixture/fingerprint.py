"""What the source files hold, as one hash: so that a changed row is noticed before anything is computed from it.

It hashes bytes and parses nothing. Hub datasets count by id, configuration and split: their content is checked by the
encoded rows' own fingerprints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import MutableMapping
from pathlib import Path

from merit.mixture.sources import Part, discover, discover_kept
from merit.recipe import Recipe


def source_fingerprint(recipe: Recipe, memo: MutableMapping[str, str] | None = None) -> str:
    """SHA-256 (hex) over every source file's content by dataset; paths play no part.

    Args:
        recipe: The recipe.
        memo: Known file hashes by path, size and modification time; read and extended.

    Raises:
        MixtureError: A source is missing.
    """
    memo = {} if memo is None else memo
    parts: list[tuple[str, str, Part | None]] = []
    for source in [*discover(recipe.mixture), *discover_kept(recipe.evaluate)]:
        parts += [(source.name, "train", source.train), (source.name, "test", source.test)]
    content = [(name, split, _content(part, recipe, memo)) for name, split, part in parts if part is not None]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _content(part: Part, recipe: Recipe, memo: MutableMapping[str, str]) -> object:
    if part.hub is not None:
        return part.hub
    files = part.files or tuple(Path(text) for text in (recipe.mixture.path, recipe.mixture.test) if text)
    return [_file_hash(file, memo) for file in files if file.is_file()]


def _file_hash(file: Path, memo: MutableMapping[str, str]) -> str:
    facts = file.stat()
    key = json.dumps([str(file.resolve()), facts.st_size, facts.st_mtime_ns])
    if key not in memo:
        with file.open("rb") as opened:
            memo[key] = hashlib.file_digest(opened, "sha256").hexdigest()
    return memo[key]
