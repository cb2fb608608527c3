"""A real Slurm on this machine's loopback: munged, slurmctld and two slurmd, of the system packages, without systemd.

Needs root and the Debian packages slurmctld, slurmd, slurm-client and munge. Two partitions: ``low``, whose jobs are
requeued when ``high`` needs their cores.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")


def why_not() -> str:
    """Why a Slurm cannot be started here; empty if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"Slurm's {', '.join(missing)} not installed (apt-get install slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "slurmctld and munged are started as root here"


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass
class Loopback:
    """A running cluster.

    Attributes:
        folder: Its files.
        conf: slurm.conf.
        daemons: By name: munged, slurmctld, n1, n2.
    """

    folder: Path
    conf: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.conf), "PATH": _PATH}

    def call(self, *words: str) -> str:
        environment = {**os.environ, **self.environment}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout

    def start(self, name: str, *words: str) -> None:
        log = (self.folder / f"{name}.txt").open("ab")
        environment = {**os.environ, **self.environment}
        self.daemons[name] = subprocess.Popen(
            words, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name, "-f", str(self.conf))

    def start_controller(self) -> None:
        self.start("slurmctld", "slurmctld", "-D", "-f", str(self.conf))

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        process = self.daemons.pop(name)
        process.send_signal(number)
        process.wait()

    def lose(self, name: str) -> bool:
        """Lose a node with all that runs on it, and get it back; False, and nothing is lost, if nothing runs there."""
        here = {f"SLURM_CONF={self.conf}", f"SLURMD_NODENAME={name}"}  # of what it runs; a slurmstepd's own is empty
        mine = [
            step
            for step in psutil.process_iter(["name"])
            if step.info["name"] == "slurmstepd" and any(here <= _environment(child) for child in _children(step))
        ]
        for step in mine:
            for process in [*_children(step, recursive=True), step]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        if mine:
            self.kill(name)
            self.start_node(name)
        return bool(mine)

    def up(self) -> bool:
        with contextlib.suppress(subprocess.CalledProcessError):
            states = self.call("sinfo", "--noheader", "--Node", "--format=%T").split()
            return len(states) > 0 and all(state in ("idle", "mixed", "allocated") for state in states)
        return False


def _environment(process: psutil.Process) -> set[str]:
    with contextlib.suppress(psutil.Error):
        return {f"{key}={value}" for key, value in process.environ().items()}
    return set()


def _children(process: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=recursive)
    return []


@contextlib.contextmanager
def loopback(folder: Path, cpus: int = 1) -> Iterator[Loopback]:
    """A Slurm of two nodes, each with ``cpus`` CPUs; all of it is gone afterwards."""
    folder.mkdir(parents=True)
    cluster = Loopback(folder, folder / "slurm.conf")
    munge = _munge_files(folder)
    ports = _free_ports(3)
    cluster.conf.write_text(_CONF.format(folder=folder, host=socket.gethostname(), cpus=cpus, ports=ports, munge=munge))
    try:
        cluster.start(
            "munged", "munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--num-threads=2",
        )  # fmt: skip
        _until(lambda: (munge / "socket").exists(), cluster, "munged")
        cluster.start_controller()
        for name in ("n1", "n2"):
            cluster.start_node(name)
        _until(cluster.up, cluster, "slurmctld")
        yield cluster
    finally:
        with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
            cluster.call("scancel", "--me", "--signal=KILL", "--full")
            cluster.call("scancel", "--me")
            time.sleep(1)
        for name in list(cluster.daemons):
            cluster.kill(name, signal.SIGTERM)
        shutil.rmtree(munge, ignore_errors=True)


def _munge_files(folder: Path) -> Path:
    munge = Path("/run") / f"merit-munge-{os.getpid()}"  # a socket's path must be short, its folder root's own
    munge.mkdir(mode=0o755, exist_ok=True)
    (munge / "key").write_bytes(secrets.token_bytes(128))
    (munge / "key").chmod(0o400)
    return munge


def _until(there: object, cluster: Loopback, name: str) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if callable(there) and there():
            return
        time.sleep(0.2)
    log = (cluster.folder / f"{name}.txt").read_text(errors="replace")[-2000:]
    raise RuntimeError(f"{name} did not come up within a minute:\n{log}")


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


_CONF = """ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmctldParameters=enable_configless
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge}/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=300
SlurmdTimeout=20
InactiveLimit=0
MessageTimeout=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 MaxTime=INFINITE State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
