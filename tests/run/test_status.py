"""The status is read from records alone, and says what is done, stale, damaged or of another version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merit.errors import RunFolderError
from merit.files import write_json
from merit.recipe.load import parse_recipe
from merit.recipe.schema import Recipe
from merit.run import key
from merit.run.status import Known, Row, run_status


def recipe(**train: object) -> Recipe:
    return parse_recipe(
        {
            "name": "x",
            "model": {"base": "/base"},
            "mixture": {"folder": "/data"},
            "train": train,
            "baselines": ["joint"],
        }
    )


def rows(run: Path, chosen: Recipe, known: Known | None = None) -> dict[str, Row]:
    return {row.stage: row for row in run_status(run, chosen, known).stages}


def finish_mixture(run: Path, chosen: Recipe) -> Path:
    stage = key.mixture_stage(chosen, run, tokenizer="t" * 64, sources={"a": "s" * 64})
    with stage.writing(0):
        (stage.path / "datasets.json").write_text('[{"name": "a", "fingerprint": "f"}]')
    return stage.record_file


def test_an_empty_folder_misses_everything(tmp_path: Path) -> None:
    found = rows(tmp_path, recipe())
    assert {row.state for row in found.values()} == {"missing"}
    assert [*found] == [
        *("mixture", "gradients", "split", "branch 0", "branch 1", "branch 2", "branch 3", "merged"),
        *("joint split", "joint branch 0", "evaluation"),
    ]


def test_a_stage_is_done_until_a_setting_or_a_known_input_changes(tmp_path: Path) -> None:
    finish_mixture(tmp_path, recipe())
    assert rows(tmp_path, recipe())["mixture"].state == "done"
    assert rows(tmp_path, recipe(learning_rate=0.5))["mixture"].state == "done"
    stale = rows(tmp_path, recipe(max_length=64))["mixture"]
    assert (stale.state, stale.changed) == ("stale", ["train.max_length: 2048 -> 64"])
    same = Known(tokenizer="t" * 64, sources={"a": "s" * 64})
    assert rows(tmp_path, recipe(), same)["mixture"].state == "done"
    other = rows(tmp_path, recipe(), Known(tokenizer="u" * 64))["mixture"]
    assert other.changed == ["input.tokenizer: tttttttttttt… -> uuuuuuuuuuuu…"]
    more = rows(tmp_path, recipe(), Known(sources={"a": "s" * 64, "b": "s" * 64}))["mixture"]
    assert more.changed == ['input.source of b: "absent" -> ssssssssssss…'] or "source of b" in more.changed[0]


def test_a_damaged_record_is_a_state_and_not_an_error(tmp_path: Path) -> None:
    finish_mixture(tmp_path, recipe()).write_text("{")
    row = rows(tmp_path, recipe())["mixture"]
    assert row.state == "damaged"
    assert "record.json" in row.detail


def test_a_run_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    record = finish_mixture(tmp_path, recipe())
    write_json(record, {**json.loads(record.read_text()), "format": 1})
    with pytest.raises(RunFolderError, match="another version of MERIT"):
        run_status(tmp_path, recipe())


def test_a_detached_branch_is_told_from_the_folder_that_it_was_exported_to(tmp_path: Path) -> None:
    for name in ("1", "joint-0"):
        write_json(tmp_path / "detached" / name / "branch.json", {})
    told = {"step": 3, "steps": 8, "loss": 1.5, "machine": "one", "time": 0.0}
    write_json(tmp_path / "detached" / "1" / "branch" / "progress.json", told)
    found = rows(tmp_path, recipe())
    assert (found["branch 0"].state, found["branch 0"].detail) == ("missing", "")
    assert (found["branch 1"].state, found["branch 1"].detail) == ("partial", "exported; step 3 of 8")
    assert found["branch 1"].live is not None
    assert found["branch 1"].live.machine == "one"
    assert (found["joint branch 0"].state, found["joint branch 0"].detail) == ("partial", "exported")
    write_json(tmp_path / "detached" / "1" / "branch" / "record.json", {})
    assert rows(tmp_path, recipe())["branch 1"].detail == "exported; trained, not taken back yet"
    (tmp_path / "detached" / "1" / "branch.json").unlink()  # before, the branch looked as if it had never been exported
    assert "1/branch.json is missing" in rows(tmp_path, recipe())["branch 1"].detail


def test_what_was_begun_is_partial(tmp_path: Path) -> None:
    (tmp_path / "conflict" / "partial").mkdir(parents=True)
    assert rows(tmp_path, recipe())["gradients"].state == "partial"
