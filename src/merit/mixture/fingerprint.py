"""What the source files hold, as one hash per dataset: so that a changed row is noticed before anything is computed from it.

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


def source_fingerprints(recipe: Recipe, memo: MutableMapping[str, str] | None = None) -> dict[str, str]:
    """SHA-256 (hex) of every dataset's source files, kept sets included; paths play no part.

    Args:
        recipe: The recipe.
        memo: Known file hashes by path, size and modification time; read and extended.

    Raises:
        MixtureError: A source is missing.
    """
    memo = {} if memo is None else memo
    found = {}
    for source in [*discover(recipe.mixture), *discover_kept(recipe.evaluate)]:
        parts = {"train": source.train, "test": source.test}
        content = {split: _content(part, recipe, memo) for split, part in parts.items() if part is not None}
        found[source.name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return found


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
