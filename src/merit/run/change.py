"""Adding or removing a dataset: what is to be done, kept in the run folder until it is, and the statement of what was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from merit.files import read_as, sealed, write_json
from merit.run.store import CHANGE, Stage, read_change
from merit.split.placing import FirstSplit

FOLDER = "changes"
"""Statements of a run's changes, in order."""


@dataclass(frozen=True)
class Change:
    """A dataset that is being added or removed.

    Attributes:
        kind: What is done.
        dataset: Its name.
        branch: The branch that is trained again.
        new: Whether that branch is made for the dataset alone.
        scores: Its scores on the first split's axes; None where it was not placed by them.
        cuts: The scores that they were compared with.
        rows: Fingerprint of its encoded training rows.
        recipe: The new recipe, YAML.
        first: What is kept of the first split.
        before: Checksum of every record before, by folder.
        evaluate: Evaluate again.
        excluded: Branches that the merge leaves out.
        base: Fingerprint of the base; empty in changes that were begun by an earlier version.
    """

    kind: Literal["add", "remove"]
    dataset: str
    branch: int
    rows: str
    recipe: str
    new: bool = False
    scores: list[float] | None = None
    cuts: list[list[float]] | None = None
    first: FirstSplit | None = None
    before: dict[str, str] = field(default_factory=dict)
    evaluate: bool = False
    excluded: list[int] = field(default_factory=list)
    base: str = ""

    def save(self, run: Path) -> None:
        """Write it into the run folder: from now on the run is between two states."""
        write_json(run / CHANGE, sealed(asdict(self)))


@dataclass(frozen=True)
class Statement:
    """What a finished change did.

    Attributes:
        kind, dataset, branch, new, scores, cuts, rows: As in :class:`Change`.
        retrained: Folders whose record changed: checksum before and after; None where there was, or is, none.
        unchanged: Folders of other branches, with the checksum of their record.
        group: Datasets of the branch now.
        target_tokens: What was trained for the change.
        seconds: Training for the change.
        sentences: The same for a person, with what it does not cover.
    """

    kind: Literal["add", "remove"]
    dataset: str
    branch: int
    new: bool
    scores: list[float] | None
    cuts: list[list[float]] | None
    rows: str
    retrained: dict[str, tuple[str | None, str | None]]
    unchanged: dict[str, str]
    group: list[str]
    target_tokens: int
    seconds: float
    sentences: list[str] = field(default_factory=list)

    def save(self, run: Path) -> Path:
        """Write it as the run's next statement."""
        number = 1 + len(list((run / FOLDER).glob("*.json")))
        path = run / FOLDER / f"{number:03d}-{self.kind}-{self.dataset}.json"
        (run / FOLDER).mkdir(exist_ok=True)
        write_json(path, asdict(self))
        return path


def load_change(run: Path) -> Change | None:
    """The unfinished change of a run, if there is one.

    Raises:
        RunFolderError: Its file is damaged.
    """
    if not (run / CHANGE).exists():
        return None
    read_change(run)
    return read_as(run / CHANGE, Change)


def checksums(run: Path) -> dict[str, str]:
    """Checksum of the record of every branch, the split and the merge of a run, by folder."""
    folders = ["split", "merged", *(f"branches/{path.name}" for path in sorted((run / "branches").glob("*")))]
    found = {folder: Stage("stage", run / folder) for folder in folders}
    return {folder: stage.record().checksum for folder, stage in found.items() if stage.begun}


def sentences(change: Change, before: Mapping[str, str], after: Mapping[str, str], branches: int) -> list[str]:
    """What was done and what that means, in plain words."""
    name, k = change.dataset, change.branch
    if change.kind == "add":
        why = "as a branch of its own" if change.new else "where the recipe or the command line put it"
        if change.scores is not None:
            why = f"by its scores on the first split's axes ({', '.join(f'{score:.3f}' for score in change.scores)})"
        return [
            f"{name} is in branch {k}, {why}.",
            f"Branch {k} was trained again from the base; the other {branches - 1} branches are as they were.",
        ]
    same = all(after.get(folder) == value for folder, value in before.items() if _is_other(folder, k))
    gone = "was only it, and is gone" if change.new else "was trained again from the base without it"
    return [
        f"{name} was in branch {k} alone. That branch {gone}.",
        f"No other branch ever saw it: their records are {'the same as before' if same else 'NOT the same as before'}. "
        "The merge is made of these, so no weight of it depends on a row of this dataset through training.",
        "Not covered: which datasets are grouped together was chosen with its gradient, and the axes that place later "
        "datasets contain it; earlier statements and the evaluation of before (until it is made again), copies, exports and "
        "conflict.cache outside of this folder.",
    ]


def _is_other(folder: str, k: int) -> bool:
    return folder.startswith("branches/") and folder != f"branches/{k}"
