"""A Ray cluster of three nodes on this machine, whose nodes and workers can be killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
        patiently(lambda: self.cluster.add_node(num_cpus=1))

    def kill_worker(self, rng: random.Random, trainers: list[psutil.Process]) -> bool:
        """Kill the Ray worker that watches a trainer."""
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            parent = rng.choice(trainers).parent()
            if parent is not None and parent.pid != os.getpid():
                parent.send_signal(signal.SIGKILL)
                return True
        return False


def patiently(make: Callable[[], Any]) -> Any:
    """Start a node; on a busy machine one may take longer than the half minute that Ray gives it."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    for attempt in range(6):
        try:
            return make()
        except Exception:
            for child in psutil.Process().children(recursive=True):
                if child.pid not in before:  # what the failed start left behind
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            if attempt == 5:
                raise
    return None


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Nodes]:
    """Three nodes: one that only keeps house, and two of one CPU."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_agent_register_timeout_ms", "600000")  # a raylet gives up when its agent starts slowly
    from ray.cluster_utils import Cluster

    folder.mkdir(parents=True, exist_ok=True)
    made = patiently(lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}))
    try:
        for _ in range(2):
            patiently(lambda: made.add_node(num_cpus=1))
        yield Nodes(made, made.address)
    finally:
        made.shutdown()
        time.sleep(1)
