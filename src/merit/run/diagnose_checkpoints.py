"""Diagnosing any base with any checkpoints of it, outside a run: what the words of the command mean. Nothing is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merit.conflict.stage import measure_gradients
from merit.diagnostics.lab import Lab, Subject
from merit.diagnostics.registry import DIAGNOSTICS, chosen, lacks
from merit.diagnostics.result import Diagnosis
from merit.errors import RecipeError
from merit.hf.base import open_base
from merit.hf.models import pick_device
from merit.mixture import find_datasets
from merit.mixture.stage import encode_mixture
from merit.progress import Reporter
from merit.recipe.diagnose import DiagnoseSettings
from merit.recipe.schema import ConflictSettings, EvaluateSettings, MixtureSettings, ModelSettings
from merit.run.diagnosing import Diagnoses

__all__ = ["Checkpoints", "diagnose_checkpoints"]

RESERVED = {"base", "merged", "joint", "average"}
"""Names that the results give to other models."""
MAX_LENGTH = 2048
"""Tokens per row, as no recipe says how many."""


@dataclass(frozen=True)
class Checkpoints:
    """Models outside a run.

    Attributes:
        base: Folder or hub id of the base.
        folders: Checkpoint or adapter folders, each with its weight in the merge.
        rows: A file of rows, or a folder with one sub-folder per dataset.
        trainable: As the recipe's ``model.trainable``.
    """

    base: str
    folders: Sequence[tuple[Path, float]]
    rows: Path
    trainable: str = "language"

    @classmethod
    def parse(cls, base: str | None, words: Sequence[str], rows: Path | None, trainable: str) -> Checkpoints:
        """The words of `merit diagnose --base ...`.

        Raises:
            RecipeError: One is missing or malformed.
        """
        if base is None or rows is None:
            raise RecipeError(
                "diagnose: give a run folder; or --base DIR and --rows FILE, and --checkpoint DIR for each model.",
                "Example: merit diagnose --base BASE --checkpoint A --checkpoint B --rows data/",
            )
        if not rows.exists():
            raise RecipeError(f"--rows {rows}: no such file or folder.")
        return cls(base, tuple(_weighted(word) for word in words), rows, trainable)


def _weighted(word: str) -> tuple[Path, float]:
    """``DIR`` or ``DIR=WEIGHT``."""
    place, weight = (word, 1.0) if Path(word).is_dir() else (word.rpartition("=")[0] or word, _number(word))
    if not (weight > 0 and Path(place).is_dir()):
        raise RecipeError(f"--checkpoint {word}: expected a checkpoint folder, or DIR=WEIGHT with a positive number.")
    return Path(place), weight


def _number(word: str) -> float:
    try:
        return float(word.rpartition("=")[2])
    except ValueError:
        return 0.0


def diagnose_checkpoints(
    reporter: Reporter, given: Checkpoints, only: Sequence[str] = (), settings: DiagnoseSettings | None = None
) -> Diagnoses:
    """Make every diagnostic that these models and rows allow.

    Raises:
        RecipeError: There is no such diagnostic, or it cannot be made for them.
        UserError: Base, checkpoints or rows cannot be used.
    """
    names = chosen(only)
    subject = open_subject(given)
    lab = Lab(subject, settings)
    _ = lab.points  # before anything expensive: every checkpoint fits the base
    results: dict[str, Diagnosis] = {}
    left_out = {name: why for name in names if (why := lacks(name, subject))}
    if only and left_out:
        name, why = next(iter(left_out.items()))
        raise RecipeError(f"--only {name}: {why}.")
    for name in names:
        if name not in left_out:
            with reporter.progress(name) as lab.progress:
                results[name] = DIAGNOSTICS[name].measure(lab)
            reporter.stage(f"diagnose {name}", results[name].verdict)
    return Diagnoses(results, left_out)


def open_subject(given: Checkpoints) -> Subject:
    """Base, models and rows; the rows are encoded into a temporary folder."""
    base = open_base(ModelSettings.model_validate({"base": given.base, "trainable": given.trainable}))
    folder = given.rows.is_dir()
    data = {"folder": str(given.rows)} if folder else {"datasets": [{"name": given.rows.stem, "path": str(given.rows)}]}
    found = find_datasets(MixtureSettings.model_validate(data), EvaluateSettings())
    mixture = encode_mixture(found, base, max_length=MAX_LENGTH)
    device = pick_device("auto")
    conflict = ConflictSettings(examples=50)
    return Subject(
        base=base,
        branches=dict(zip(_names([path for path, _ in given.folders]), (p for p, _ in given.folders), strict=True)),
        weights=[weight for _, weight in given.folders],
        train=mixture.train,
        test=mixture.test,
        geometry=lambda: measure_gradients(mixture.train, base, conflict, device=device),
        device=device,
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """A short name for every folder: its own (its parent's, if that is ``model``), with a number where it is taken."""
    names: list[str] = []
    for i, path in enumerate(path.resolve() for path in paths):
        name = path.parent.name if path.name == "model" else path.name
        while name in RESERVED or name in names:
            name += f"-{i}"
        names.append(name)
    return names
