"""Kill runs at random moments, under every launcher that runs here, and compare what they end with.

    python -m benchmarks.chaos.run --moments 100 --launchers chain local ray slurm

A tiny run (four datasets, two branches, a joint baseline, all stages) is broken at a random moment of a random stage with
SIGKILL or SIGTERM, started again, broken again, and in the end left alone. *chain* is one process that does every stage;
*local* is `--jobs 2`, whose workers are killed, too; *ray* a cluster of three nodes on this machine, whose workers, nodes
and driver are killed; *slurm* a real Slurm on loopback, whose workers, nodes and driver are killed, and whose tasks are
preempted and requeued. Under these two gradients and evaluation are done on the cluster, too.
A run survives if its branches and its merged weights are those of a run that was left alone under the same launcher, byte
for byte, its evaluation is equal, and no process and no unfinished file is left.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import psutil
from benchmarks.chaos.driver import Driver, load_libraries

STAGES = (
    "mixture", "conflict", "split", "branches/0", "branches/1", "baselines/joint/branches/0", "merged", "evaluation",
)  # fmt: skip
LAUNCHERS = ("chain", "local", "ray", "slurm")
RECORD = "record.json"
_ALL_STAGES = ("--set", "launch.stages=[gradients,train,evaluate]")
_PATIENCE = 900.0


@dataclass(frozen=True)
class Moment:
    """One deliberate death.

    Attributes:
        launcher: Of the run.
        stage: What was under way.
        victim: driver, worker or node.
        sent: SIGKILL, SIGTERM, or preemption.
        code: How the driver ended, if it did.
    """

    launcher: str
    stage: str
    victim: str
    sent: str
    code: int | None = None


@dataclass
class Finding:
    """One run, broken several times and finished.

    Attributes:
        launcher: Its launcher.
        moments: What was done to it.
        survived: Whether it ended as one that was left alone.
        why: What was wrong.
        seconds: Wall time of all attempts.
        seed: Of the survey: what its moments were drawn from.
    """

    launcher: str
    moments: list[Moment] = field(default_factory=list)
    survived: bool = True
    why: str = ""
    seconds: float = 0.0
    seed: int = 0


class Case:
    """The tiny run, its reference, and how to break it.

    Attributes:
        top: Folder of everything.
        rng: What moments are drawn from.
        recipe: The tiny run's.
        reference: The run that nobody touches, under the launcher that is broken.
        spans: What a stage waits for and how long it takes from there (seconds), in the order they end in.
    """

    def __init__(self, top: Path, rng: random.Random) -> None:
        from tests import builders

        self.top, self.rng = top, rng
        base = builders.make_base(top / "base", hidden=8)
        case = builders.make_case(
            top,
            base,
            baselines=["joint"],
            conflict={"examples": 8, "sketch_size": 256},
            train={
                **{"learning_rate": 5e-3, "batch_size": 2, "max_length": 96, "threads": 1, "epochs": 3},
                "checkpoint_steps": 5,
            },
            evaluate={"max_new_tokens": 4, "drift": {"prompts": 2, "tokens": 3}},
        )
        for task in list(builders.TASKS)[4:]:
            shutil.rmtree(top / "mixture" / task)
        self.recipe = case.recipe
        self.reference = top / "reference"
        self.spans: list[tuple[Path | None, float]] = []

    def refer(self, place: Place) -> None:
        """Make the reference under a launcher, and time its stages."""
        begun, log = time.time(), self.top / "reference.txt"
        with Driver(self.words(self.reference, *place.words), log, place.environment) as driver:
            code = driver.wait(_PATIENCE)
        assert code == 0, log.read_text()
        ends = sorted((record_of(self.reference, stage).stat().st_mtime, stage) for stage in STAGES)
        waits_for: Path | None = None
        for end, stage in ends:
            self.spans.append((waits_for, end - begun))
            waits_for, begun = Path(stage) / RECORD, end
        shown = ", ".join(f"{stage} {span:.1f}" for (_, stage), (_, span) in zip(ends, self.spans, strict=True))
        print(f"{place.name}: reference run, seconds of each stage: {shown}", flush=True)

    def words(self, run: Path, *more: str) -> list[str]:
        return ["run", str(self.recipe), "--output", str(run), *more]

    def compare(self, run: Path) -> str:
        """What is wrong with a finished run; empty if nothing."""
        places = ["branches/0", "branches/1", "baselines/joint/branches/0", "merged"]
        for place in places:
            name = f"{place}/model/model.safetensors"
            if not (run / name).is_file() or (run / name).read_bytes() != (self.reference / name).read_bytes():
                return f"{name} differs"
        results = "evaluation/results.json"
        if json.loads((run / results).read_text()) != json.loads((self.reference / results).read_text()):
            return f"{results} differs"
        left = [path for path in run.rglob("*") if path.name.endswith(".partial") or path.name == "checkpoints"]
        if left:
            return f"left over: {left[0].relative_to(run)}"
        orphans = processes_of(run)
        return f"left over: process {orphans[0].pid} {' '.join(orphans[0].cmdline())[:200]}" if orphans else ""


def processes_of(run: Path) -> list[psutil.Process]:
    """Processes that name a run folder on their command line, this one and daemons of a cluster aside."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if process.pid != os.getpid() and any(str(run) in word for word in words) and "merit" in " ".join(words):
            found.append(process)
    return found


