"""A stage's fingerprint depends on files and settings, never on what a process did before.

On commit f5727a1 each of these runs ends with exit 2 at the first branch that a worker process trains: the fingerprint of
the mixture held the padding state of a live tokenizer, which `check` had reset in the parent and nobody in the worker.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import Table, parquet
from tests.builders import call, make_base, task_rows, write_rows

from merit.demo import write_demo

LITTLE = (
    "mixture.samples=4",
    "conflict.examples=2",
    "split.axes=1",
    "train.threads=1",
    "baselines=[]",
    "evaluate={heldout: true, exact_match: never, max_examples: 1, drift: {prompts: 0}}",
)
SOME = {
    "words": ("mixture.include=[add_chat, add_short, compare_chat, contains_label]",),
    "pictures": ("mixture.include=[colour_word, two_colours, shape_word, digit_short]",),
}


def merit(*words: Any) -> str:
    """A command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "merit", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def real_files(folder: Path) -> Path:
    """Files as people have them: four forms, one cut by a column, and a tokenizer that was saved while it padded left."""
    data = folder / "data"
    write_rows(data / "upper.jsonl", task_rows("upper", 12, seed=0))
    pairs = [[turn["content"] for turn in row["messages"]] for row in task_rows("first", 12, seed=0)]
    with (data / "first.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), *pairs])
    pairs = [[turn["content"] for turn in row["messages"]] for row in task_rows("reverse", 12, seed=0)]
    parquet.write_table(
        Table.from_pylist([{"instruction": q, "input": "", "output": a} for q, a in pairs]), data / "reverse.parquet"
    )
    shared = [{**row, "task": task} for task in ("last", "double") for row in task_rows(task, 12, seed=0)]
    write_rows(data / "shared.jsonl", shared)
    base = make_base(folder / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    padding = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None}
    tokenizer["padding"] = padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    tokenizer["truncation"] = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    files = [{"name": name, "path": f"data/{name}"} for name in ("upper.jsonl", "first.csv", "reverse.parquet")]
    files.append({"name": "shared", "path": "data/shared.jsonl", "split_by": "task"})
    recipe = {
        "name": "real",
        "model": {"base": "base", "dtype": "float32"},
        "mixture": {"datasets": files},
        "train": {"learning_rate": 1e-3, "batch_size": 4, "max_length": 96},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def records(run: Path) -> dict[str, Any]:
    """What decided every stage's answer."""
    found = {str(file.parent.relative_to(run)): json.loads(file.read_text()) for file in run.rglob("record.json")}
    return {stage: {key: record[key] for key in ("fingerprint", "inputs")} for stage, record in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["words", "pictures", "real files"])
def test_histories_do_not_matter(kind: str, tmp_path: Path) -> None:
    recipe = real_files(tmp_path) if kind == "real files" else write_demo(tmp_path, vision=kind == "pictures")
    little = [word for text in (*LITTLE, *SOME.get(kind, ())) for word in ("--set", text)]
    workers, alone = tmp_path / "workers", tmp_path / "alone"
    merit("run", recipe, "--output", workers, "--jobs", 2, "--quiet", *little)  # checks, then trains in workers
    stages = records(workers)
    assert {"mixture", "conflict", "split", "branches/0", "branches/1", "merged", "evaluation"} <= set(stages)

    shutil.copytree(workers, alone)
    for folder in ("branches", "merged", "evaluation"):
        shutil.rmtree(alone / folder)
    merit("train", alone, "--branch", 1)  # the first thing that this process does
    for words in (("gradients",), ("check",), ("run", "--quiet")):  # in a process that did many things before
        assert call(words[0], alone, *words[1:]).code == 0
    assert records(alone) == stages
    for run in (workers, alone):
        assert {row["state"] for row in json.loads(call("status", run, "--json").out)["stages"]} == {"done"}
