"""A Ray cluster of three nodes on this machine, whose nodes and workers can be killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil


@dataclass
class Nodes:
    """The cluster.

    Attributes:
        cluster: Ray's own utility.
        address: To connect to.
        environment: Of a command that connects.
    """

    cluster: Any
    address: str
    environment: dict[str, str] = field(default_factory=dict)

    def kill_one(self, rng: random.Random) -> None:
        """Lose a node, with all that runs on it, and get another."""
        node = rng.choice(sorted(self.cluster.worker_nodes, key=lambda node: node.node_id))
        self.cluster.remove_node(node, allow_graceful=False)
        self.cluster.add_node(num_cpus=1)

    def kill_worker(self, rng: random.Random, trainers: list[psutil.Process]) -> bool:
        """Kill the Ray worker that watches a trainer."""
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            parent = rng.choice(trainers).parent()
            if parent is not None and parent.pid != os.getpid():
                parent.send_signal(signal.SIGKILL)
                return True
        return False


_PATIENCE = {
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_health_check_timeout_ms": "60000",
}
"""On a busy machine Python starts slowly; none of this is waited for after a kill, which breaks a connection."""


def _be_patient(seconds: float = 600.0) -> None:
    """Ray gives a node half a minute to come up, whatever the machine; wait as long as it takes."""
    services = import_module("ray._private.services")
    ask = services.get_node

    def get_node(*words: Any) -> Any:
        until = time.monotonic() + seconds
        while True:
            try:
                return ask(*words)
            except RuntimeError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)

    services.get_node = get_node


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Nodes]:
    """Three nodes: one that only keeps house, and two of one CPU."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    from ray.cluster_utils import Cluster

    folder.mkdir(parents=True, exist_ok=True)
    _be_patient()
    # Its handlers at exit would take this process's SIGTERM, and cannot be set outside of the main thread.
    made = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False}, shutdown_at_exit=False)
    try:
        for _ in range(2):
            made.add_node(num_cpus=1)
        yield Nodes(made, made.address)
    finally:
        made.shutdown()
        time.sleep(1)
