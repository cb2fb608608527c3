"""How many rows of each dataset an epoch has: ``repeat`` and the mixing temperature; and which rows those are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from merit.mixture.calibration import draw
from merit.mixture.found import Found
from merit.mixture.result import DatasetCounts


def shares(found: Found, counts: Sequence[DatasetCounts]) -> dict[int, int]:
    """Training rows per epoch of the datasets that do not keep theirs, by place in ``counts``.

    With n_i the rows of dataset i within its budget and r_i its ``repeat``, a dataset gets n_i r_i rows. A temperature T
    other than 1 shares their total N out again: N (n_i r_i)^(1/T) / sum_j (n_j r_j)^(1/T). Both rounded, at least 1.
    Source (temperature): Raffel et al. 2020, section 3.5.2, without their artificial limit, which is ``samples`` here.
    """
    repeat = {source.name: source.repeat for source in found.sources}
    rows = np.array([item.rows * repeat[item.name] for item in counts], dtype=np.float64)
    if found.settings.temperature != 1.0:
        weights = rows ** (1.0 / found.settings.temperature)
        rows = rows.sum() * weights / weights.sum()
    wanted = np.maximum(np.rint(rows), 1).astype(np.int64).tolist()
    return {place: n for place, (item, n) in enumerate(zip(counts, wanted, strict=True)) if n != item.rows}


def repeated(rows: int, wanted: int, seed: int, name: str) -> list[int]:
    """Every row as often as it fits into ``wanted``, and a seeded draw of the rest once more, each round in source order."""
    rounds, rest = divmod(wanted, rows)
    return [*list(range(rows)) * rounds, *sorted(draw(rows, rest, seed, name, "repeat").tolist())]
