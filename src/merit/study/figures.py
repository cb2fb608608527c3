"""The figures of a study, typed, and its file. No maths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from merit.errors import RunFolderError
from merit.evaluation.figures import Part
from merit.evaluation.results import Evaluation
from merit.files import checksum, read_as, read_json, sealed, write_json

__all__ = [
    *("COLUMNS", "FILE", "PART_COLUMNS", "Column", "Difference", "Line", "Place", "Point", "Run", "StudyResult"),
    *("Surgery", "columns_of", "is_better_high", "values_of"),
]

Column = str
"""One of `COLUMNS`, or a benchmark's: its task and metric (`merit.evaluation.suites.headline`)."""
COLUMNS: tuple[Column, ...] = ("learned", "kept", "unseen", "learned_match", "kept_match", "unseen_match", "drift")
"""Macro losses (nats per target token) on the mixture's test rows, the kept and the unseen sets; exact matches on the same;
drift from the base (nats per token)."""
PART_COLUMNS: dict[str, tuple[Column, Column]] = {
    "mixture": ("learned", "learned_match"),
    "kept": ("kept", "kept_match"),
    "unseen": ("unseen", "unseen_match"),
}
"""Columns of loss and exact match of each part of the evaluation."""


def values_of(evaluation: Evaluation, name: str) -> dict[Column, float]:
    """The columns that an evaluation measured for a model."""
    averages = evaluation.summary.macro[name]
    found: dict[Column, float] = {}
    for part in evaluation.sets:
        average, (loss, match) = averages.of(part), PART_COLUMNS[part]
        if average is not None:
            found[loss] = average.loss
            if average.exact_match is not None:
                found[match] = average.exact_match
    if averages.drift is not None:
        found["drift"] = averages.drift.kl
    return found


def is_better_high(column: Column) -> bool:
    """Whether more is better: exact matches and benchmark scores; losses and drift are better low."""
    return column not in COLUMNS or column.endswith("_match")


def columns_of(values: Iterable[Iterable[Column]]) -> tuple[Column, ...]:
    """Columns that any run has: `COLUMNS` first, then the benchmarks in the order in which they were met."""
    found = dict.fromkeys(column for one in values for column in one)
    return (*(column for column in COLUMNS if column in found), *(c for c in found if c not in COLUMNS))


Place = Literal["end", "equal"]
"""Where two methods are compared: as they ended, or at the own method's learned loss, along their lines."""
FILE = "study.json"


@dataclass(frozen=True)
class Point:
    """One λ of a line: macro loss by part."""

    scale: float
    losses: dict[Part, float]


@dataclass(frozen=True)
class Line:
    """A model's line θ0 + λ(θ̄ − θ0).

    Attributes:
        points: By rising λ.
        displacement: ‖θ̄ − θ0‖₂.
    """

    points: tuple[Point, ...]
    displacement: float

    def save(self, folder: Path) -> None:
        """Write ``folder/line.json``."""
        write_json(folder / "line.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Line:
        """Read what :meth:`save` wrote.

        Raises:
            RunFolderError: It is missing or damaged.
        """
        return read_as(folder / "line.json", cls)


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes:
        method: Its name.
        seed: Its seed.
        values: By column; what was not measured is missing.
        target_tokens: Target tokens that its branches were trained on, together.
        tokens: All tokens of these rows.
        scale: λ of its merge.
        line: Losses along its line; None for the base and for methods that lie on another's line.
    """

    method: str
    seed: int
    values: dict[Column, float]
    target_tokens: int
    tokens: int
    scale: float = 1.0
    line: Line | None = None


@dataclass(frozen=True)
class Difference:
    """A method minus the baseline, paired by seed.

    Attributes:
        method: Its name.
        column: What is compared.
        place: Where.
        mean: Mean difference.
        ci95: Its 95 % bootstrap interval over seeds; None with fewer than two.
        p: One-sided Wilcoxon signed-rank p for "the method is better".
        p_holm: Corrected for all methods and columns of the same place.
        seeds: Seeds that have both.
        wins: Seeds in which the method is better.
        losses: Seeds in which it is worse.
    """

    method: str
    column: Column
    place: Place
    mean: float
    ci95: tuple[float, float] | None
    p: float
    p_holm: float
    seeds: int
    wins: int
    losses: int


@dataclass(frozen=True)
class Surgery:
    """What gradient surgery takes at every step over all datasets of a mixture (paper §5, A.1.3).

    Attributes:
        datasets: T.
        parameters: P, trained.
        backward: Backward passes, T.
        projections: Pairs of gradients, T (T - 1) / 2.
        bytes: Of T gradients in half precision.
    """

    datasets: int
    parameters: int
    backward: int
    projections: int
    bytes: int


@dataclass(frozen=True)
class StudyResult:
    """A finished study.

    Attributes:
        name: The recipe's.
        own: The recipe's own method.
        baseline: What the others are paired with.
        seeds: The seeds.
        methods: In the order of the table.
        runs: Every method with every seed.
        differences: All comparisons with the baseline.
        verdict: Sentences, the answer first.
        parameters: Size of the base.
        surgery: What gradient surgery costs here, if the study has any.
    """

    name: str
    own: str
    baseline: str
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    runs: tuple[Run, ...]
    differences: tuple[Difference, ...]
    verdict: tuple[str, ...]
    parameters: int
    surgery: Surgery | None = None
    format: int = 1

    def of(self, method: str) -> tuple[Run, ...]:
        """One method's runs by seed."""
        return tuple(run for run in self.runs if run.method == method)

    def columns(self) -> tuple[Column, ...]:
        """Columns that were measured."""
        return columns_of(run.values for run in self.runs)

    def difference(self, method: str, column: Column, place: Place) -> Difference | None:
        """One comparison with the baseline; None if it could not be made."""
        wanted = (method, column, place)
        return next((item for item in self.differences if (item.method, item.column, item.place) == wanted), None)

    def save(self, folder: Path) -> None:
        """Write ``folder/study.json``."""
        write_json(folder / FILE, sealed(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> StudyResult:
        """Read what :meth:`save` wrote.

        Raises:
            RunFolderError: It is missing or damaged.
        """
        path = folder / FILE
        found, value = read_as(path, cls), read_json(path)
        if "checksum" in value and value["checksum"] != checksum(value):  # 0.2 wrote none
            raise RunFolderError(
                f"{path} is damaged: its content does not match its checksum.", "Run the same `merit study` again."
            )
        return found