def workers_of(run: Path) -> list[psutil.Process]:
    """The processes that train branches, measure gradients or evaluate models."""
    modules = {"merit.run.worker", "merit.run.measuring"}
    found = []
    for process in processes_of(run):
        with contextlib.suppress(psutil.NoSuchProcess):
            if modules & set(process.cmdline()):
                found.append(process)
    return found


def settled(run: Path) -> None:
    """Wait until processes that were told to stop have ended."""
    until = time.monotonic() + 120
    while processes_of(run) and time.monotonic() < until:
        time.sleep(0.2)


def record_of(run: Path, stage: str) -> Path:
    return run / stage / RECORD


def under_way(run: Path) -> str:
    """The stage that is being made: the last one that has begun, or after which one the run stands."""
    ended = [stage for stage in STAGES if record_of(run, stage).exists()]
    begun = [stage for stage in STAGES if (run / stage).is_dir() and stage not in ended]
    if begun:
        return begun[-1]
    return f"after {ended[-1]}" if ended else "mixture"


def _lost(found: Finding, why: str, run: Path) -> Finding:
    found.survived = False
    log = run.with_suffix(".txt")
    found.why = f"{why}\n{log.read_text(errors='replace')[-1500:] if log.exists() else ''}"
    return found


@dataclass
class Place:
    """A launcher that is up, and how to break it.

    Attributes:
        name: Its name.
        words: What the command says.
        environment: Of the command.
        breaks: Ways to break it, by victim and signal; each does it and says whether it could.
        survives: Whether the driver goes on when a worker or node dies.
    """

    name: str
    words: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    breaks: dict[tuple[str, str], Callable[[Path], bool]] = field(default_factory=dict)
    survives: bool = False


def broken(case: Case, run: Path, deaths: int, place: Place) -> Finding:
    """A run under a launcher, broken ``deaths`` times at random moments of random stages, and left alone in the end.

    Where a worker is to die and there is none at the drawn moment, the next one does.
    """
    found, rng = Finding(place.name), case.rng
    words = case.words(run, *place.words)
    driver = Driver(words, run.with_suffix(".txt"), place.environment)
    try:
        for number in sorted(rng.choices(range(len(case.spans)), k=deaths)):
            waits_for, span = case.spans[number]
            victim, sent = rng.choice([("driver", "SIGKILL"), ("driver", "SIGTERM"), *place.breaks])
            if waits_for is not None and not driver.until((run / waits_for).exists, _PATIENCE):
                break
            driver.until(lambda: False, rng.random() * span)
            if driver.code() is not None:  # it has finished, or a launcher has given up
                break
            if victim == "driver":
                stage = under_way(run)
                driver.send(signal.Signals[sent])
            elif driver.until(partial(place.breaks[victim, sent], run), _PATIENCE, every=0.1):
                stage = under_way(run)
            else:
                break
            code = driver.wait(_PATIENCE) if victim == "driver" or not place.survives else None
            found.moments.append(Moment(place.name, stage, victim, sent, code))
            if code is None:
                continue
            if (victim, sent) == ("driver", "SIGTERM") and code not in (0, 75):
                return _lost(found, f"SIGTERM ended in exit code {code}", run)
            if place.name != "slurm":  # whose array goes on
                settled(run)
            driver = Driver(words, run.with_suffix(".txt"), place.environment)
        if driver.wait(_PATIENCE) != 0:
            driver = Driver(words, run.with_suffix(".txt"), place.environment)
        code = driver.wait(_PATIENCE)
    finally:
        driver.close()
    if code != 0:
        return _lost(found, f"the last attempt ended in exit code {code}", run)
    settled(run)
    why = case.compare(run)
    return _lost(found, why, run) if why else found


