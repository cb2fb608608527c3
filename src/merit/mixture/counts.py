"""What the mixture stage counts: one entry per dataset, in ``datasets.json`` and ``kept.json``. Nothing is counted here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from merit.errors import MixtureError


@dataclass
class DatasetCounts:
    """One entry of ``datasets.json``. Rows, tokens and target tokens count what is kept and used.

    Attributes:
        name: Dataset name.
        rows: Training rows used (0 for kept sets).
        rows_dropped: Rows looked at and left out, by reason.
        tokens: Tokens of the training rows.
        target_tokens: Of these, predicted in the loss: n_t.
        format: Row format recognised.
        path: Source of the training rows.
        source_rows: Rows in the source.
        rows_over_budget: Usable rows that the budget left out (not looked at further).
        rows_truncated: Used rows that were cut at max_length.
        images: Images of the rows used, each as often as it stands in a row.
        image_bytes: Bytes of those images that were embedded in the rows and lie in the stage's folder, each once.
        image_tokens: Tokens that stand for images (also in tokens).
        rows_answer_lost: Rows whose whole answer the tokenizer cannot represent (also in rows_dropped).
        characters_lost: Share of prompt, answer and all characters that the tokenizer cannot represent.
        characters_lost_most: The lost characters that occur most often.
        budget: Sample and token budget.
        answer_tokens: Quantiles of target tokens per row.
        test_path: Source of the test rows, if any; the ``test_`` fields say the same about them.
        test_rows_in_train: Test rows whose whole conversation is also a training row.
        test_answer_tokens: Quantiles of the last answer's tokens over test rows, end of turn included.
        fingerprint: Of the encoded training rows.
        test_fingerprint: Of the encoded test rows.
        warnings: What a person should know.
    """

    name: str
    rows: int = 0
    rows_dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    target_tokens: int = 0
    format: str = ""
    path: str = ""
    source_rows: int = 0
    rows_over_budget: int = 0
    rows_truncated: int = 0
    images: int = 0
    image_bytes: int = 0
    image_tokens: int = 0
    rows_answer_lost: int = 0
    characters_lost: dict[str, float] = field(default_factory=dict)
    characters_lost_most: str = ""
    budget: dict[str, int | None] = field(default_factory=dict)
    answer_tokens: dict[str, int] = field(default_factory=dict)
    test_path: str | None = None
    test_rows: int = 0
    test_rows_dropped: dict[str, int] = field(default_factory=dict)
    test_rows_truncated: int = 0
    test_images: int = 0
    test_tokens: int = 0
    test_target_tokens: int = 0
    test_rows_in_train: int = 0
    test_answer_tokens: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    test_fingerprint: str = ""
    warnings: list[str] = field(default_factory=list)


def read_counts(folder: Path, which: Literal["mixture", "kept"] = "mixture") -> list[dict[str, Any]]:
    """The entries of ``datasets.json`` or ``kept.json``.

    Raises:
        MixtureError: The file is missing or damaged.
    """
    path = folder / ("kept.json" if which == "kept" else "datasets.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MixtureError(f"{path} cannot be read: {error}.", "Run the mixture stage again.") from None
