"""Encoding throughput: rows per CPU second from chats to token ids and targets, against the tokenizer alone.

    python -m benchmarks.mixture.run --base CHECKPOINT --mixture FOLDER [--rows 100] [--rounds 3]

All contestants get the same chats (the first rows of every training file) and one thread, interleaved round after round;
figures are medians of the process's CPU time. Ours starts cold in every round: it learns again which characters the
tokenizer loses. The floor is the tokenizer on texts rendered beforehand: no encoder that tokenises every row can be
faster. The peer is transformers' ``apply_chat_template`` with its assistant mask, row by row, as trainers call it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from benchmarks.report import table, write

from merit.hf.base import open_base
from merit.hf.rows import EncodedRow
from merit.mixture import find_datasets
from merit.mixture.chat import Chat
from merit.mixture.encode import ChatEncoder
from merit.mixture.sources import Source
from merit.recipe.load import parse_recipe
from merit.recipe.schema import Recipe


def read(sources: Sequence[Source], rows: int) -> list[Chat]:
    """The first ``rows`` chats of every dataset."""
    chats = []
    for source in sources:
        assert source.train is not None
        found = source.train.chats(source.format_of(source.train), rows)
        chats += [chat for _, chat in found if isinstance(chat, Chat)]
    return chats


def peer(tokenizer: Any, template: str, chats: Sequence[Chat]) -> list[tuple[list[int], list[int]]]:
    """Token ids and assistant mask of every row, as transformers gives them."""
    found = []
    for chat in chats:
        encoded = tokenizer.apply_chat_template(
            chat.messages,
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        found.append((encoded["input_ids"], encoded["assistant_masks"]))
    return found


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure(recipe: Recipe, rows: int, rounds: int) -> tuple[str, dict[str, Any]]:
    """The table's text and the figures behind it."""
    tokenizer = open_base(recipe.model).tokenizer
    sources = find_datasets(recipe.mixture).sources
    chats = read(sources, rows)
    encoder = ChatEncoder(tokenizer, 10**9)
    if encoder.template.source == "turn by turn":
        raise SystemExit("The base's template marks no assistant text, so transformers has no mask to compare with.")
    texts = [encoder.template.apply(chat.messages)[0] for chat in chats]
    contestants: dict[str, Callable[[], Any]] = {
        "reading files into chats": lambda: read(sources, rows),
        "merit, chats to ids and targets": lambda: ChatEncoder(tokenizer, 10**9).encode(chats),
        "transformers, apply_chat_template with mask": lambda: peer(tokenizer, encoder.template.text, chats),
        "tokenizer alone, texts rendered beforehand": lambda: tokenizer(texts, add_special_tokens=False, verbose=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, work in contestants.items():
            taken, results[name] = timed(work)
            seconds[name].append(taken)
    ours, theirs = (results[name] for name in list(contestants)[1:3])
    both = [(a, *b, text) for a, b, text in zip(ours, theirs, texts, strict=True) if isinstance(a, EncodedRow)]
    same_ids = [(row, mask, text) for row, ids, mask, text in both if row.input_ids.tolist() == ids]
    other = [text for row, mask, text in same_ids if not np.array_equal(row.targets, np.array(mask, bool))]
    facts = {
        "datasets": len(sources),
        "rows": len(chats),
        "rows_dropped": len(chats) - len(both),
        "tokens": sum(len(row.input_ids) for row, *_ in both),
        "target_tokens": sum(int(row.targets.sum()) for row, *_ in both),
        "rows_with_other_ids": len(both) - len(same_ids),
        "rows_with_other_targets": len(other),
        "of_these_with_dropped_characters": sum(bool(encoder.inventory.dropped(text)) for text in other),
        "cpu_seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
    }
    floor = statistics.median(seconds["tokenizer alone, texts rendered beforehand"])
    lines = []
    for name, values in seconds.items():
        middle = statistics.median(values)
        lines.append((name, f"{middle:.2f}", f"{len(chats) / middle:,.0f}", f"{middle / floor:.2f}"))
    body = (
        f"{facts['rows']:,} rows of {facts['datasets']} datasets: {facts['tokens']:,} tokens, "
        f"{facts['target_tokens']:,} of them targets; medians of {rounds} rounds, one thread.\n\n"
        + table(("work", "CPU s", "rows per CPU s", "time over the tokenizer's"), lines)
        + f"\n\nBoth encode {len(both):,} rows ({facts['rows_dropped']:,} are dropped by merit alone: the tokenizer loses "
        f"their whole answer). {facts['rows_with_other_ids']:,} have other ids than transformers gives, because prompt and "
        f"answer are tokenised apart where one token would join them. {len(other):,} have the same ids and other targets; "
        f"{facts['of_these_with_dropped_characters']:,} of these hold characters that the tokenizer drops, which shifts "
        "transformers' mask (docs/mixture.md, Targets).\n"
    )
    return body, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="checkpoint folder")
    parser.add_argument("--mixture", required=True, help="folder with one sub-folder per dataset")
    parser.add_argument("--rows", type=int, default=100, help="rows per dataset")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    settings = {"name": "b", "model": {"base": given.base}, "mixture": {"folder": given.mixture}}
    body, facts = measure(parse_recipe(settings, folder=Path.cwd()), given.rows, given.rounds)
    sizes = f"--rows {given.rows} --rounds {given.rounds}"
    command = f"python -m benchmarks.mixture.run --base CHECKPOINT --mixture FOLDER {sizes}"
    print(write("mixture", "Encoding throughput", command, body, facts))


if __name__ == "__main__":
    main()
