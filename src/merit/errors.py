"""The error tree: how an error reads and which exit code it gets. Nothing is raised here.

::

    MeritError
    ├── UserError (also ValueError)   the user can fix it: one message, exit code 2, no traceback
    │   ├── RecipeError               the recipe, an override, or a command-line value
    │   ├── MixtureError              a dataset: its file, a row, its counts
    │   ├── CheckpointError           a model folder: missing, truncated, wrong shape, not what it should be
    │   ├── RunFolderError            the run folder: stale, busy, incomplete
    │   ├── ConflictError             a gradient or a geometry that cannot be used (zero, non-finite)
    │   ├── TrainingError             training cannot continue (non-finite loss, nothing to train on)
    │   ├── MergeError                branches that cannot be merged
    │   └── ResourceError             not enough disk, memory or device
    └── Interrupted                   stopped from outside; run the same command again to resume: exit code 75

Any other exception is our bug: it keeps its traceback and exits with 1.
"""

from __future__ import annotations

import difflib
from unicodedata import category

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
    "install_hint",
    "nearest",
    "visible",
]


class MeritError(Exception):
    """Root of every error that this package raises on purpose."""

    exit_code: int = 1


class UserError(MeritError, ValueError):
    """Something that the user can fix.

    Args:
        message: What is wrong and where, with expected and found values: one or two sentences.
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
    """A dataset's gradient (zero or non-finite) or the geometry cannot be used."""


class TrainingError(UserError):
    """Training cannot continue."""


class MergeError(UserError):
    """The branches cannot be merged."""


class ResourceError(UserError):
    """Not enough disk, memory or device."""


class Interrupted(MeritError):
    """Stopped by a signal after saving what was done; the same command resumes from there."""

    exit_code = 75


def install_hint(extra: str) -> str:
    """The command that installs an optional extra of this package (``ray``), from where the package itself is installed."""
    return f"pip install -e '.[{extra}]' in MERIT's checkout"


def nearest(word: str, known: list[str] | tuple[str, ...], likeness: float = 0.5) -> str:
    """Return `` Did you mean 'x'?`` for the known word closest to ``word`` (at least so alike), or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=likeness)
    return f" Did you mean {close[0]!r}?" if close else ""


def visible(text: str) -> str:
    """A message whose control characters, from the names of files, say themselves instead of acting on the terminal."""
    return "".join(repr(c)[1:-1] if category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)
