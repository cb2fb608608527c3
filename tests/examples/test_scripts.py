"""The notebook and the shell examples run, on a tiny base and tiny datasets."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
from tests.builders import TASKS, make_base, task_rows, write_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow


def cells() -> list[str]:
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"]), "kept without outputs"
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, object] = {}
    for number, source in enumerate(cells()):
        exec(compile(source, f"cell {number}", "exec"), names)
    assert names["result"].verdict.sentences
    assert len(names["split"].groups) == 2
    assert capsys.readouterr().out


@pytest.fixture
def here(base: Path, tmp_path, monkeypatch):
    """A working directory with data, and the variables that the scripts read."""
    for seed, task in enumerate(TASKS):
        write_rows(tmp_path / "data" / task / "train.jsonl", task_rows(task, 20, seed))
        write_rows(tmp_path / "data" / task / "test.jsonl", task_rows(task, 4, 90 + seed))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASE", str(base))
    monkeypatch.setenv("DATA", "data")
    for name, seed in (("A", 1), ("B", 2)):
        make_base(tmp_path / name, seed=seed)
        monkeypatch.setenv(name, name)
    return tmp_path


@pytest.mark.parametrize(
    ("script", "leaves"),
    [
        ("own_jsonl.sh", ["own.html", "runs/own/merged/model/model.safetensors"]),
        ("axolotl_branches.sh", ["branch-0/axolotl.yaml", "branch-1/README.md"]),
        ("merge_checkpoints.sh", [f"merged-{name}/model.safetensors" for name in ("average", "ties", "less")]),
        pytest.param("study.sh", ["study.html", "runs/study/study/table.md"], marks=pytest.mark.exhaustive),
    ],
)
def test_a_script_runs(script, leaves, here, merit):
    for line in (EXAMPLES / script).read_text(encoding="utf-8").splitlines():
        if line.startswith("merit "):
            words = shlex.split(os.path.expandvars(line))[1:]
            done = merit(*words)
            assert done.code == 0, f"{line}\n{done.err}"
            if words[0] == "init":  # the tiny base has a context of 128 tokens
                recipe = here / "recipe.yaml"
                recipe.write_text(recipe.read_text().replace("max_length: 2048", "max_length: 96"))
    for name in leaves:
        assert (here / name).is_file(), name
