"""`train.processes: 2`, as a user would ask for it: the loss curve is that of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.builders import Case, make_case


def curve(branch: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (branch / "log.jsonl").read_text().splitlines()]


def test_two_processes_are_started_and_give_the_curve_of_one(
    tmp_path: Path, base: Path, finished: Case, merit: Callable[..., Any]
) -> None:
    case = make_case(tmp_path, base, split={"method": "joint"})
    result = merit("run", case.recipe, "--output", case.run, "--until", "train", "--set", "train.processes=2")
    assert result.code == 0, result.err
    branches = (finished.run / "baselines" / "joint" / "branches" / "0", case.run / "branches" / "0")
    for branch, processes in zip(branches, (1, 2), strict=True):
        record = json.loads((branch / "record.json").read_text())
        assert (record["processes"], record["threads"]) == (processes, 1)
    one, two = map(curve, branches)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert [row["target_tokens"] for row in two] == [row["target_tokens"] for row in one]
