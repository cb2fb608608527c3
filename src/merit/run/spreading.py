"""Gradients by dataset and evaluations by model on a cluster: each task measures some of them into the stage's own store.

What a task measures is kept under a key of its content, as what is measured here is. So the stage itself is the same: it
finds everything measured already, and measures what is still missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from merit.files import fingerprint, read_sealed, write_sealed
from merit.launch.job import BranchJob
from merit.progress import Progress
from merit.run.launching import cluster_of
from merit.run.session import Session

Kind = Literal["gradients", "evaluate"]
_SHARES = 8
"""Into how many tasks the datasets are dealt out; each loads the base once."""


@dataclass(frozen=True)
class MeasureJob:
    """What one task measures.

    Attributes:
        run: The run folder; its ``recipe.yaml`` is the resolved recipe.
        kind: Of what.
        names: Datasets, or models.
        folder: The stage's.
    """

    run: Path
    kind: Kind
    names: tuple[str, ...]
    folder: Path

    def save(self, path: Path) -> None:
        """Write it."""
        write_sealed(path, asdict(self) | {"run": str(self.run), "folder": str(self.folder)})

    @classmethod
    def load(cls, path: Path) -> MeasureJob:
        """Read it.

        Raises:
            RunFolderError: It is missing or damaged.
        """
        return read_sealed(path, cls)


def spread(session: Session, kind: Kind, rounds: Sequence[Sequence[str]], folder: Path, progress: Progress) -> None:
    """Measure on the cluster of ``launch.where``; nothing happens unless ``launch.stages`` asks for it.

    Args:
        session: The command's session.
        kind: Of what.
        rounds: Names, to be measured one round after another.
        folder: The stage's.
        progress: Called as the tasks advance.

    Raises:
        UserError: As the launcher's.
        Interrupted: Stopped from outside.
    """
    launcher = cluster_of(session, kind)
    if launcher is None:
        return
    for names in rounds:
        shares = [names[place::_SHARES] for place in range(min(_SHARES, len(names)))]
        jobs = [_job(session, kind, share, folder) for share in shares]
        if jobs:
            launcher.run(jobs, progress)


def _job(session: Session, kind: Kind, names: Sequence[str], folder: Path) -> BranchJob:
    run = session.run.resolve()
    job = MeasureJob(run, kind, tuple(names), folder.resolve())
    name = fingerprint([kind, *names])[:12]
    path = str(run / "logs" / f"{kind}-{name}")
    job.save(Path(f"{path}.job.json"))
    return BranchJob(
        name=f"{kind} {name}",
        argv=[sys.executable, "-m", "merit.run.measuring", f"{path}.job.json", f"{path}.outcome.json"],
        log_path=Path(f"{path}.txt"),
        outcome_path=Path(f"{path}.outcome.json"),
        work=len(names),
        threads=session.recipe.train.threads or 1,
        fingerprint=fingerprint([session.base.fingerprint, session.recipe.model_dump(mode="json"), kind, *names]),
        unit="tasks",
    )
