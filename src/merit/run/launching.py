"""Which launcher a recipe asks for."""

from __future__ import annotations

from typing import Literal

from merit.launch.job import Launcher
from merit.launch.local import Local
from merit.launch.ray import Ray
from merit.launch.slurm import Slurm
from merit.run.session import Session
from merit.train.requirements import processes_here


def launcher_of(session: Session, workers: int) -> Launcher | None:
    """Where the branches run; None: in this process, one after another.

    Args:
        session: The command's session.
        workers: Branches side by side on this machine, for ``launch.where: local``.
    """
    cluster = cluster_of(session, "train")
    if cluster is not None:
        return cluster
    if workers > 1 or session.recipe.train.processes > processes_here():
        return Local(workers)
    return None


def cluster_of(session: Session, stage: Literal["gradients", "train", "evaluate"]) -> Launcher | None:
    """The cluster that a stage is done on; None: it is done here."""
    launch, train = session.recipe.launch, session.recipe.train
    cpus = (train.threads or 1) * train.processes
    if stage not in launch.stages:
        return None
    if launch.where == "ray":
        return Ray(launch.ray, cpus, 0 if train.device == "cpu" else train.processes)
    if launch.where == "slurm":
        return Slurm(launch.slurm, f"merit-{session.recipe.name}", cpus)
    return None
