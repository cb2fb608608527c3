"""Sharing branches out among worker processes: who trains what, with how many threads, and the job file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from merit.files import read_sealed, write_sealed
from merit.recipe.schema import TrainSettings

_T = TypeVar("_T")


@dataclass(frozen=True)
class WorkerJob:
    """What one worker is to do.

    Attributes:
        run: The run folder; its ``recipe.yaml`` is the resolved recipe.
        branches: The branches to train, one after another: ``3``, or ``random/3`` of a baseline.
        threads: CPU threads of each of its processes.
        jobs: Workers in parallel on this machine.
        patience: Seconds to wait for a lost predecessor to let go of a branch's folder.
    """

    run: Path
    branches: tuple[str, ...]
    threads: int
    jobs: int = 1
    patience: float = 0.0

    def save(self, path: Path) -> None:
        """Write it."""
        write_sealed(path, asdict(self) | {"run": str(self.run)})

    @classmethod
    def load(cls, path: Path) -> WorkerJob:
        """Read it.

        Raises:
            RunFolderError: It is missing or damaged.
        """
        return read_sealed(path, cls)


def share_out(work: Mapping[_T, float], workers: int) -> list[list[_T]]:
    """One list per worker, of about equal work: longest first, each to the worker with the least so far."""
    lists: list[list[_T]] = [[] for _ in range(workers)]
    for item in sorted(work, key=lambda item: -work[item]):
        min(lists, key=lambda mine: sum(work[one] for one in mine)).append(item)
    return [mine for mine in lists if mine]


def threads_for(settings: TrainSettings, side_by_side: int = 1) -> int:
    """CPU threads of each process: ``train.threads``, else OMP_NUM_THREADS, else this process's share of the cores."""
    if settings.threads is not None:
        return settings.threads
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    return max(1, (os.cpu_count() or 1) // (max(1, side_by_side) * settings.processes))
