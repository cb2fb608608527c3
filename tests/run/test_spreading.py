"""Gradients and evaluations by tasks elsewhere: the stage finds them measured, and ends in the same figures."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests import builders
from tests.builders import Case, call, read

from merit.launch.job import BranchJob
from merit.launch.local import run_branches
from merit.progress import Progress


class Here:
    """A cluster that is this machine: the tasks are real processes."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @property
    def side_by_side(self) -> int | None:
        return None

    def run(self, jobs: Sequence[BranchJob], progress: Progress) -> None:
        self.names += [job.name.split()[0] for job in jobs]
        assert {job.unit for job in jobs} == {"tasks"}
        run_branches(jobs, 2, progress)


@pytest.mark.exhaustive
def test_tasks_measure_what_the_stage_then_finds(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = builders.make_case(tmp_path, base, conflict={"examples": 8, "sketch_size": 256})
    for task in list(builders.TASKS)[2:]:
        shutil.rmtree(case.folder / "mixture" / task)
    assert call("run", case.recipe, "--output", case.run, "--quiet").code == 0
    other, here = Case(tmp_path, case.settings).folder / "other", Here()
    monkeypatch.setattr("merit.run.spreading.cluster_of", lambda _session, _stage: here)
    shutil.copytree(case.run, other)
    for folder in ("conflict", "evaluation"):
        shutil.rmtree(other / folder)
    done = call("run", case.recipe, "--output", other, "--quiet")
    assert done.code == 0, done.err
    assert here.names == ["gradients"] * 2 + ["evaluate"] * 4  # base, then merged and two branches
    ours, theirs = (np.load(run / "conflict/geometry.npz") for run in (case.run, other))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ("gram", "cosine"))
    assert read(other / "evaluation/results.json") == read(case.run / "evaluation/results.json")
    record = read(other / "evaluation/record.json")
    assert set(record["reused"]) == set(record["models"])  # the stage itself measured nothing
