"""A study's answer in a few plain sentences. Pure: comparisons in, text out.

A method is said to do better only if it does in every seed, and of at least three: fewer seeds are about these runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from merit.evaluation.calls import MIN_SEEDS
from merit.study.figures import Column, Difference, Place

__all__ = ["SMALL", "judge_study"]

SMALL = 7_000_000_000
"""Parameters below which small models are said to favour mixing (arXiv 2601.21115: mixing wins at 2B, merging at 7B)."""
_WORDS: dict[Column, tuple[str, str]] = {
    "learned": ("learned more", "learned less"),
    "kept": ("kept more", "kept less"),
    "drift": ("drifted less from the base", "drifted further from the base"),
    "unseen": ("did better on unseen tasks", "did worse on unseen tasks"),
}

Find = Callable[[str, Column, Place], Difference | None]


def judge_study(find: Find, own: str, baseline: str, seeds: int, parameters: int) -> tuple[str, ...]:
    """Sentences, the answer first.

    Args:
        find: Looks up the comparison of a method, a column and a place with the baseline.
        own: The recipe's own method.
        baseline: What it is compared with.
        seeds: How many were run.
        parameters: Size of the base.
    """
    if own == baseline:
        return (f"{own} is its own baseline: nothing is compared with it.",)
    about = f"over {seeds} seeds" if seeds >= MIN_SEEDS else f"in these runs ({seeds} of {MIN_SEEDS} seeds) only"
    ended = _said(find, own, "end", seeds)
    equal = _said(find, own, "equal", seeds)
    if not ended:
        return (f"Nothing was measured that {own} and {baseline} could be compared by.",)
    first = f"{own} against {baseline}, {about}: it {_joined(ended)}"
    first += f"; at equal learning, it {_joined(equal)}." if equal else "; at equal learning, they were not compared."
    cautions = [
        f"A difference is called only if all {seeds} seeds agree; "
        f"the smallest p that a one-sided Wilcoxon test over {seeds} seeds can give is {2.0**-seeds:.2g}."
        if seeds >= MIN_SEEDS
        else f"Fewer than {MIN_SEEDS} seeds: nothing follows about the methods."
    ]
    if parameters < SMALL:
        cautions.append(
            f"The base has {parameters:,} parameters: small models favour mixing over merging (arXiv 2601.21115 finds "
            "mixing ahead at 2B and merging at 7B)."
        )
    return (first, *cautions)


def _said(find: Find, own: str, place: Place, seeds: int) -> list[str]:
    said = []
    for column, (better, worse) in _WORDS.items():
        item = find(own, column, place)
        if item is None or (column == "drift" and find(own, "kept", place) is not None):
            continue  # drift stands in where there are no kept sets
        short = f" (only {item.seeds} of {seeds} seeds reach that loss)" if item.seeds < seeds else ""
        figure = f"{item.mean:+.3f} nats/token{short}"
        if item.wins == seeds:
            said.append(f"{better} ({figure})")
        elif item.losses == seeds:
            said.append(f"{worse} ({figure})")
        else:
            said.append(f"{better} in {item.wins} of {item.seeds} seeds, which is no clear difference ({figure})")
    return said


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