def kill_worker(rng: random.Random, number: signal.Signals) -> Callable[[Path], bool]:
    def kill(run: Path) -> bool:
        workers = workers_of(run)
        if workers:
            try:
                rng.choice(workers).send_signal(number)
            except psutil.NoSuchProcess:
                return False
        return bool(workers)

    return kill


@contextmanager
def local(_top: Path, rng: random.Random) -> Iterator[Place]:
    breaks = {("worker", s.name): kill_worker(rng, s) for s in (signal.SIGKILL, signal.SIGTERM)}
    yield Place("local", ("--jobs", "2"), breaks=breaks)


@contextmanager
def ray(_top: Path, rng: random.Random) -> Iterator[Place]:
    from benchmarks.chaos.ray import cluster

    with cluster() as nodes:

        def kill_node(run: Path) -> bool:
            busy = bool(workers_of(run))
            if busy:
                nodes.kill_one(rng)
            return busy

        breaks = {("worker", s.name): kill_worker(rng, s) for s in (signal.SIGKILL, signal.SIGTERM)}
        breaks["node", "SIGKILL"] = kill_node
        breaks["ray worker", "SIGKILL"] = lambda run: nodes.kill_worker(rng, workers_of(run))
        words = ("--launch", "ray", "--set", f"launch.ray.address={nodes.address}", "--set", "launch.ray.retries=50")
        yield Place("ray", (*words, *_ALL_STAGES), nodes.environment, breaks, survives=True)


@contextmanager
def slurm(top: Path, rng: random.Random) -> Iterator[Place]:
    from benchmarks.chaos.slurm import loopback

    with loopback(top / "slurm") as nodes:

        def preempt(run: Path) -> bool:
            if not workers_of(run):
                return False
            script = top / "urgent.sh"
            script.write_text("#!/bin/bash\nsleep 3\n")
            nodes.call("sbatch", "--partition=high", f"--output={top}/urgent.txt", str(script))
            return True

        def requeue(run: Path) -> bool:
            numbers = nodes.call("squeue", "--me", "--noheader", "--states=RUNNING", "--partition=low", "--format=%A")
            for number in numbers.split()[:1]:
                nodes.call("scontrol", "requeue", number)
            return bool(numbers.split())

        def lose_node(run: Path) -> bool:
            return nodes.lose(rng.choice(["n1", "n2"]))

        breaks = {("worker", s.name): kill_worker(rng, s) for s in (signal.SIGKILL, signal.SIGTERM)}
        breaks |= {("task", "preemption"): preempt, ("task", "requeue"): requeue, ("node", "SIGKILL"): lose_node}
        words = ("--launch", "slurm", "--set", "launch.slurm.hours=1", "--set", "launch.slurm.poll_seconds=1")
        yield Place("slurm", (*words, *_ALL_STAGES), nodes.environment, breaks, survives=True)


PLACES: dict[str, Callable[[Path, random.Random], AbstractContextManager[Place]]] = {
    "chain": lambda _top, _rng: nullcontext(Place("chain")),
    "local": local,
    "ray": ray,
    "slurm": slurm,
}


