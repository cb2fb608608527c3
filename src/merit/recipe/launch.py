"""The ``launch`` block: where branches are trained. Nothing in it changes a result, so it is in no stage's fingerprint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from merit.recipe.base import Settings

Where = Literal["local", "ray", "slurm", "detached"]


class RaySettings(Settings):
    """Branches as tasks of a Ray cluster; its nodes share the run folder."""

    address: str | None = None
    """Of a running cluster (auto, or HOST:PORT). Default: RAY_ADDRESS, else a cluster of this machine alone."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """CPUs that one branch reserves. Default: ``train.threads`` (or 1) times ``train.processes``."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs that one branch reserves. Default: ``train.processes`` if the cluster has any and ``train.device`` is not cpu."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Other resources of the cluster that one branch reserves, by name."""
    retries: Annotated[int, Field(ge=0)] = 5
    """How often a branch whose worker or node was lost is started again; it goes on from its own checkpoint."""


class SlurmSettings(Settings):
    """Branches as tasks of a Slurm job array; its nodes share the run folder."""

    hours: Annotated[float, Field(gt=0, le=8760)] = 24.0
    """Time limit of one attempt (hours). A branch that needs more is requeued."""
    partition: str | None = None
    """Partition; default: the cluster's."""
    account: str | None = None
    """Account to charge; default: the user's."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """CPUs of one branch. Default: ``train.threads`` (or 1) times ``train.processes``."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of one branch, on one node."""
    memory: str | None = None
    """Memory of one branch, as sbatch takes it (120G); default: the cluster's."""
    options: list[Annotated[str, Field(pattern=r"^--?[a-zA-Z][^\n]*$")]] = []
    """Further options of sbatch, one each (--qos=long)."""
    setup: list[str] = []
    """Shell lines before training, such as: module load cuda."""
    at_once: Annotated[int, Field(ge=1)] | None = None
    """Most branches at once. Default: as many as the cluster starts."""
    grace_seconds: Annotated[int, Field(ge=10)] = 120
    """Seconds before the time limit at which a branch is told to write its checkpoint."""
    requeues: Annotated[int, Field(ge=0)] = 50
    """How often a branch is requeued after preemption, a lost node or the time limit; it goes on from its checkpoint."""
    poll_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between looks at the queue."""


class LaunchSettings(Settings):
    """Where branches are trained (docs/cluster.md)."""

    where: Where = "local"
    """local: worker processes of this machine (--jobs); ray: tasks of a Ray cluster; slurm: a Slurm job array; detached:
    every branch is exported to a folder of its own, to be trained anywhere."""
    stages: list[Literal["gradients", "train", "evaluate"]] = ["train"]
    """For ray and slurm: what is done there. Besides training that can be the gradients, by dataset, and the evaluation, by
    model; everything else is done where the command is given."""
    patience_minutes: Annotated[float, Field(gt=0)] = 10.0
    """For ray and slurm: how long a branch that is started again waits for its lost predecessor to let go of its folder."""
    ray: RaySettings = RaySettings()
    slurm: SlurmSettings = SlurmSettings()
