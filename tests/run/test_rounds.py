"""Whole runs in rounds: killed anywhere they end in the same bits; every dataset has its budget; what is missing is said."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.builders import Case, call, make_case, read, weights

from merit.run import rounds as run_rounds
from merit.train.log import StepLog

SETTINGS = ("evaluate.heldout=false", "evaluate.drift.prompts=0", "train.checkpoint_steps=2")
THREE = ("train.rounds=3", "train.epochs=3")
FEW = {"folder": "mixture", "include": ["upper", "first", "last", "length"], "samples": 16}


def words(case: Case, command: str, *overrides: str) -> list[str]:
    extra = [word for item in (*SETTINGS, *overrides) for word in ("--set", item)]
    return [command, str(case.recipe), "--output", str(case.run), "--quiet", *extra]


def run(case: Case, *overrides: str) -> None:
    result = call(*words(case, "run", *overrides), "--until", "merge")
    assert result.code == 0, result.err


def killed(case: Case, module: Any, name: str, when: Callable[..., bool], *overrides: str) -> None:
    """Run in another process that dies where ``name`` has been called and ``when`` holds of its arguments."""
    child = os.fork()
    if child == 0:
        original = getattr(module, name)

        def dying(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if when(*args):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, dying)
        try:
            call(*words(case, "run", *overrides), "--until", "merge")
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def small(folder: Path, base: Path, **changes: Any) -> Case:
    return make_case(folder, base, mixture=FEW, split={"axes": 1, "method": "random"}, **changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Case:
    """A run of three rounds that nothing happened to."""
    case = small(tmp_path_factory.mktemp("alone"), base)
    run(case, *THREE)
    return case


def same_end(case: Case, other: Case) -> None:
    for folder in ("branches/0", "branches/1", "merged"):
        mine, theirs = (weights(one.run / folder / "model") for one in (case, other))
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs), folder
    for folder in ("branches/0", "branches/1"):
        logs = [(one.run / folder / "log.jsonl").read_text() for one in (case, other)]
        assert logs[0] == logs[1]
        mine, theirs = (read(one.run / folder / "record.json") for one in (case, other))
        for key in ("target_tokens", "tokens", "samples", "steps", "round", "fingerprint"):
            assert mine[key] == theirs[key], key


def test_killed_between_rounds_and_inside_one(alone: Case, tmp_path: Path, base: Path) -> None:
    case = small(tmp_path, base)
    killed(case, StepLog, "note", lambda log, step, *_: "rounds/2/" in str(log.path) and step == 7, *THREE)
    assert not (case.run / "rounds/2/merged/record.json").exists()
    killed(case, run_rounds, "merge_round", lambda session, scope, number: number == 2, *THREE)
    assert (case.run / "rounds/2/merged/record.json").exists()
    assert not (case.run / "branches").exists()
    run(case, *THREE)
    same_end(case, alone)


def test_what_is_left_on_the_disk_and_what_the_records_count(alone: Case) -> None:
    assert {path.parent.name for path in alone.run.glob("rounds/*/branches/*/model")} == set()
    assert [path.parent.parent.name for path in alone.run.glob("rounds/*/merged/model")] == ["2"]
    assert {path.parent.parent.parent.name for path in alone.run.glob("rounds/*/branches/*/state")} == {"2"}
    record = read(alone.run / "rounds/1/merged/record.json")
    size = (alone.run / "rounds/2/merged/model/model.safetensors").stat().st_size
    assert record["missing"] == []
    assert record["bytes_out"] == 2 * size
    assert record["bytes_in"] == 2 * size
    rows = read(alone.run / "mixture/datasets.json")
    trained = [read(alone.run / f"branches/{k}/record.json") for k in (0, 1)]
    assert sum(item["target_tokens"] for item in trained) == 3 * sum(item["target_tokens"] for item in rows)
    assert sum(item["samples"] for item in trained) == 3 * sum(item["rows"] for item in rows)
    counts = read(alone.run / "merged/record.json")["counts"]
    assert counts == [item["round"]["tokens"] for item in trained]


def test_a_changed_setting_is_refused_and_the_same_run_is_done(alone: Case) -> None:
    again = call(*words(alone, "run", *THREE), "--until", "merge")
    assert again.code == 0
    changed = call(*words(alone, "run", *THREE, "train.learning_rate=1e-3"), "--until", "merge")
    assert changed.code == 2
    assert "learning_rate" in changed.err
    status = json.loads(call("status", alone.run, "--json").out)
    assert {row["state"] for row in status["stages"] if row["kind"] in ("round", "branch", "merged")} == {"done"}


def test_branches_elsewhere_and_one_that_is_missing(tmp_path: Path, base: Path) -> None:
    case = small(tmp_path, base)
    result = call(*words(case, "run", "train.rounds=2"), "--until", "split")
    assert result.code == 0, result.err
    extra = [word for item in SETTINGS for word in ("--set", item)]
    assert call("train", case.run, "--branch", 0, "--quiet", *extra).code == 0
    assert (case.run / "rounds/1/branches/0/record.json").is_file()
    early = call("train", case.run, "--branch", 0, "--round", 2, "--quiet", *extra)
    assert early.code == 2
    assert "--round 1" in early.err
    refused = call("merge", case.run, "--round", 1, "--quiet", *extra)
    assert refused.code == 2
    assert "branches 1 of round 1" in refused.err
    merged = call("merge", case.run, "--round", 1, "--allow-missing", "--quiet", *extra)
    assert merged.code == 0, merged.err
    record = read(case.run / "rounds/1/merged/record.json")
    assert record["missing"] == [1]
    assert record["weights"] == [1.0]
    run(case, "train.rounds=2")
    first, second = (read(case.run / f"branches/{k}/record.json") for k in (0, 1))
    assert second["tokens"] == second["round"]["tokens"]
    assert first["tokens"] > first["round"]["tokens"]
    assert read(case.run / "merged/record.json")["counts"] == [first["round"]["tokens"], second["round"]["tokens"]]


def test_a_branch_that_fails_is_left_out_when_that_is_allowed(tmp_path: Path, base: Path) -> None:
    case = small(tmp_path, base)
    foreign = case.run / "rounds/1/branches/1/mine.txt"
    for _ in range(2):
        foreign.parent.mkdir(parents=True, exist_ok=True)
        foreign.write_text("a user's file")
        (case.run / ".merit").touch()
        result = call(*words(case, "run", "train.rounds=2"), "--until", "merge")
        assert result.code == 2
        assert "files that the" in result.err
    run(case, "train.rounds=2", "train.between.allow_missing=true")
    assert read(case.run / "rounds/1/merged/record.json")["missing"] == [1]
    assert foreign.read_text() == "a user's file"


def test_new_splits_keep_every_datasets_budget(tmp_path: Path, base: Path) -> None:
    case = make_case(tmp_path, base, mixture=FEW, conflict={"examples": 8, "sketch_size": 256})
    run(case, "train.rounds=2", "train.between.resplit=true", "train.epochs=1.5")
    seen: Counter[str] = Counter()
    for k in (0, 1):
        for line in (case.run / f"branches/{k}/log.jsonl").read_text().splitlines():
            seen.update({name: targets for name, (_, targets) in json.loads(line)["datasets"].items()})
    groups = [read(case.run / folder / "split.json")["groups"] for folder in ("split", "rounds/2/split")]
    names = [sorted(name for group in one for name in group) for one in groups]
    assert names[0] == names[1] == sorted(FEW["include"])
    trained = [read(case.run / f"branches/{k}/record.json") for k in (0, 1)]
    assert sum(item["samples"] for item in trained) == sum(24 for _ in names[0])
    assert sum(seen.values()) == sum(item["target_tokens"] for item in trained)
    assert [item["settings"]["group"] for item in trained] == groups[1]


def test_more_rounds_than_steps_are_refused_before_training(tmp_path: Path, base: Path) -> None:
    case = small(tmp_path, base)
    result = call(*words(case, "run", "train.rounds=50"), "--until", "merge")
    assert result.code == 2
    assert "only 4 steps" in result.err
    assert not (case.run / "rounds").exists()


def test_one_round_is_a_run_without_the_key(tmp_path: Path, base: Path) -> None:
    case = small(tmp_path, base)
    runs = {}
    for name, overrides in (("without", ()), ("one", ("train.rounds=1",))):
        runs[name] = tmp_path / name
        result = call(*words(case, "run", *overrides)[:2], "--output", runs[name], *words(case, "run", *overrides)[4:],
                      "--until", "merge")  # fmt: skip
        assert result.code == 0, result.err
    without, one = runs["without"], runs["one"]
    assert not (one / "rounds").exists()
    for folder in ("branches/0", "branches/1", "merged"):
        files = [(run / folder / "model" / "model.safetensors").read_bytes() for run in (without, one)]
        assert files[0] == files[1], folder
        records = [read(run / folder / "record.json") for run in (without, one)]
        for key in ("inputs", "settings", "fingerprint"):
            assert records[0][key] == records[1][key], (folder, key)
        assert records[0].keys() == records[1].keys()
    for folder in ("branches/0", "branches/1"):
        logs = [(run / folder / "log.jsonl").read_bytes() for run in (without, one)]
        assert logs[0] == logs[1], folder