def survey(top: Path, launcher: str, given: argparse.Namespace, until: float) -> list[Finding]:
    """Break runs under one launcher until enough deaths were died, or the clock says ``until``.

    Each finding is added to ``given.to`` as soon as there is one: a survey that is itself cut short keeps what it saw.
    """
    rng = random.Random(f"{given.seed}/{launcher}")
    case = Case(top, rng)
    findings: list[Finding] = []
    with PLACES[launcher](top, rng) as place:
        case.refer(place)
        while sum(len(item.moments) for item in findings) < given.moments and time.time() < until:
            run, begun = top / f"{launcher}-{len(findings)}", time.monotonic()
            found = broken(case, run, given.deaths, place)
            found.seconds, found.seed = round(time.monotonic() - begun, 1), given.seed
            findings.append(found)
            if given.to is not None:
                with given.to.open("a") as file:
                    file.write(json.dumps(asdict(found)) + "\n")
            words = ", ".join(f"{m.victim} {m.sent} in {m.stage}" for m in found.moments)
            print(
                f"{launcher}: {'survived' if found.survived else 'LOST ' + found.why}: {words} ({found.seconds} s)",
                flush=True,
            )
            if found.survived:
                shutil.rmtree(run)
    return findings


def summary(findings: list[Finding]) -> str:
    """Deaths by launcher, victim and signal; runs and how many ended as they should."""
    from benchmarks.report import table

    counts = collections.Counter(
        (m.launcher, m.victim, m.sent, item.survived) for item in findings for m in item.moments
    )
    rows = [
        [launcher, victim, sent, counts[launcher, victim, sent, True] + counts[launcher, victim, sent, False],
         counts[launcher, victim, sent, True]]
        for launcher, victim, sent in sorted({key[:3] for key in counts})
    ]  # fmt: skip
    total = sum(counts.values())
    rows.append(["all", "", "", total, sum(count for key, count in counts.items() if key[3])])
    runs = len(findings)
    stages = collections.Counter(m.stage for item in findings for m in item.moments)
    return (
        table(["launcher", "killed", "by", "moments", "in runs that ended as if left alone"], rows)
        + f"\n\n{sum(item.survived for item in findings)} of {runs} runs ended in the same bytes, with nothing left over. "
        f"Moments by stage: {', '.join(f'{name} {n}' for name, n in sorted(stages.items()))}."
    )


def sum_up(file: Path) -> None:
    """Write benchmarks/results/chaos.md from findings that were kept with ``--to``."""
    from benchmarks.report import write

    found = [json.loads(line) for line in file.read_text().splitlines()]
    findings = [Finding(**{**item, "moments": [Moment(**moment) for moment in item["moments"]]}) for item in found]
    text = (
        f"{summary(findings)}\n\n{sum(item.seconds for item in findings) / 60:.0f} minutes in all. FILE was filled by "
        "several calls with `--to FILE`, launcher by launcher; the seed of each run is in the JSON, where it was kept."
    )
    command = "python -m benchmarks.chaos.run --sum-up FILE"
    write("chaos", "Runs that were killed at random moments", command, text, {"findings": found})
    print(text)


def main() -> None:
    """Parse, break, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=100, help="Deaths under each launcher.")
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=["chain", "local"])
    parser.add_argument("--deaths", type=int, default=8, help="At most, in one run.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600.0, help="No new run is begun after this.")
    parser.add_argument("--to", type=Path, help="Add the findings to this JSON Lines file; nothing else is written.")
    parser.add_argument("--sum-up", type=Path, help="Break nothing: write the table of the findings in this file.")
    given = parser.parse_args()
    if given.sum_up is not None:
        sum_up(given.sum_up)
        return
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    load_libraries()
    until = time.time() + 60 * given.minutes
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="merit-chaos-") as folder:
        for launcher in given.launchers:
            top = Path(folder) / launcher
            top.mkdir()
            findings += survey(top, launcher, given, until)
    print(summary(findings))
    sys.exit(any(not item.survived for item in findings))


if __name__ == "__main__":
    main()
