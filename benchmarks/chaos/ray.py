"""A Ray cluster of three nodes on this machine, whose nodes and workers can be killed.

    python -m benchmarks.chaos.ray

The cluster belongs to a process of its own, which is told what to do line by line: one that is connected to a cluster
cannot be forked, and commands are (:mod:`benchmarks.chaos.driver`).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import psutil


@dataclass
class Nodes:
    """The cluster.

    Attributes:
        keeper: The process that it belongs to.
        address: To connect to.
        environment: Of a command that connects.
    """

    keeper: subprocess.Popen[str]
    address: str
    environment: dict[str, str] = field(default_factory=dict)

    def kill_one(self, rng: random.Random) -> None:
        """Lose a node, with all that runs on it, and get another."""
        _ask(self.keeper, str(rng.randrange(_NODES)))

    def kill_worker(self, rng: random.Random, trainers: list[psutil.Process]) -> bool:
        """Kill the Ray worker that watches a trainer."""
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            parent = rng.choice(trainers).parent()
            if parent is not None and parent.name().startswith("ray::"):
                parent.send_signal(signal.SIGKILL)
                return True
        return False


_NODES = 2
_PATIENCE = {
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_worker_niceness": "0",
}
"""On a busy machine Python starts slowly, and niceness 15, Ray's default for workers, stands still there. None of these
times is waited for after a kill, which breaks a connection."""


def _ask(keeper: subprocess.Popen[str], what: str) -> str:
    """Tell the keeper something and wait for its answer."""
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    keeper.stdin.write(f"{what}\n")
    keeper.stdin.flush()
    while line := keeper.stdout.readline():
        if line.startswith(_ANSWER):
            return line.removeprefix(_ANSWER).strip()
    raise RuntimeError("the process that Ray's cluster belongs to has ended")


_ANSWER = "done: "


@contextlib.contextmanager
def cluster() -> Iterator[Nodes]:
    """Three nodes: one that only keeps house, and two of one CPU; all of it is gone afterwards."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    words = [sys.executable, "-m", "benchmarks.chaos.ray"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as keeper:
        yield Nodes(keeper, _ask(keeper, "address"))
        assert keeper.stdin is not None
        keeper.stdin.close()


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


def keep(told: IO[str]) -> None:
    """Hold a cluster for as long as there is somebody to obey."""
    from ray.cluster_utils import Cluster

    _be_patient()
    made = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [made.add_node(num_cpus=1) for _ in range(_NODES)]
    for line in told:
        if line.strip().isdecimal():
            made.remove_node(nodes[int(line)], allow_graceful=False)
            nodes[int(line)] = made.add_node(num_cpus=1)
        print(f"{_ANSWER}{made.address}", flush=True)
    made.shutdown()


if __name__ == "__main__":
    keep(sys.stdin)
