"""A dataset more or less: one branch is trained again, the others are not touched, and adding is undone by removing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.builders import Case, call, make_case, read, task_rows, weights, write_rows

from merit.run import training

FEW = {"folder": "mixture", "include": ["upper", "first", "last", "length"], "samples": 16}
QUIET = {"heldout": False, "drift": {"prompts": 0}}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Case:
    """A finished run of four datasets in two branches."""
    folder = tmp_path_factory.mktemp("first")
    conflict = {"examples": 8, "sketch_size": 256}
    case = make_case(folder, base, mixture=FEW, conflict=conflict, evaluate=QUIET, baselines=["random"])
    result = call("run", case.recipe, "--output", case.run, "--quiet")
    assert result.code == 0, result.err
    return case


@pytest.fixture
def run(first: Case, tmp_path: Path) -> Path:
    """A copy of it to change, and a dataset next to it."""
    shutil.copytree(first.run, tmp_path / "run")
    write_rows(tmp_path / "double" / "train.jsonl", task_rows("double", 16, seed=0))
    write_rows(tmp_path / "double" / "test.jsonl", task_rows("double", 4, seed=1))
    return tmp_path / "run"


def add(run: Path, *words: Any) -> Any:
    result = call("add", run, run.parent / "double", "--quiet", "--json", *words)
    assert result.code == 0, result.err
    return json.loads(result.out)


def remove(run: Path, name: str) -> Any:
    result = call("remove", run, name, "--quiet", "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def models(run: Path) -> dict[str, dict[str, np.ndarray]]:
    return {str(path.relative_to(run)): weights(path) for path in run.glob("branches/*/model")} | {
        "merged": weights(run / "merged" / "model")
    }


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in other)


def later_commands_find_it_done(run: Path) -> None:
    """Only the evaluation, which follows the models by itself, is of before."""
    status = json.loads(call("status", run, "--json").out)
    left = [row for row in status["stages"] if row["state"] != "done" and row["kind"] != "evaluation"]
    assert not left
    models = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    again = call("run", run, "--quiet")
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == models


def test_added_and_removed_again_every_branch_is_as_it_was(run: Path) -> None:
    before, groups = models(run), read(run / "split/split.json")["groups"]
    records = {k: read(run / f"branches/{k}/record.json")["checksum"] for k in (0, 1)}
    statement = add(run)
    k = statement["branch"]
    assert statement["scores"] is not None
    assert "double" in statement["group"]
    assert statement["seconds"] > 0
    assert "double" in read(run / "split/split.json")["groups"][k]
    assert statement["unchanged"] == {f"branches/{1 - k}": records[1 - k]}
    assert statement["retrained"][f"branches/{k}"][0] == records[k]
    changed = models(run)
    assert not same(changed[f"branches/{k}/model"], before[f"branches/{k}/model"])
    assert same(changed[f"branches/{1 - k}/model"], before[f"branches/{1 - k}/model"])
    later_commands_find_it_done(run)
    statement = remove(run, "double")
    assert "No other branch ever saw it" in statement["sentences"][1]
    assert "which datasets are grouped together was chosen with its gradient" in statement["sentences"][2]
    assert statement["unchanged"] == {f"branches/{1 - k}": records[1 - k]}
    after = models(run)
    assert after.keys() == before.keys()
    assert all(same(after[name], before[name]) for name in before)
    assert read(run / "split/split.json")["groups"] == groups
    assert [path.name for path in sorted((run / "changes").glob("*"))] == [
        "001-add-double.json",
        "002-remove-double.json",
    ]
    assert not (run / "change.json").exists()
    assert not (run / "mixture/train/double.parquet").exists()
    later_commands_find_it_done(run)


def test_an_interrupted_addition_goes_on_and_nothing_else_may_run(run: Path) -> None:
    child = os.fork()
    if child == 0:
        original = training.train_branch

        def dying(*args: Any, **kwargs: Any) -> Any:
            original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        training.train_branch = dying
        try:
            add(run, "--branch", 0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    refused = call("run", run, "--quiet")
    assert refused.code == 2
    assert "merit add" in refused.err
    assert "not finished" in call("remove", run, "upper", "--quiet").err
    other = call("add", run, run.parent / "double", "--quiet", "--set", "train.learning_rate=1e-4")
    assert other.code == 2
    assert "train.learning_rate: 0.005 -> 0.0001" in other.err
    statement = add(run, "--set", "train.checkpoint_minutes=7")  # what was asked for the first time is done
    assert statement["branch"] == 0
    assert statement["scores"] is None
    assert "checkpoint_minutes: 7" in (run / "recipe.yaml").read_text()
    later_commands_find_it_done(run)


def test_a_branch_of_its_own_comes_and_goes(run: Path) -> None:
    before = models(run)
    statement = add(run, "--own-branch")
    assert (statement["branch"], statement["group"]) == (2, ["double"])
    assert len(read(run / "merged/record.json")["weights"]) == 3
    later_commands_find_it_done(run)
    remove(run, "double")
    assert not (run / "branches/2").exists()
    assert all(same(model, before[name]) for name, model in models(run).items())
    later_commands_find_it_done(run)


def test_removing_one_of_the_first_datasets_leaves_the_others_branch_alone(run: Path) -> None:
    groups = read(run / "split/split.json")["groups"]
    k = next(k for k, group in enumerate(groups) if len(group) > 1)
    name = groups[k][0]
    statement = remove(run, name)
    assert statement["branch"] == k
    assert f"branches/{1 - k}" in statement["unchanged"]
    assert set(statement["retrained"]) == {f"branches/{k}", "merged", "split"}
    record = read(run / f"branches/{k}/record.json")
    assert not [key for key in record["inputs"] if key.endswith(f" {name}")]
    assert name not in read(run / f"branches/{k}/record.json")["settings"]["group"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("remove", "nothing"), "none of the run's branches"),
        (("add", "double", "--name", "upper"), "has a dataset of that name"),
        (("add", "double", "--branch", "7"), "--branch 7"),
        (("add", "missing"), "missing"),
        (("add", "double", "--set", "train.learning_rate=1e-4"), "train.learning_rate: 0.005 -> 0.0001"),
        (("remove", "upper", "--set", "train.learning_rate=1e-4"), "train.learning_rate: 0.005 -> 0.0001"),
        (("remove", "upper", "--set", "train.no_such=1"), "no_such"),
    ],
)
def test_what_cannot_be_changed_is_refused_before_anything_is(run: Path, words: tuple[str, ...], said: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("record.json")}
    command, name, *rest = words
    target = run.parent / name if command == "add" else name
    result = call(command, run, target, "--quiet", *rest)
    assert result.code == 2
    assert said in result.err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("record.json")} == before
    assert not (run / "change.json").exists()


def test_a_source_that_changed_meanwhile_is_refused(first: Case, run: Path) -> None:
    file = first.folder / "mixture" / "upper" / "train.jsonl"
    old = file.read_text()
    try:
        file.write_text(old + json.dumps(task_rows("upper", 1, seed=9)[0]) + "\n")
        result = call("add", run, run.parent / "double", "--quiet")
    finally:
        file.write_text(old)
    assert result.code == 2
    assert "upper" in result.err
    assert not (run / "change.json").exists()


def test_with_rounds_no_branch_can_be_trained_again_alone(run: Path) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("rounds: 1", "rounds: 2"))
    result = call("add", run, run.parent / "double", "--quiet")
    assert result.code == 2
    assert "train.rounds" in result.err
