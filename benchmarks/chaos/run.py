"""Kill runs at random moments, under every launcher that runs here, and compare what they end with.

    python -m benchmarks.chaos.run --moments 100 --launchers chain local ray slurm

A tiny run (four datasets, two branches, a joint baseline, all stages) is broken at a random moment of a random stage with
SIGKILL or SIGTERM, started again, broken again, and in the end left alone. *chain* is one process that does every stage;
*local* is `--jobs 2`, whose workers are killed, too; *ray* a cluster of three nodes on this machine, whose workers, nodes
and driver are killed; *slurm* a real Slurm on loopback, whose workers, nodes and driver are killed, and whose tasks are
preempted and requeued.
A run survives if its merged weights are those of a run that was left alone, byte for byte, its evaluation is equal, and no
process and no unfinished file is left.
"""

from __future__ import annotations

import argparse
import collections
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
    """The tiny run, its reference, and how to break it."""

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
        begun = time.monotonic()
        with Driver(self.words(self.reference), top / "reference.txt") as driver:
            code = driver.wait(_PATIENCE)
        assert code == 0, (top / "reference.txt").read_text()
        print(f"reference run: {time.monotonic() - begun:.0f} s", flush=True)

    def words(self, run: Path, *more: str) -> list[str]:
        return ["run", str(self.recipe), "--output", str(run), *more]

    def prepared(self, run: Path) -> None:
        """A copy of the reference up to the split, for launchers that only differ in training."""
        shutil.copytree(self.reference, run)
        for name in ("branches", "merged", "evaluation", "report.html", "baselines/joint/branches", "logs"):
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def compare(self, run: Path) -> str:
        """What is wrong with a finished run; empty if nothing."""
        places = ["branches/0", "branches/1", "baselines/joint/branches/0", "merged"]
        for place in places:
            name = f"{place}/model/model.safetensors"
            if not (run / name).is_file() or (run / name).read_bytes() != (self.reference / name).read_bytes():
                return f"{name} differs"
        results = "evaluation/results.json"
        if (run / results).is_file() and json.loads((run / results).read_text()) != json.loads(
            (self.reference / results).read_text()
        ):
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
    """The processes that train branches."""
    return [process for process in processes_of(run) if "merit.run.worker" in process.cmdline()]


def settled(run: Path) -> None:
    """Wait until processes that were told to stop have ended."""
    until = time.monotonic() + 120
    while processes_of(run) and time.monotonic() < until:
        time.sleep(0.2)


# ---- one process does it all ------------------------------------------------------------------------------------------


def chain(case: Case, run: Path, deaths: int) -> Finding:
    """The whole chain in one process, killed ``deaths`` times."""
    found, rng = Finding("chain"), case.rng
    places = sorted(rng.sample(range(len(STAGES)), min(deaths, len(STAGES))))
    for place in places:
        stage, sent = STAGES[place], rng.choice([signal.SIGKILL, signal.SIGTERM])
        with Driver(case.words(run), run.with_suffix(".txt")) as driver:
            if not driver.until((run / stage / "running.json").exists):
                break  # it had finished
            time.sleep(rng.random() * seconds_of(case.reference / stage))
            driver.send(sent)
            code = driver.wait(_PATIENCE)
        found.moments.append(Moment("chain", under_way(run), "driver", sent.name, code))
        if sent == signal.SIGTERM and code not in (0, 75):
            return _lost(found, f"SIGTERM ended in exit code {code}", run)
    return finish(case, run, found, case.words(run))


def seconds_of(stage: Path) -> float:
    return float(json.loads((stage / "record.json").read_text())["seconds"]) + 0.02


def under_way(run: Path) -> str:
    for stage in reversed(STAGES):
        if (run / stage / "record.json").exists():
            return f"after {stage}" if not _begun_after(run, stage) else _begun_after(run, stage)
    return "mixture"


def _begun_after(run: Path, stage: str) -> str:
    rest = STAGES[STAGES.index(stage) + 1 :]
    return next((name for name in rest if (run / name).is_dir() and not (run / name / "record.json").exists()), "")


def finish(
    case: Case, run: Path, found: Finding, words: list[str], environment: dict[str, str] | None = None
) -> Finding:
    """Leave the run alone until it ends, and look at what it ended with."""
    settled(run)
    with Driver(words, run.with_suffix(".txt"), environment) as driver:
        code = driver.wait(_PATIENCE)
    if code != 0:
        return _lost(found, f"the last attempt ended in exit code {code}", run)
    settled(run)
    why = case.compare(run)
    return _lost(found, why, run) if why else found


