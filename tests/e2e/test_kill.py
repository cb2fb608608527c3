"""A run that is killed and stopped at several points ends with the same bits as one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests.e2e.conftest import Case, make_case
from tests.e2e.test_run import read, weights


def start(case: Case, jobs: int = 1) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "merit", "run", str(case.recipe), "--output", str(case.run), "--jobs", str(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def until(case: Case, pattern: str, process: subprocess.Popen[str]) -> bool:
    """Wait until something matches below the run folder; False when the process ended before."""
    while process.poll() is None:
        if next(case.run.glob(pattern), None) is not None:
            return True
        time.sleep(0.005)
    return False


def test_killed_and_stopped_at_many_points(finished: Case, tmp_path: Path, base: Path) -> None:
    case = make_case(tmp_path, base, baselines=["joint", "random"])
    for pattern, sent, code in (
        ("conflict/partial/*.npy", signal.SIGKILL, -signal.SIGKILL),
        ("branches/0/progress.json", signal.SIGTERM, 75),
        ("evaluation/models/base.json", signal.SIGKILL, -signal.SIGKILL),
    ):
        with start(case) as process:
            assert until(case, pattern, process), (pattern, process.communicate())
            process.send_signal(sent)
            _, err = process.communicate()
        assert process.returncode == code, err
        assert "Traceback" not in err
        if code == 75:
            assert "Run the same command again" in err
        assert not (case.run / "evaluation" / "record.json").exists()
    with start(case) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
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
    with start(case, jobs=2) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
    for folder in ("branches/0", "branches/1", "merged", "baselines/random/merged"):
        mine, theirs = (weights(run / folder / "model") for run in (case.run, finished.run))
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs), folder
