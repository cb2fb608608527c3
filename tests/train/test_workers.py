"""Sharing branches out among workers, their threads, and the job file."""

from __future__ import annotations

from pathlib import Path

import pytest

from merit.errors import RunFolderError
from merit.recipe.schema import TrainSettings
from merit.train.workers import WorkerJob, share_out, threads_for


def test_longest_go_to_the_least_loaded_and_nobody_is_idle() -> None:
    assert share_out({"a": 5, "b": 4, "c": 3, "d": 3}, 2) == [["a", "d"], ["b", "c"]]
    assert share_out({"a": 1}, 3) == [["a"]]


def test_threads_are_the_recipes_then_the_environments_then_a_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails on commit f5727a1: a single branch did not ask OMP_NUM_THREADS and took its share of the cores."""
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads_for(TrainSettings(threads=3), 2) == 3
    assert threads_for(TrainSettings(), 2) == 5
    for nothing in ("", "0", "2,3"):
        monkeypatch.setenv("OMP_NUM_THREADS", nothing)
        assert threads_for(TrainSettings(), 2) == 6
    assert threads_for(TrainSettings(processes=3), 2) == 2
    assert threads_for(TrainSettings(processes=8), 8) == 1


def test_job_file_is_read_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    job = WorkerJob(tmp_path, ("0", "random/1"), 2, 3)
    job.save(tmp_path / "job.json")
    assert WorkerJob.load(tmp_path / "job.json") == job
    text = (tmp_path / "job.json").read_text()
    job.save(tmp_path / "other.json")
    for damaged in ('{"run": 3}', text.replace('"threads": 2', '"threads": 3'), (tmp_path / "other.json").read_text()):
        (tmp_path / "job.json").write_text(damaged)
        with pytest.raises(RunFolderError, match=r"job\.json is damaged"):
            WorkerJob.load(tmp_path / "job.json")
