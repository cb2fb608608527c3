"""`train.processes: 2`, as a user would ask for it: the loss curve is that of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.builders import Case, make_case


def curve(case: Case) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (case.run / "branches" / "0" / "log.jsonl").read_text().splitlines()]


def test_two_processes_are_started_and_give_the_curve_of_one(
    tmp_path: Path, base: Path, merit: Callable[..., Any]
) -> None:
    curves = []
    for processes in (1, 2):
        case = make_case(tmp_path / str(processes), base, split={"method": "joint"})
        words = ("--output", case.run, "--until", "train", "--set", f"train.processes={processes}")
        result = merit("run", case.recipe, *words)
        assert result.code == 0, result.err
        record = json.loads((case.run / "branches" / "0" / "record.json").read_text())
        assert (record["processes"], record["threads"]) == (processes, 1)
        curves.append(curve(case))
    one, two = curves
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert [row["target_tokens"] for row in two] == [row["target_tokens"] for row in one]
