"""A split, as used by the later stages, and its file ``split.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from merit.files import read_as, write_json


@dataclass(frozen=True)
class Split:
    """A split and notes about it; ``split.json`` has the same keys.

    Attributes:
        method: Its name in ``METHODS``.
        axes: r; the method made 2^r groups (0 for joint).
        balance: What the weights count: samples or tokens.
        groups: Dataset names per group, sorted within each group.
        weights: Total weight per group.
        left_out: Datasets of the mixture that are missing from the geometry, sorted.
        warnings: Plain sentences: imbalance, a dominating dataset, ties, duplicates.
        stability: Per dataset, the share of resampled geometries in which it lands in its group; None if
            its noise is unknown. None altogether if no gradients were used.
        open: Datasets whose group is uncertain: a stability under 0.9 or unknown, or a tie decided by names; sorted.
    """

    method: str
    axes: int
    balance: str
    groups: list[list[str]]
    weights: list[float]
    left_out: list[str]
    warnings: list[str]
    stability: dict[str, float | None] | None
    open: list[str]

    def save(self, folder: Path) -> None:
        """Write ``split.json``."""
        write_json(folder / "split.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``split.json``.

        Raises:
            RunFolderError: It is missing or damaged.
        """
        return read_as(folder / "split.json", cls)
