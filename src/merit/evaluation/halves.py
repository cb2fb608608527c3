"""Held-out rows in two halves: one chooses, the other reports. Pure: rows in, row numbers out.

A row belongs to a half by its content and a seed, not by its place: equal rows, also of different datasets, are always in
the same half, so that what was chosen on a row is never reported on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merit.hf.rows import EncodedRow
from merit.mixture import EncodedDataset

__all__ = ["Halves", "halve", "halves_of", "row_digest"]


@dataclass(frozen=True)
class Halves:
    """Row numbers by dataset, in increasing order."""

    choosing: Mapping[str, list[int]]
    reporting: Mapping[str, list[int]]


def row_digest(row: EncodedRow, seed: int) -> bytes:
    """A hash of what the model sees of a row: tokens, targets and images."""
    digest = hashlib.sha256(f"half\0{seed}\0".encode())
    digest.update(row.input_ids.astype("<i4").tobytes() + b"\0" + row.targets.astype(bool).tobytes())
    digest.update("\0".join(image.digest for image in row.images).encode())
    return digest.digest()


def halve(datasets: Mapping[str, Sequence[EncodedRow]], seed: int) -> Halves:
    """Cut every dataset in two as evenly as equal rows allow; the result does not depend on the order of datasets or rows.

    Args:
        datasets: Rows by dataset.
        seed: Decides who is in which half.
    """
    side: dict[bytes, bool] = {}
    chosen: dict[str, list[int]] = {}
    others: dict[str, list[int]] = {}
    for name in sorted(datasets):
        places: dict[bytes, list[int]] = {}
        for i in range(len(datasets[name])):
            places.setdefault(row_digest(datasets[name][i], seed), []).append(i)
        counts = {
            half: sum(len(rows) for key, rows in places.items() if side.get(key) is half) for half in (True, False)
        }
        for key in sorted(places.keys() - side.keys()):
            side[key] = counts[True] <= counts[False]
            counts[side[key]] += len(places[key])
        chosen[name] = sorted(i for key, rows in places.items() if side[key] for i in rows)
        others[name] = sorted(i for key, rows in places.items() if not side[key] for i in rows)
    return Halves({name: chosen[name] for name in datasets}, {name: others[name] for name in datasets})


def halves_of(test: Mapping[str, EncodedDataset], kept: Mapping[str, EncodedDataset], seed: int) -> dict[str, Halves]:
    """Choosing and reporting rows of the ``test`` and the ``kept`` sets; equal rows of both are in the same half."""
    parts = {"test": test, "kept": kept}
    both = halve({f"{part}/{name}": rows for part, sets in parts.items() for name, rows in sets.items()}, seed)  # type: ignore[misc]

    def of(part: str, half: Mapping[str, list[int]]) -> dict[str, list[int]]:
        return {name: half[f"{part}/{name}"] for name in parts[part]}

    return {part: Halves(of(part, both.choosing), of(part, both.reporting)) for part in parts}
