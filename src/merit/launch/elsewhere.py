"""Texts for a branch that is trained elsewhere: README, a script, a SkyPilot task, a Kubernetes job. Pure.

Source: the SkyPilot task's keys are those of its task schema (sky/utils/schemas.py); the job's are of batch/v1 Job with a
pod failure policy (stable since Kubernetes 1.31).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from merit import __version__
from merit.errors import Interrupted, UserError

_GRACE_SECONDS = 300
"""How long a machine may take to write its checkpoint after it was told to stop."""


@dataclass(frozen=True)
class Handover:
    """A branch that is handed over.

    Attributes:
        title: Name of the job.
        branch: ``3``, or ``random/3``.
        base: Folder or hub id of the base.
        base_hash: Content of the base.
        with_base: Whether the base lies in the folder.
        base_is_local: Whether it is a folder of the machine that exports, and not a hub id.
        processes: GPUs that train it together.
    """

    title: str
    branch: str
    base: str
    base_hash: str
    with_base: bool
    base_is_local: bool
    processes: int

    @property
    def label(self) -> str:
        """The title as schedulers take it: lower-case letters, digits and dashes, at most 50 of them."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")[:50].strip("-")


def readme(handover: Handover, group: Sequence[str], samples: int) -> str:
    """What is in the folder, and what to do with it."""
    base = "in `base/`" if handover.with_base else f"`{handover.base}`, or any copy of it: `--base DIR`"
    return f"""# Branch {handover.branch} of {handover.title.rpartition("-branch-")[0]}

One branch of a MERIT run, to be trained here: {samples:,} rows of {len(group)} datasets. It needs no contact with any other
branch, and no network. Install MERIT {__version__} first: `pip install .` in its checkout, or a wheel (docs/cluster.md).

    merit branch train .

- The base is {base}. Its content must have the hash `{handover.base_hash[:16]}…`; it is compared before the first step.
- Stopped by SIGTERM or Ctrl-C it writes a checkpoint and exits with {Interrupted.exit_code}; killed, it goes on from the
  last one. The same command goes on, here or wherever this folder is copied to.
- The result is the folder `branch/`. Only that has to come back: `merit branch import RUN branch/`.
- `sky.yaml` (SkyPilot) and `kubernetes.yaml` (a Job) run the same command on rented machines; look through them first.

| file | what it is |
|---|---|
| `branch.json` | what decides this branch, as hashes: base, rows, recipe; compared when it comes back |
| `recipe.yaml` | every setting |
| `mixture/` | the encoded rows of the group, with their images |
| `split/` | the groups of all branches |

Datasets: {", ".join(group)}.
"""


def script() -> str:
    """The one command, as a shell script."""
    return """#!/bin/sh
# Train this branch; run it again to go on after an interruption. Options are passed on: ./train.sh --base DIR
set -eu
cd "$(dirname "$0")"
exec merit branch train . "$@"
"""


def sky_task(handover: Handover) -> str:
    """A SkyPilot managed job: `sky jobs launch sky.yaml`; the result is in a bucket, where a preempted job goes on."""
    task: dict[str, Any] = {
        "name": handover.label,
        "workdir": ".",
        "resources": {
            "accelerators": {"H100": handover.processes},
            "use_spot": True,
            "job_recovery": {"recover_on_exit_codes": [Interrupted.exit_code]},
        },
        "envs": {"MERIT": f"merit_tuning-{__version__}-py3-none-any.whl"},
        "file_mounts": {"/result": {"name": f"{handover.label}-result", "mode": "MOUNT_CACHED"}},
        "setup": 'pip install "$MERIT"\n',
        "run": "merit branch train . --to /result/branch\n",
    }
    return (
        f"{_missing_base(handover, 'the task')}"
        "# A managed spot job: sky jobs launch sky.yaml. Set the accelerator. MERIT is what pip installs: put this\n"
        "# version's wheel next to this file (docs/cluster.md).\n"
        "# The bucket holds checkpoints and result: a preempted job goes on from there on another machine.\n"
        f"{_dump(task)}"
    )


def kubernetes_job(handover: Handover) -> str:
    """A Kubernetes Job whose volume holds this folder; interrupted pods are replaced, errors of the user end it."""
    container = {
        "name": "branch",
        "image": f"merit-tuning:{__version__}",
        "command": ["merit", "branch", "train", "/branch"],
        "resources": {"limits": {"nvidia.com/gpu": handover.processes}},
        "volumeMounts": [{"name": "branch", "mountPath": "/branch"}],
    }
    failures = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "branch", "operator": "In", "values": [UserError.exit_code]},
        },
    ]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": handover.label},
        "spec": {
            "backoffLimit": 50,
            "podFailurePolicy": {"rules": failures},
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": _GRACE_SECONDS,
                    "containers": [container],
                    "volumes": [{"name": "branch", "persistentVolumeClaim": {"claimName": handover.label}}],
                }
            },
        },
    }
    return (
        f"{_missing_base(handover, 'the pod')}"
        f"# A Job: kubectl apply -f kubernetes.yaml. First: an image with merit {__version__}, and a volume\n"
        f"# claim {handover.label} with this folder. After exit code {Interrupted.exit_code} or a lost pod: tried again.\n"
        f"{_dump(job)}"
    )


def _missing_base(handover: Handover, place: str) -> str:
    """The first line of a file that cannot start as it is; empty if it can."""
    if handover.with_base or not handover.base_is_local:
        return ""
    return (
        f"# CANNOT START AS IT IS: the base is a folder of the machine that exported this, which {place} does not see.\n"
        "# Export again with `--with-base`, or add `--base DIR` to the command, where DIR is a copy that it sees.\n"
    )


def _dump(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=120)
