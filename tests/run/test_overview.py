"""The status of a folder also lists diagnostics, suites and a study, from their records alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from merit.recipe.load import parse_recipe
from merit.recipe.schema import Recipe
from merit.run import key
from merit.run.overview import folder_status
from merit.run.scope import study_scopes
from merit.run.status import Row
from merit.run.store import Stage
from merit.split.result import Split


def recipe(**changes: Any) -> Recipe:
    study = {"methods": ["base", "joint", "wise_ft", "own"], "seeds": 2}
    blocks = {"name": "x", "model": {"base": "/b"}, "mixture": {"folder": "/d"}, "split": {"axes": 1}, "study": study}
    return parse_recipe(blocks | changes)


def rows(run: Path, chosen: Recipe) -> dict[str, Row]:
    return {row.stage: row for row in folder_status(run, chosen).stages}


def finish(stage: Stage, **facts: Any) -> None:
    with stage.writing(0) as told:
        told.update(facts)


def test_diagnostics_and_suites_are_listed_once_begun(tmp_path: Path) -> None:
    assert not {"diagnostic", "suites"} & {row.kind for row in rows(tmp_path, recipe()).values()}
    branch = Stage("branch", tmp_path / "branches" / "0")
    finish(branch, steps=3, target_tokens=9, model_fingerprint="new")
    finish(key.diagnostic_stage(recipe(), tmp_path, "gain", {"branch-0": "new"}), verdict="ready", reason="r")
    finish(key.diagnostic_stage(recipe(), tmp_path, "gap", {"branch-0": "old"}), verdict="doubtful", reason="r")
    finish(key.probe_stage(recipe(), tmp_path, {"base": "b"}), verdict="ready", reason="r")
    finish(key.suites_stage(recipe(), tmp_path, "merged", {}))
    (tmp_path / "diagnostics" / "surface" / "half").mkdir(parents=True)
    found = rows(tmp_path, recipe())
    assert (found["diagnostic gain"].state, found["diagnostic gain"].detail) == ("done", "ready")
    assert (found["diagnostic gap"].state, found["diagnostic gap"].changed) == (
        "stale",
        ['input.branch-0: "old" -> "new"'],
    )
    assert (found["diagnostic probe"].state, found["diagnostic surface"].state) == ("done", "partial")
    assert found["suites of merged"].state == "done"
    other = rows(tmp_path, recipe(train={"learning_rate": 0.5}))
    assert other["diagnostic probe"].changed
    assert other["diagnostic gain"].state == "done", "a diagnostic of models that are there asks for no training"


def test_a_studys_stages_are_listed_one_by_one_until_they_are_done(tmp_path: Path) -> None:
    """What is complete stands in one row; a changed recipe names the split that no longer matches."""
    chosen = recipe()
    (tmp_path / "study").mkdir()
    assert {row.state for row in rows(tmp_path, chosen).values()} == {"missing"}
    assert [name for name in rows(tmp_path, chosen) if name.startswith("s1 ") or name.startswith("s1/")] == [
        *("s1 gradients", "s1/joint split", "s1/joint branch 0", "s1/pca-1d split", "s1/pca-1d branch 0"),
        *("s1/pca-1d branch 1", "s1 merge wise_ft", "s1 merge pca-1d", "s1 line of joint", "s1 line of pca-1d"),
    ]
    assert not {"split", "branch 0", "merged", "evaluation"} & set(rows(tmp_path, chosen))
    for scope in study_scopes(chosen, tmp_path):
        own = scope.recipe(chosen)
        groups = [["a"], ["b"]] if own.group_count == 2 else [["a", "b"]]
        with key.split_stage(own, scope, rows={}, geometry=None).writing(scope.seed):
            axes = own.group_count - 1
            Split("pca", axes, "samples", groups, [1.0] * len(groups), [], [], None, []).save(scope.root / "split")
        for k, group in enumerate(groups):
            made = key.branch_stage(own, scope, k, group, base="b", rows={"a": "1", "b": "2"})
            finish(made, steps=3, target_tokens=9, model_fingerprint=f"{scope.method}/{k}")
    found = rows(tmp_path, chosen)
    assert (found["s0/pca-1d"].state, found["s0/pca-1d"].detail) == ("done", "2 branches")
    assert found["s0/pca-1d"].bytes == sum(
        file.stat().st_size for file in (tmp_path / "study/s0/pca-1d").rglob("*") if file.is_file()
    )
    assert found["s0 merge pca-1d"].state == "missing"
    shutil.rmtree(tmp_path / "study/s1/pca-1d/branches/1")
    found = rows(tmp_path, chosen)
    assert (found["s1/pca-1d branch 0"].state, found["s1/pca-1d branch 1"].state) == ("done", "missing")
    stale = rows(tmp_path, recipe(split={"axes": 1, "balance": "tokens"}))
    assert stale["s0/pca-1d split"].changed == ['split.balance: "samples" -> "tokens"']
    assert stale["s0/joint"].state == "done"
