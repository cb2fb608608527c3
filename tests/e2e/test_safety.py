"""A user's files are never touched, and no figure is taken from a stage that no longer matches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from tests.builders import Case, make_case, read, snapshot


@pytest.mark.parametrize(
    "words",
    [
        ("run", "{folder}"),
        ("evaluate", "{folder}"),
        ("run", "{folder}/recipe.yaml", "--output", "{folder}"),
        ("gradients", "{folder}/recipe.yaml", "--output", "{folder}"),
        ("train", "{folder}/recipe.yaml", "--branch", "0", "--output", "{folder}/mixture"),
        ("demo", "--output", "{folder}"),
    ],
)
def test_a_folder_of_the_user_s_is_never_taken_for_a_run_folder(case: Case, merit, words: tuple[str, ...]) -> None:
    (case.folder / "split").mkdir()
    (case.folder / "split" / "mine.py").write_text("precious")
    before = snapshot(case.folder)
    result = merit(*(word.format(folder=case.folder) for word in words))
    assert result.code == 2, result.err
    assert "run folder" in result.err
    assert snapshot(case.folder) == before


def test_files_in_a_stage_s_place_are_refused(case: Case, merit) -> None:
    case.run.mkdir()
    (case.run / ".merit").touch()
    (case.run / "split").mkdir()
    (case.run / "split" / "mine.py").write_text("precious")
    result = merit("run", case.recipe, "--output", case.run, "--quiet", "--until", "split")
    assert result.code == 2
    assert "did not make" in result.err
    assert (case.run / "split" / "mine.py").read_text() == "precious"


def copied(finished: Case, folder: Path) -> Path:
    shutil.copytree(finished.run, folder / "run")
    return folder / "run"


@pytest.mark.parametrize(
    "change", ["train.learning_rate=0.5", "merge.operator=uniform", "split.method=kmeans", "evaluate.max_examples=3"]
)
def test_evaluation_refuses_models_of_another_recipe(finished: Case, merit, tmp_path: Path, change: str) -> None:
    run = copied(finished, tmp_path)
    result = merit("evaluate", run, "--set", change)
    assert result.code == 2
    assert change.partition("=")[0] in result.err
    assert (run / "recipe.yaml").read_bytes() == (finished.run / "recipe.yaml").read_bytes()


def test_a_branch_made_again_makes_the_old_merge_stale(finished: Case, merit, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    settings = yaml.safe_load((run / "recipe.yaml").read_text())
    settings["train"]["learning_rate"] = 0.001
    (run / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert merit("train", run, "--branch", 0, "--redo").code == 0
    result = merit("evaluate", run)
    assert result.code == 2
    assert "train.learning_rate" in result.err, "branch 1 still is of the old recipe"


@pytest.mark.slow
def test_what_one_stage_was_told_holds_for_the_next(case: Case, merit) -> None:
    """The run folder's recipe follows what was accepted, so verdict and tables name the method that was used."""
    case.write(evaluate={"drift": {"prompts": 0}, "exact_match": "never"})
    assert merit("gradients", case.recipe, "--output", case.run).code == 0
    for words in (("split", case.run, "--set", "split.method=random"), ("train", case.run), ("merge", case.run)):
        assert merit(*words).code == 0
    assert merit("evaluate", case.run).code == 0
    assert read(case.run / "split" / "split.json")["method"] == "random"
    assert read(case.run / "evaluation" / "summary.json")["method"] == "random"
    assert yaml.safe_load((case.run / "recipe.yaml").read_text())["split"]["method"] == "random"


def test_a_partial_merge_counts_only_what_it_took_and_says_so(finished: Case, merit, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    assert merit("merge", run, "--exclude", 1, "--redo").code == 0
    shown = merit("evaluate", run)
    assert shown.code == 0, shown.err
    summary = read(run / "evaluation" / "summary.json")
    assert (
        summary["macro"]["merged"]["trained_target_tokens"]
        == read(run / "branches" / "0" / "record.json")["target_tokens"]
    )
    assert summary["about"]["merged"] == "without branch 1"
    assert "without branch 1" in shown.out


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_evaluation_refuses_damaged_models(finished: Case, merit, tmp_path: Path, damage: str) -> None:
    run = copied(finished, tmp_path)
    shutil.rmtree(run / "evaluation")
    file = run / "branches" / "0" / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-200] ^= 4
    file.write_bytes(content if damage == "flip" else content[:-200])
    result = merit("evaluate", run)
    assert result.code == 2
    assert "branches/0/model" in result.err
    assert not (run / "evaluation" / "results.json").exists()


