"""What every diagnostic hands on: a verdict by a stated rule, the reason, figures with units, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from merit.files import read_as, write_json

__all__ = ["FILE", "VERDICTS", "Diagnosis", "Verdict", "graded"]

Verdict = Literal["ready", "doubtful", "not ready"]
VERDICTS: tuple[Verdict, ...] = ("ready", "doubtful", "not ready")
FILE = "result.json"


@dataclass(frozen=True)
class Diagnosis:
    """A diagnostic's result; each diagnostic extends it by its figures.

    Attributes:
        verdict: By ``rule``.
        reason: The figures that decided, with units.
    """

    name: ClassVar[str]
    """As on the command line and in files."""
    title: ClassVar[str]
    """What is looked at, in a few words."""
    rule: ClassVar[str]
    """When the verdict is ready, when doubtful; not ready otherwise."""
    units: ClassVar[Mapping[str, str]]
    """Unit of every figure that has one, by field."""

    verdict: Verdict
    reason: str

    def facts(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        head = {"diagnostic": self.name, "title": self.title, "rule": self.rule, "units": dict(self.units)}
        return {**head, **asdict(self)}

    def save(self, folder: Path) -> None:
        """Write ``result.json``."""
        write_json(folder / FILE, self.facts())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            RunFolderError: The file is missing or damaged.
        """
        return read_as(folder / FILE, cls)


def graded(value: float, ready: float, doubtful: float) -> Verdict:
    """The verdict on a figure of which less is better: up to ``ready``, up to ``doubtful``, above (or not a number)."""
    return "ready" if value <= ready else "doubtful" if value <= doubtful else "not ready"
