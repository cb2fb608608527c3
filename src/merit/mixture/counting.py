"""What is counted of encoded rows: characters that were lost, answers that do not read back, lengths."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from merit.hf.rows import EncodedRow
from merit.mixture.chat import IMAGE, Chat
from merit.mixture.representable import CharacterInventory
from merit.mixture.result import DatasetCounts


def count_losses(
    counts: DatasetCounts, inventory: CharacterInventory, chats: Sequence[Chat], answers_lost: int
) -> None:
    """Enter the share of prompt, answer and all characters that the tokenizer cannot represent."""
    texts: dict[str, list[str]] = {"prompt": [], "answer": []}
    for chat in chats:
        for turn in chat.messages:
            text = turn["content"].replace(IMAGE, "") if chat.images or chat.raw else turn["content"]
            texts["answer" if turn["role"] == "assistant" else "prompt"].append(text)
    most: Counter[str] = Counter()
    totals: dict[str, tuple[int, int]] = {}
    for key, parts in texts.items():
        tally = inventory.count_lost(parts)
        most.update(tally)
        totals[key] = (sum(tally.values()), sum(map(len, parts)))
    totals["all"] = (sum(n for n, _ in totals.values()), sum(n for _, n in totals.values()))
    counts.characters_lost = {key: lost / total if total else 0.0 for key, (lost, total) in totals.items()}
    ranked = sorted(most.items(), key=lambda item: (-item[1], item[0]))
    counts.characters_lost_most = "".join(character for character, _ in ranked[:12])
    counts.rows_answer_lost = answers_lost


def not_read_back(inventory: CharacterInventory, rows: Sequence[EncodedRow], texts: Sequence[str]) -> int:
    """Rows whose target tokens do not stand for their answer.

    Args:
        inventory: What the tokenizer can represent.
        rows: Whole rows.
        texts: What the target tokens of each row's last answer read as.
    """
    return sum(_plain(inventory.kept(row.answer)) not in _plain(text) for row, text in zip(rows, texts, strict=True))


def _plain(text: str) -> str:
    """Letters without case, accents, white space and width: what survives any tokenizer's normalisation."""
    return "".join(
        c
        for c in unicodedata.normalize("NFKD", text).casefold()
        if unicodedata.category(c) not in ("Mn", "Cc", "Cf", "Zs")
    )


def conversation_key(chat: Chat) -> int:
    """Equal for equal conversations, images included."""
    turns = tuple((turn["role"], turn["content"]) for turn in chat.messages)
    return hash((turns, tuple(image.digest for image in chat.images)))


def quantiles(values: np.ndarray) -> dict[str, int]:
    """Median, 90 % and largest, each one of the values."""
    levels = {"p50": 0.5, "p90": 0.9, "max": 1.0}
    return {key: int(np.quantile(values, level, method="higher")) for key, level in levels.items()}


def listing(dropped: Mapping[str, int]) -> str:
    """Reasons and counts in words."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items())) or "no rows"
