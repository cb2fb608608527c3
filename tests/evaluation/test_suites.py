"""Suites: what they stand for, and what is said to be missing, for each task."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from merit.errors import RecipeError, ResourceError
from merit.evaluation.harness import scores_of, write_local_task
from merit.evaluation.lmms import check_lmms, command, run_lmms
from merit.evaluation.suites import (
    PAPER_TEXT,
    PAPER_VISION,
    Task,
    check_suites,
    expand,
    headline,
    local_tasks,
    problems,
)
from merit.recipe.suites import HarnessSettings


def test_named_suites_are_the_papers_eight_each() -> None:
    text, vision = expand(["paper_text", "paper_vision", "lmms/ai2d", "lmms/other", "piqa", "/x/own.jsonl"])
    assert len(PAPER_TEXT) == len(PAPER_VISION) == 8
    assert text == [*PAPER_TEXT, Task("piqa")]
    assert vision == [*PAPER_VISION, Task("other")]
    assert local_tasks(["piqa", "/x/own.jsonl"]) == [Path("/x/own.jsonl")]


def test_everything_that_is_missing_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    said = "\n".join(problems([*PAPER_TEXT, *PAPER_VISION], HarnessSettings(), token=False))
    assert "humaneval runs code that the model wrote" in said
    assert "https://huggingface.co/datasets/Idavidrein/gpqa and set HF_TOKEN" in said
    for judged in ("mmvet", "mathvista_testmini", "llava_in_the_wild"):
        assert f"{judged} is scored by a judge" in said
    for needed in (
        "hellaswag needs Rowan/hellaswag",
        "ai2d needs lmms-lab-encoder/ai2d",
        "the metric evaluate-metric/code_eval",
    ):
        assert needed in said
    ready = HarnessSettings(run_code=True, judge="local", judge_url="http://localhost:1/v1")
    (tmp_path / "hub" / "datasets--openai--openai_humaneval").mkdir(parents=True)
    (only,) = problems([task for task in PAPER_TEXT if task.code], ready, token=True)
    assert "the metric evaluate-metric/code_eval, which is not in this machine's cache" in only
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert problems([*PAPER_TEXT, *PAPER_VISION], ready, token=True) == []


def test_a_vision_dataset_that_is_not_here_is_named_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(RecipeError, match="ai2d needs lmms-lab-encoder/ai2d, which is not"):
        check_lmms([task for task in PAPER_VISION if task.name == "ai2d"], HarnessSettings(lmms_python=sys.executable))


def test_misspelt_and_missing_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="paper_text"):
        check_suites(["paper_texts"])
    with pytest.raises(RecipeError, match="does not exist"):
        check_suites([str(tmp_path / "none.jsonl")])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "a"}], "line 1"),
        ([{"question": "a", "choices": ["x"], "answer": 1}], "line 1"),
        ([{"question": "a", "answer": "b"}, {"question": "a", "choices": ["x"], "answer": 0}], "both forms"),
        ([], "no rows"),
    ],
)
def test_rows_of_neither_form_are_refused_by_line(tmp_path: Path, rows: list[object], said: str) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecipeError, match=said):
        write_local_task(file, tmp_path / "tasks")


def test_a_yaml_task_finds_its_files_next_to_it(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n"
    )
    assert write_local_task(tmp_path / "own.yaml", tmp_path / "tasks") == "mine"
    assert str(tmp_path / "rows.jsonl") in (tmp_path / "tasks" / "own.yaml").read_text()


def test_scores_are_plain_and_name_their_filter() -> None:
    found = scores_of({"t": {"alias": "t", "acc,none": 0.5, "exact_match,strip": 1, "acc_stderr,none": "N/A"}})
    assert found == {"t": {"acc": 0.5, "exact_match/strip": 1.0}}


def test_a_tasks_headline_is_its_first_score_that_is_better_high() -> None:
    scores = {
        "piqa": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.75},
        "wikitext": {"word_perplexity": 9.0},
        "say": {"perplexity/strip": 3.0, "exact_match/strip": 1.0},
    }
    assert headline(scores) == {"piqa acc": 0.5, "say exact_match/strip": 1.0, "suites, mean": 0.75}
    assert headline({"piqa": scores["piqa"]}) == {"piqa acc": 0.5}
    assert headline({}) == {}


# ---- lmms-eval, by a stand-in that reads its command line and writes its file ---------------------------------------

STAND_IN = """
import json, os, pathlib, sys
words = sys.argv
assert words[1:3] != [], words
place = pathlib.Path(words[words.index("--output_path") + 1]) / "model"
place.mkdir(parents=True)
tasks = words[words.index("--tasks") + 1].split(",")
if "broken" in tasks:
    sys.exit("RuntimeError: broken")
judge = os.environ.get("MODEL_VERSION", "")
results = {task: {"acc,none": 0.25, "alias": task} for task in tasks}
(place / "20260101_results.json").write_text(json.dumps({"results": results, "lmms_eval_version": "0.7.3 " + judge}))
"""


@pytest.fixture
def lmms(tmp_path: Path) -> HarnessSettings:
    """A Python whose lmms_eval module is the stand-in."""
    module = tmp_path / "site" / "lmms_eval"
    module.mkdir(parents=True)
    (module / "__init__.py").touch()
    (module / "__main__.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return HarnessSettings(
        lmms_python=str(python), judge="tiny", judge_url="http://localhost:1/v1", batch_size=2, limit=3
    )


def test_vision_suites_run_in_their_own_environment(
    tmp_path: Path, lmms: HarnessSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    check_lmms(PAPER_VISION, lmms)
    scores, version = run_lmms(tmp_path / "merged", "llava", PAPER_VISION, lmms, tmp_path / "out")
    assert scores == {task.name: {"acc": 0.25} for task in PAPER_VISION}
    assert version == "0.7.3 tiny"  # the judge reached the harness
    words = command(tmp_path / "merged", "llava", PAPER_VISION[:1], lmms, tmp_path)
    assert words[words.index("--batch_size") + 1] == "2"
    assert words[words.index("--limit") + 1] == "3"


def test_a_harness_that_fails_says_why_and_where(tmp_path: Path, lmms: HarnessSettings) -> None:
    with pytest.raises(ResourceError, match="broken"):
        run_lmms(tmp_path / "merged", "llava", [Task("broken")], lmms, tmp_path / "out")
    assert "broken" in (tmp_path / "out" / "log.txt").read_text()


def test_without_an_environment_or_a_class_it_is_refused(tmp_path: Path, lmms: HarnessSettings) -> None:
    with pytest.raises(ResourceError, match="lmms_python"):
        check_lmms(PAPER_VISION, HarnessSettings())
    with pytest.raises(RecipeError, match="qwen2_vl"):
        command(tmp_path, "qwen2_vl", PAPER_VISION, lmms, tmp_path)