@pytest.mark.slow
def test_a_finished_mixture_stands_in_for_sources_that_are_gone(case: Case, merit) -> None:
    assert merit("run", case.recipe, "--output", case.run, "--until", "split", "--quiet").code == 0
    shutil.rmtree(case.folder / "mixture")
    assert merit("train", case.run, "--branch", 0).code == 0
    assert merit("run", case.run, "--quiet").code == 0
    assert (case.run / "evaluation" / "results.json").is_file()


def test_changed_rows_are_named_by_dataset(finished: Case, merit, tmp_path: Path, base: Path) -> None:
    case = make_case(tmp_path, base, baselines=["joint", "random"])
    shutil.copytree(finished.run, case.run)
    with (case.folder / "mixture" / "first" / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "first of all", "completion": "a"}).replace("prompt", "prompt") + "\n")
    result = merit("run", case.recipe, "--output", case.run)
    assert result.code == 2
    assert "input.source of first" in result.err
    assert "source of last" not in result.err


def test_a_damaged_cache_of_hashes_is_made_anew(finished: Case, merit, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    (run / ".hashes.json").write_text("{")
    assert merit("evaluate", run).code == 0
    assert read(run / ".hashes.json")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("merge.options.density=0.2", "density"),
        ("model.trainable=[nothing*]", "nothing*"),
        ("model.trainable=vision", "vision"),
        ("train.device=cuda", "cuda"),
        ("train.report_to=[aim]", "aim is not installed"),
    ],
)
def test_what_later_stages_would_refuse_is_refused_by_the_check(case: Case, merit, override: str, said: str) -> None:
    result = merit("check", case.recipe, "--set", override)
    assert result.code == 2, result.out
    assert said in result.err
    assert not case.run.exists()


def test_a_place_that_cannot_be_written_is_one_message(case: Case, merit) -> None:
    result = merit("run", case.recipe, "--output", case.recipe / "below" / "a file", "--quiet")
    assert result.code == 2
    assert "Traceback" not in result.err
    (case.folder / "file").write_text("")
    assert merit("run", case.recipe, "--output", case.folder / "file").code == 2


@pytest.mark.exhaustive  # `make demo` runs it whole
def test_the_demo_command_with_little_of_everything(tmp_path: Path, merit) -> None:
    little = [f"--set={text}" for text in (
        "mixture.samples=4", "conflict.examples=2", "evaluate.max_examples=1", "evaluate.drift.prompts=1",
        "evaluate.max_new_tokens=2", "train.threads=1", "split.axes=1",
    )]  # fmt: skip
    result = merit("demo", "--output", tmp_path / "demo", "--jobs", 1, *little)
    assert result.code == 0, result.err
    for word in ("joint", "random", "merged", "kept", "drift"):
        assert word in result.out
    other = merit("demo", "--output", tmp_path / "demo", "--jobs", 1, "--seed", 1, *little)
    assert other.code == 2, "the finished run has another seed"
    assert "seed" in other.err
    assert "source of" not in other.err, "the rows are the same for every seed"


def test_status_shows_the_step_of_a_branch_that_runs(finished: Case, merit, tmp_path: Path) -> None:
    from merit.launch.job import ProgressFile
    from merit.run.store import lock

    run = copied(finished, tmp_path)
    (run / "branches" / "0" / "record.json").unlink()
    ProgressFile(run / "branches" / "0" / "progress.json")(3, 12, {})
    with lock(run / "branches" / "0", "branch 0"):
        rows = {row["stage"]: row for row in json.loads(merit("status", run, "--json").out)["stages"]}
    assert rows["branch 0"]["state"] == "running"
    assert rows["branch 0"]["detail"] == "step 3 of 12"


def test_init_schema_and_check_as_commands(tmp_path: Path, merit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert merit("init").code == 0
    assert merit("init").code == 2, "never replaced unasked"
    assert merit("init", "--force", "--json").code == 0
    assert "properties" in json.loads(merit("schema").out)
    result = merit("check", "recipe.yaml")
    assert result.code == 2
    assert "model.base and mixture.folder still have the starter recipe's placeholder" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_names_of_files_cannot_steer_the_terminal(tmp_path: Path, merit) -> None:
    """On commit f5727a1 an escape sequence in a folder's name reached the terminal as it was."""
    result = merit("run", str(tmp_path / "\x1b[31mred\x07" / "recipe.yaml"))
    assert result.code == 2
    assert "\x1b" not in result.err
    assert "\\x1b[31mred\\x07" in result.err
