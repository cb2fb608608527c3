"""`merit status --watch`: figures of branches wherever they run, in a terminal and in a log."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from merit.launch.job import ProgressFile
from merit.recipe.load import parse_recipe
from merit.report import status as report
from merit.run.status import Live, Row, Status, run_status


def rows(state: Any, **changes: Any) -> list[Row]:
    live = Live(3, 10, 1.25, 800.0, 70.0, "node-7", time.time() - 5)
    return [Row("branch 0", "branch", "b/0", state, live=live, **changes), Row("branch 1", "branch", "b/1", "missing")]


def test_branches_show_step_loss_speed_time_left_machine_and_last_sign() -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(report.render_branches(rows("running"), time.time()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("3 of 10", "1.2500", "800", "70 s", "node-7", "5.0 s ago"):
        assert word in text


@pytest.mark.parametrize("terminal", [True, False])
def test_watching_ends_when_all_is_done(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.time, "sleep", lambda _: None)
    looks = iter([
        Status("r", "n", True, rows("running")),
        Status("r", "n", True, rows("running")),
        Status("r", "n", False, [Row("branch 0", "branch", "b/0", "done")]),
    ])  # fmt: skip
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    report.watch(lambda: next(looks), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "node-7" in text
    if not terminal:
        lines = text.splitlines()
        assert len(lines) == 3  # once each, not at every look
        assert lines[0].startswith(
            "branch 0: running, step 3 of 10, loss 1.2500, 800 target tokens/s, 70 s left, node-7"
        )
        assert lines[2] == "branch 0: done"


def test_a_branch_on_another_machine_runs_while_it_gives_signs_of_life(tmp_path: Path) -> None:
    recipe = parse_recipe({"name": "x", "model": {"base": "b"}, "mixture": {"folder": "m"}, "split": {"axes": 1}})
    branch = tmp_path / "branches" / "0"
    branch.mkdir(parents=True)
    note = ProgressFile(branch / "progress.json")
    note(1, 8, {"loss": 2.0})
    early = json.loads((branch / "progress.json").read_text())
    assert "seconds_left" not in early  # a rate from the first seconds would say little
    note._written, note._first = -1.0, (time.monotonic() - 10.0, 1)
    note(2, 8, {"loss": 2.0, "tokens_per_second": 9.0})
    (branch / "running.json").write_text(json.dumps({"pid": 1, "host": "another", "since": "", "command": ""}))

    def row() -> Row:
        return next(row for row in run_status(tmp_path, recipe).stages if row.stage == "branch 0")

    assert row().state == "running"
    live = row().live
    assert live is not None
    assert (live.step, live.steps, live.loss, live.tokens_per_second) == (2, 8, 2.0, 9.0)
    assert live.seconds_left == pytest.approx(60.0, rel=0.05)
    facts = json.loads((branch / "progress.json").read_text())
    (branch / "progress.json").write_text(json.dumps({**facts, "time": time.time() - 3600}))
    assert row().state == "partial"
