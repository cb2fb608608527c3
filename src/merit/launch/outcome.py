"""How a worker process ended, in a small JSON file: ``ok``, or its error's class, message, ways out and exit code."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from merit import errors
from merit.errors import MeritError, RunFolderError, UserError
from merit.files import read_sealed, write_sealed


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        ok: Whether it succeeded.
        error: Class name of its error.
        message: What was wrong.
        ways_out: What the user can do about it.
        exit_code: The process's.
    """

    ok: bool = True
    error: str = ""
    message: str = ""
    ways_out: tuple[str, ...] = ()
    exit_code: int = 0

    @classmethod
    def of(cls, error: BaseException) -> Outcome:
        """The outcome of a command that raised this."""
        name, code = type(error).__name__, getattr(error, "exit_code", 1)
        if isinstance(error, UserError):
            return cls(False, name, error.message, error.ways_out, code)
        return cls(False, name, str(error), (), code)

    def save(self, path: Path) -> None:
        """Write it."""
        write_sealed(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Outcome | None:
        """Read it; None if it is missing or damaged."""
        with contextlib.suppress(RunFolderError):
            return read_sealed(path, cls)
        return None

    def user_error(self, whose: str) -> MeritError | None:
        """The error as it was raised, with ``whose`` prefixed to its message; None unless the user can fix it."""
        kind = getattr(errors, self.error, None) if self.error in errors.__all__ else None
        if not (isinstance(kind, type) and issubclass(kind, UserError)):
            return None
        return kind(f"{whose}: {self.message}", *self.ways_out)


def own_outcome(path: Path) -> Path:
    """Where this process writes its outcome: each of several processes has its own file."""
    return outcome_of(path, int(os.environ.get("RANK", "0")))


def outcome_of(path: Path, rank: int) -> Path:
    """Where process ``rank`` of a command writes its outcome."""
    return path.with_suffix(f".{rank}{path.suffix}") if rank else path
