"""Tiny runs whose branches are trained elsewhere, or that have scores of benchmark suites.

Slurm is a stand-in of two shell scripts: sbatch starts nothing, squeue tells of one array that runs and then has ended. What
its tasks write is the package's own (:mod:`merit.launch.one`). Suites are scored by a stand-in for lm-eval, which needs no
network; the package writes its scores as it does those of lm-eval.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks.faults.calling import command
from benchmarks.faults.case import CHAIN, EVALUATE, Place, done, interrupted_after, text_case

STUDY = ("study", "RECIPE", "--output", "RUN", "--yes", "--quiet")
TO_TRAINED = ("run", "RUN", "--until", "train", "--quiet")
DETACHED = (*TO_TRAINED, "--launch", "detached")
TASK = ("-m", "merit.launch.one", "@run/logs/train-0.launch.json")
WORKER = ("-m", "merit.run.worker", "@run/logs/train-0.job.json", "@run/logs/train-0.outcome.json")

PLACES = (
    Place("suites: scores of a run", "scored", ("run/suites/*/*",), (EVALUATE, CHAIN)),
    Place("suites: scores of a study", "studied", ("run/study/suites/*/*",), (STUDY,)),
    Place("Slurm: queue and outcomes", "queued", ("run/logs/slurm/*.json", "run/logs/*.outcome.json"), (TO_TRAINED,)),
    Place("Slurm: scripts, job files, logs", "queued", ("run/logs/**/*",), (TO_TRAINED,), unread=True),
    Place(
        "Slurm: a task's files", "tasks", ("run/logs/*-0.launch.json", "run/logs/*-0.job.json"), (TASK,), unread=True
    ),
    Place("a worker's job", "tasks", ("run/logs/*.job.json",), (WORKER,), unread=True),
    Place(
        "workers of this machine: old files", "workers", ("run/logs/*",), ((*TO_TRAINED, "--jobs", "2"),), unread=True
    ),
    Place(
        "detached: handed over",
        "detached",
        ("run/detached/0/*.json", "run/detached/0/*.yaml", "run/detached/0/*/**/*"),
        (("branch", "train", "@run/detached/0", "--quiet"),),
        unread=True,
    ),
    Place(
        "detached: manifests, settings",
        "detached",
        ("run/detached/*/*",),
        (("status", "RUN"), DETACHED),
        unread=True,
    ),
    Place(
        "detached: trained, taken back",
        "trained",
        ("run/detached/*/branch.json", "run/detached/*/branch/**/*"),
        (DETACHED,),
        unread=True,
    ),
)

_PATH = os.environ["PATH"]
_SBATCH = "#!/bin/sh\necho 1\n"
_SQUEUE = """#!/bin/sh
# One array of two tasks; at the fourth look they have ended and their branches are there.
cd "$(dirname "$0")/.." || exit 1
echo x >> looks
if [ "$(wc -l < looks)" -lt 4 ]; then echo "1 0 RUNNING"; echo "1 1 RUNNING"
elif [ -d aside ]; then mkdir -p run/branches && mv aside/* run/branches/ && rmdir aside; fi
"""


def scored(folder: Path) -> dict[str, Path]:
    """A run, and a study, with scores of a suite."""
    _stand_in_for_lm_eval()
    tops = {}
    for moment, words in (("scored", ("run", "--quiet")), ("studied", ("study", "--yes", "--quiet"))):
        tops[moment] = folder / moment
        case = text_case(
            folder / moment,
            evaluate={"exact_match": "never", "drift": {"prompts": 0}, "suites": [str(folder / moment / "pick.jsonl")]},
            study={"methods": ["base", "own"], "seeds": 1, "scales": [0.5]},
        )
        row = '{"question": "pick cat:", "choices": ["abc", "cat"], "answer": 1}\n'
        (case.folder / "pick.jsonl").write_text(row, encoding="utf-8")
        for _ in range(2):
            done(words[0], case.recipe, "--output", case.run, *words[1:])
    return tops


def _stand_in_for_lm_eval() -> None:
    from merit.run import suites

    def scores(model: Any, *_: object) -> dict[str, dict[str, float]]:
        share = float(sum(weight.double().abs().sum() for weight in model.parameters())) % 1
        return {"pick": {"acc": share, "acc_stderr": 0.1}}

    suites.check_harness = lambda *_: None
    suites.evaluate_suites = scores


REPLACED = (
    ("merit.run.suites", "check_harness"),
    ("merit.run.suites", "evaluate_suites"),
    ("merit.launch.slurm", "_OUTCOME_SECONDS"),
)
"""What the makers replace in this process, besides PATH."""


def slurm(folder: Path) -> dict[str, Path]:
    """A run whose array is in the queue and will have ended soon; and one whose tasks are about to start."""
    from merit.launch import one
    from merit.launch import slurm as launcher

    launcher._OUTCOME_SECONDS = 1.0
    found = {}
    for moment in ("queued", "tasks"):
        top = found[moment] = folder / moment
        case = text_case(top, launch={"where": "slurm", "slurm": {"poll_seconds": 0.05, "hours": 0.2}})
        _write_programs(top / "bin")
        with_programs(top)
        done("run", case.recipe, "--output", case.run, "--until", "split", "--quiet")
        with interrupted_after(1, launcher, "_sleep"):
            stopped = command("run", case.run, "--until", "train", "--quiet")
        assert stopped.code == 75, stopped
        (top / "looks").unlink()
        if moment == "queued":
            for file in sorted((case.run / "logs").glob("*.launch.json")):
                assert one.main(file) == 0
            shutil.move(case.run / "branches", top / "aside")
    return found


def _write_programs(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, text in (("sbatch", _SBATCH), ("squeue", _SQUEUE)):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)


def with_programs(top: Path) -> None:
    """Programs in ``top``/bin, if there are any, are found first from now on."""
    os.environ["PATH"] = f"{top / 'bin'}{os.pathsep}{_PATH}"


def workers(folder: Path) -> dict[str, Path]:
    """A run that is to be trained by two workers, with what workers before them left."""
    case = text_case(folder / "workers")
    done("run", case.recipe, "--output", case.run, "--until", "split", "--quiet")
    done("run", case.run, "--until", "train", "--jobs", "2", "--quiet")
    shutil.rmtree(case.run / "branches")
    return {"workers": case.folder}


def detached(folder: Path) -> dict[str, Path]:
    """A run whose branches were handed over; and one whose branches were trained where they lie."""
    found = {}
    for moment in ("detached", "trained"):
        case = text_case(folder / moment)
        done("run", case.recipe, "--output", case.run, "--until", "split", "--quiet")
        stopped = command("run", case.run, "--until", "train", "--quiet", "--launch", "detached")
        assert stopped.code == 75, stopped
        if moment == "trained":
            for k in "01":
                done("branch", "train", case.run / "detached" / k, "--quiet")
        found[moment] = case.folder
    return found


MAKERS = {
    scored: ("scored", "studied"),
    slurm: ("queued", "tasks"),
    workers: ("workers",),
    detached: ("detached", "trained"),
}
"""What makes which moments."""
