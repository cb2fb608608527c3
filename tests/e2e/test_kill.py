"""A run that is killed and stopped at several points ends with the same bits as one that was left alone."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from tests.builders import Case, call, ended, make_case, read, start, until, weights


def command(case: Case, jobs: int = 1) -> list[str]:
    return ["run", str(case.recipe), "--output", str(case.run), "--jobs", str(jobs)]


def test_killed_and_stopped_at_many_points(finished: Case, tmp_path: Path, base: Path) -> None:
    case = make_case(tmp_path, base, baselines=["joint", "random"])
    for pattern, sent, code in (
        ("conflict/partial/*.npy", signal.SIGKILL, -signal.SIGKILL),
        ("branches/0/progress.json", signal.SIGTERM, 75),
        ("evaluation/models/base.json", signal.SIGKILL, -signal.SIGKILL),
    ):
        process = start(*command(case), log=tmp_path / "log")
        assert until(process, case.run, pattern), (pattern, (tmp_path / "log").read_text())
        said = ended(process, tmp_path / "log", sent, code)
        if code == 75:
            assert "Run the same command again" in said
        assert not (case.run / "evaluation" / "record.json").exists()
    assert call(*command(case)).code == 0
    for folder in ("branches/0", "branches/1", "merged", "baselines/random/merged", "baselines/joint/branches/0"):
        mine, theirs = (weights(run / folder / "model") for run in (case.run, finished.run))
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs), folder
        one, other = (read(run / folder / "record.json") for run in (case.run, finished.run))
        assert one.get("target_tokens") == other.get("target_tokens"), folder
    mine, theirs = (read(run / "evaluation" / "results.json") for run in (case.run, finished.run))
    assert mine == theirs
    left = [str(path) for path in case.run.rglob("*") if ".part" in path.name or path.name == "checkpoints"]
    assert not left


@pytest.mark.exhaustive  # tests/run/test_fingerprints.py compares the contents of models trained both ways
def test_branches_side_by_side_give_the_same_bits(finished: Case, tmp_path: Path, base: Path) -> None:
    case = make_case(
        tmp_path, base, baselines=["joint", "random"], evaluate={"heldout": False, "drift": {"prompts": 0}}
    )
    assert call(*command(case, jobs=2)).code == 0
    for folder in ("branches/0", "branches/1", "merged", "baselines/random/merged"):
        mine, theirs = (weights(run / folder / "model") for run in (case.run, finished.run))
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs), folder
