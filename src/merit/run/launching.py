"""Which launcher a recipe asks for."""

from __future__ import annotations

from merit.launch.job import Launcher
from merit.launch.local import Local
from merit.run.session import Session
from merit.train.requirements import processes_here


def launcher_of(session: Session, workers: int) -> Launcher | None:
    """Where the branches run; None: in this process, one after another.

    Args:
        session: The command's session.
        workers: Branches side by side on this machine.
    """
    train = session.recipe.train
    if workers > 1 or train.processes > processes_here():
        return Local(workers)
    return None
