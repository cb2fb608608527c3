"""Where a dataset that came later belongs: its score on the axes of the first split, against the medians of the first split.

The first split centred the columns of the cosine matrix (raw_pca: of the Gram matrix) and projected its rows on principal
axes. A later dataset has such a row, too: its products with the same datasets. Pure NumPy in float64.

Source: paper §4 steps 3-4 for the axes and cuts; placing a later dataset is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from merit.files import read_as, write_json
from merit.split.components import principal_components

FILE = "axes.json"
"""Next to ``split.json``, once a dataset was added or removed."""


@dataclass(frozen=True)
class FirstSplit:
    """What is kept of a first split, to place datasets that come later.

    Attributes:
        names: Its datasets, T.
        means: (T,) column means of its matrix.
        axes: r principal axes of T entries each.
        cuts: Per axis, for each part that it cut (by the sides on the axes before): the score between its two sides.
        signs: Per axis, 1 where the upper side has the higher scores, else -1.
    """

    names: list[str]
    means: list[float]
    axes: list[list[float]]
    cuts: list[list[float]]
    signs: list[int]

    @classmethod
    def of(cls, names: Sequence[str], matrix: np.ndarray, groups: Sequence[Sequence[str]]) -> Self:
        """Axes, means and cuts of a split.

        Args:
            names: Datasets whose matrix was projected, T.
            matrix: (T, T) cosines or inner products.
            groups: The 2^r groups that it made, in order; datasets that are not in ``names`` play no part.
        """
        count = (len(groups) - 1).bit_length()
        found = principal_components(matrix, count)
        place = {name: i for i, name in enumerate(names)}
        members = [[place[name] for name in group if name in place] for group in groups]
        cuts, signs = [], []
        for axis in range(count):
            wide = len(groups) >> (axis + 1)  # groups on each side
            starts = range(0, len(groups), 2 * wide)
            low = [[i for g in members[s : s + wide] for i in g] for s in starts]
            high = [[i for g in members[s + wide : s + 2 * wide] for i in g] for s in starts]
            scores = found.scores[:, axis]
            gap = sum(float(scores[h].mean() - scores[m].mean()) for m, h in zip(low, high, strict=True))
            sign = 1 if gap >= 0 else -1
            pairs = [(sign * scores[m], sign * scores[h]) for m, h in zip(low, high, strict=True)]
            cuts.append([float(mine.max() + other.min()) / 2 for mine, other in pairs])
            signs.append(sign)
        return cls(list(names), matrix.mean(axis=0).tolist(), found.axes.T.tolist(), cuts, signs)

    def scores(self, row: Mapping[str, float]) -> list[float]:
        """Scores of a dataset on the axes, oriented as the cuts are.

        Args:
            row: Its products with the first split's datasets; those that are gone are left out of the sum.
        """
        known = [i for i, name in enumerate(self.names) if name in row]
        centred = np.array([row[self.names[i]] - self.means[i] for i in known], dtype=np.float64)
        return [sign * float(centred @ np.array(axis)[known]) for sign, axis in zip(self.signs, self.axes, strict=True)]

    def place(self, scores: Sequence[float]) -> int:
        """The group on whose side of every cut the scores are."""
        part = 0
        for axis, score in enumerate(scores):
            part = 2 * part + (score > self.cuts[axis][part])
        return part

    def save(self, folder: Path) -> None:
        """Write ``axes.json``."""
        write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``axes.json``.

        Raises:
            RunFolderError: It is missing or damaged.
        """
        return read_as(folder / FILE, cls)


def read_first(folder: Path) -> FirstSplit | None:
    """The first split that a split's folder remembers, if any."""
    return FirstSplit.load(folder) if (folder / FILE).is_file() else None
