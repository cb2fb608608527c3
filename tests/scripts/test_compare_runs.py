"""The proof that two runs are the same: it accepts equal runs and notices one changed value of every kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pyarrow import Table, parquet

import compare_runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "old"
    for name in ("mixture/a", "conflict", "split", "branches/0/model", "baselines/random/split", "evaluation"):
        (folder / name).mkdir(parents=True)
    rows = {"input_ids": [[1, 2], [3]], "images": [["x"], ["y"]]}
    parquet.write_table(Table.from_pydict(rows), folder / "mixture/a/train.parquet")
    arrays = {"names": np.array(["a"]), **{name: np.ones((1, 1)) for name in compare_runs.GEOMETRY[1:]}}
    np.savez(folder / "conflict/geometry.npz", **arrays)
    for name in ("split", "baselines/random/split"):
        (folder / name / "split.json").write_text(json.dumps({"groups": [["a"], ["b"]]}))
    log = [{"loss": 2.0, "target_tokens": 5}, {"loss": 1.0, "target_tokens": 4}]
    (folder / "branches/0/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (folder / "branches/0/model/model.safetensors").write_bytes(b"weights")
    (folder / "evaluation/results.json").write_text(json.dumps({"base": {"a": {"loss": 1.5}}}))
    return folder


def rewritten(name: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text((run / name).read_text().replace(old, new, 1))


CHANGES: dict[str, Callable[[Path], object]] = {
    "mixture/a/train.parquet": lambda run: parquet.write_table(
        Table.from_pydict({"input_ids": [[1, 2], [4]], "images": [["x"], ["y"]]}), run / "mixture/a/train.parquet"
    ),
    "conflict/geometry.npz": lambda run: np.savez(
        run / "conflict/geometry.npz",
        **{**np.load(run / "conflict/geometry.npz"), "gram": np.ones((1, 1)) + 1e-15},
    ),
    "split/split.json": rewritten("split/split.json", '"a"', '"c"'),
    "baselines/random/split/split.json": rewritten("baselines/random/split/split.json", '"a"', '"c"'),
    "branches/0/log.jsonl": rewritten("branches/0/log.jsonl", "2.0", "2.00001"),
    "branches/0/model/model.safetensors": lambda run: (run / "branches/0/model/model.safetensors").write_bytes(b"x"),
    "evaluation/results.json": rewritten("evaluation/results.json", "1.5", "1.50000001"),
}


def test_equal_runs_are_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "new")
    assert compare_runs.main([str(run), str(tmp_path / "new")]) == 0
    assert f"{len(CHANGES)} of {len(CHANGES)}" in capsys.readouterr().out
    rewritten("branches/0/log.jsonl", "2.0", "2.000001")(tmp_path / "new")
    assert compare_runs.main([str(run), str(tmp_path / "new")]) == 0, "within the tolerance"


@pytest.mark.parametrize("name", CHANGES)
def test_one_changed_value_is_noticed(name: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "new")
    CHANGES[name](tmp_path / "new")
    assert [item.what for item in compare_runs.compare(run, tmp_path / "new") if not item.same] == [name]
    (tmp_path / "new" / name).unlink()
    assert [item.what for item in compare_runs.compare(run, tmp_path / "new") if not item.same] == [name]


def test_folders_without_a_run_are_not_the_same(tmp_path: Path) -> None:
    assert compare_runs.main([str(tmp_path), str(tmp_path)]) == 1