def _lost(found: Finding, why: str, run: Path) -> Finding:
    found.survived = False
    log = run.with_suffix(".txt")
    found.why = f"{why}\n{log.read_text(errors='replace')[-1500:] if log.exists() else ''}"
    return found


# ---- workers ----------------------------------------------------------------------------------------------------------


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
    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    breaks: dict[tuple[str, str], Callable[[Path], bool]] = field(default_factory=dict)
    survives: bool = False


def broken(case: Case, run: Path, deaths: int, place: Place) -> Finding:
    """Training under a launcher, broken ``deaths`` times: drivers, workers, nodes."""
    found, rng = Finding(place.name), case.rng
    case.prepared(run)
    words = case.words(run, "--until", "merge", *place.words)
    driver = Driver(words, run.with_suffix(".txt"), place.environment)
    try:
        for _ in range(deaths):
            victim, sent = rng.choice([("driver", "SIGKILL"), ("driver", "SIGTERM"), *place.breaks])
            training = rng.random() < 0.7
            if not driver.until(partial(_there, run, training)):
                break
            time.sleep(rng.random() * (2.0 if training else 6.0))
            if driver.code() is not None:
                break
            for path in run.glob("branches/*/progress.json"):
                path.unlink(missing_ok=True)
            if victim != "driver":
                if not place.breaks[victim, sent](run):
                    continue
                found.moments.append(Moment(place.name, "training", victim, sent))
                if place.survives:
                    continue
                code = driver.wait(_PATIENCE)
            else:
                driver.send(signal.Signals[sent])
                code = driver.wait(_PATIENCE)
                found.moments.append(Moment(place.name, "training", victim, sent, code))
                if sent == "SIGTERM" and code not in (0, 75):
                    return _lost(found, f"SIGTERM ended in exit code {code}", run)
            if place.name != "slurm":
                settled(run)
            driver.close()
            driver = Driver(words, run.with_suffix(".txt"), place.environment)
        code = driver.wait(_PATIENCE)
    finally:
        driver.close()
    if code != 0:
        return finish(case, run, found, words, place.environment)
    settled(run)
    why = case.compare(run)
    return _lost(found, why, run) if why else found


def _there(run: Path, training: bool) -> bool:
    """Whether branches are being trained, or at least their workers are up; or it is too late for both."""
    begun = any(run.glob("branches/*/progress.json")) if training else bool(workers_of(run))
    return begun or (run / "merged" / "running.json").exists()


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
def ray(top: Path, rng: random.Random) -> Iterator[Place]:
    from benchmarks.chaos.ray import cluster

    with cluster(top / "ray") as nodes:

        def kill_node(_run: Path) -> bool:
            nodes.kill_one(rng)
            return True

        breaks = {("worker", s.name): kill_worker(rng, s) for s in (signal.SIGKILL, signal.SIGTERM)}
        breaks["node", "SIGKILL"] = kill_node
        breaks["ray worker", "SIGKILL"] = lambda run: nodes.kill_worker(rng, workers_of(run))
        words = ("--launch", "ray", "--set", f"launch.ray.address={nodes.address}", "--set", "launch.ray.retries=50")
        yield Place("ray", words, nodes.environment, breaks, survives=True)


@contextmanager
def slurm(top: Path, rng: random.Random) -> Iterator[Place]:
    from benchmarks.chaos.slurm import loopback

    with loopback(top / "slurm") as nodes:

        def preempt(_run: Path) -> bool:
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
        yield Place("slurm", words, nodes.environment, breaks, survives=True)


PLACES: dict[str, Callable[[Path, random.Random], AbstractContextManager[Place | None]]] = {
    "chain": lambda _top, _rng: nullcontext(),
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
        while sum(len(item.moments) for item in findings) < given.moments and time.time() < until:
            run, begun = top / f"{launcher}-{len(findings)}", time.monotonic()
            found = chain(case, run, given.deaths) if place is None else broken(case, run, given.deaths, place)
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
    stages = collections.Counter(m.stage for item in findings for m in item.moments if m.launcher == "chain")
    return (
        table(["launcher", "killed", "by", "moments", "in runs that ended as if left alone"], rows)
        + f"\n\n{sum(item.survived for item in findings)} of {runs} runs ended in the same bytes, with nothing left over. "
        f"Moments of *chain* by stage: {', '.join(f'{name} {n}' for name, n in sorted(stages.items()))}."
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
