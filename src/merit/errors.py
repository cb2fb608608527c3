"""What can go wrong, as one tree. It says how an error reads and which exit code it gets; it raises nothing itself.

::

    MeritError
    ├── UserError (also ValueError)   the user can fix it: one message, exit code 2, no traceback
    │   ├── RecipeError               the recipe, an override, or a command-line value
    │   ├── MixtureError              a dataset: its file, a row, its counts
    │   ├── CheckpointError           a model folder: missing, truncated, of another shape, not what it should be
    │   ├── RunFolderError            the run folder: stale, busy, incomplete
    │   ├── ConflictError             a gradient or a geometry that cannot be used (zero, non-finite)
    │   ├── TrainingError             training cannot go on (non-finite loss, nothing to train on)
    │   ├── MergeError                branches that cannot be merged
    │   └── ResourceError             disk, memory or device is not enough
    └── Interrupted                   stopped from outside; run the same command again to go on: exit code 75

Anything else that escapes is our bug: it keeps its traceback and exits with 1.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConflictError",
    "Interrupted",
    "MergeError",
    "MeritError",
    "MixtureError",
    "RecipeError",
    "ResourceError",
    "RunFolderError",
    "TrainingError",
    "UserError",
    "nearest",
]


class MeritError(Exception):
    """Root of every error that this package raises on purpose."""

    exit_code: int = 1


class UserError(MeritError, ValueError):
    """Something that the user can fix.

    Args:
        message: What is wrong and where, with expected and found values: one sentence or two.
        ways_out: One line each: what the user can do, and what was (not) written.
    """

    exit_code = 2

    def __init__(self, message: str, *ways_out: str) -> None:
        super().__init__(message, *ways_out)
        self.message = message
        self.ways_out = ways_out

    def __str__(self) -> str:
        return "\n  ".join((self.message, *self.ways_out))


class RecipeError(UserError):
    """The recipe, an override or a command-line value is wrong."""


class MixtureError(UserError):
    """A dataset of the mixture cannot be used as it is."""


class CheckpointError(UserError):
    """A model folder is missing, damaged, or not what it should be."""


class RunFolderError(UserError):
    """The run folder is stale, busy or incomplete."""


class ConflictError(UserError):
    """A dataset's gradient cannot be used (zero or non-finite), or the geometry has no room."""


class TrainingError(UserError):
    """Training cannot go on."""


class MergeError(UserError):
    """The branches cannot be merged."""


class ResourceError(UserError):
    """Disk, memory or device does not suffice."""


class Interrupted(MeritError):
    """Stopped by a signal after saving what was done; the same command goes on from there."""

    exit_code = 75


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return `` Did you mean 'x'?`` for the known word closest to ``word``, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
