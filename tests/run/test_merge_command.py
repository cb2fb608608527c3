"""`merit merge`: operators on a run and outside it, partial merges, and the scale search."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.builders import Case, read, snapshot, weights
from transformers import AutoModelForCausalLM


def inputs(finished: Case) -> tuple[Path, list[Path], list[int]]:
    folders = [finished.run / "branches" / str(k) / "model" for k in range(2)]
    tokens = [read(folder.parent / "record.json")["tokens"] for folder in folders]
    return Path(finished.settings["model"]["base"]), folders, tokens


def test_outside_a_run_gives_the_run_s_bits(finished: Case, merit, tmp_path: Path) -> None:
    base, folders, tokens = inputs(finished)
    words = [f"--checkpoint={folder}={count}" for folder, count in zip(folders, tokens, strict=True)]
    result = merit("merge", "--base", base, *words, "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["weights"] == pytest.approx([n / sum(tokens) for n in tokens])
    mine, theirs = weights(tmp_path / "out"), weights(finished.run / "merged" / "model")
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_a_run_is_weighted_by_every_trained_token(finished: Case) -> None:
    """Fails on commit f5727a1: ``weights: tokens`` counted the answers' tokens alone."""
    records = [read(finished.run / "branches" / str(k) / "record.json") for k in range(2)]
    rows = {item["name"]: item["tokens"] for item in read(finished.run / "mixture" / "datasets.json")}
    groups = read(finished.run / "split" / "split.json")["groups"]
    merged = read(finished.run / "merged" / "record.json")
    assert merged["counts"] == [record["tokens"] for record in records]
    assert merged["counts"] == [sum(rows[name] for name in group) for group in groups], "one epoch: the budget N_k"
    assert merged["counts"] != [record["target_tokens"] for record in records]
    assert merged["weights"] == pytest.approx([n / sum(merged["counts"]) for n in merged["counts"]])
    assert merged["counted"] == "tokens"


@pytest.mark.parametrize(("rule", "want"), [("uniform", [0.5, 0.5]), ("[1, 3]", [0.25, 0.75])])
def test_other_weights_on_the_command_line(finished: Case, merit, tmp_path: Path, rule: str, want) -> None:
    result = merit("merge", finished.run, "--weights", rule, "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["weights"] == want
    short = merit("merge", finished.run, "--weights", "[1]", "--output", tmp_path / "short")
    assert short.code == 2
    assert "1 weights" in short.err


@pytest.mark.parametrize(
    "words",
    [
        ("--checkpoint", "A=1e-999999999", "--checkpoint", "B=1"),
        ("--checkpoint", "A=1e999999999", "--checkpoint", "B=1"),
        ("--checkpoint", "A=1", "--checkpoint", "B=1", "--scale", "1e999999999"),
        ("--checkpoint", "A=1", "--checkpoint", "B=1", "--scale", "nan"),
    ],
)
def test_numbers_of_absurd_size_are_refused_at_once(merit, tmp_path: Path, monkeypatch, words) -> None:
    """Fails on commit f5727a1: it computed 10 to the power of a billion, exactly."""
    monkeypatch.chdir(tmp_path)
    result = merit("merge", "--base", "base", *words, "--output", "out")
    assert result.code == 2
    assert "--scale" in result.err or "expected a positive number" in result.err


def test_every_merge_of_a_run_says_whose_it_is_and_how_it_was_computed(finished: Case, merit, tmp_path: Path) -> None:
    """Fails on commit f5727a1: a run with baselines said "merge 4 branches" twice, and never which arithmetic ran."""
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    for folder in ("merged", "baselines/random/merged", "evaluation"):
        shutil.rmtree(run / folder)
    said = merit("run", run, "--until", "merge").err
    lines = [line for line in said.splitlines() if line.startswith("▸ merge")]
    assert len(lines) == 2
    assert "random" in lines[1]
    assert "random" not in lines[0]
    shown = merit("merge", finished.run, "--output", tmp_path / "out").out
    assert f"arithmetic: {read(tmp_path / 'out' / 'merge.json')['arithmetic']}" in shown


@pytest.mark.parametrize("operator", ["uniform", "task_arithmetic", "ties", "star", "tsv", "iso_cts"])
def test_every_operator_on_a_run(finished: Case, merit, tmp_path: Path, operator: str) -> None:
    before = (finished.run / "merged" / "record.json").read_bytes()
    result = merit("merge", finished.run, "--operator", operator, "--output", tmp_path / "out", "--quiet")
    assert result.code == 0, result.err
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert read(tmp_path / "out" / "merge.json")["operator"] == operator
    assert (finished.run / "merged" / "record.json").read_bytes() == before, "the run's own merge stays"


@pytest.mark.parametrize(
    ("words", "named"), [(("--operator", "ties"), "merge.operator"), (("--scale", "auto"), "merge.scale")]
)
def test_another_merge_does_not_replace_the_run_s_own_unasked(finished: Case, merit, words, named: str) -> None:
    before = snapshot(finished.run)
    result = merit("merge", finished.run, *words)
    assert result.code == 2
    assert named in result.err
    assert "--redo" in result.err
    assert "another run folder" not in result.err, "--output is the merged checkpoint's folder here"
    assert snapshot(finished.run) == before, "what was refused changes nothing, the recipe included"


def test_a_copied_run_is_told_where_its_base_is_now(finished: Case, merit, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))
    base = finished.settings["model"]["base"]
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(base), str(tmp_path / "gone")))
    assert "--set model.base=DIR" in merit("merge", run).err
    assert merit("merge", run, "--set", f"model.base={base}").code == 0
    assert merit("merge", run).code == 0, "the recipe in the run folder follows"


def test_an_unknown_operator_or_option_names_the_nearest(finished: Case, merit, tmp_path: Path) -> None:
    base, folders, _ = inputs(finished)
    one = f"--checkpoint={folders[0]}=1"
    wrong = merit("merge", "--base", base, one, "--output", tmp_path / "o", "--operator", "tiess")
    assert wrong.code == 2
    assert "'ties'" in wrong.err
    wrong = merit(
        "merge", "--base", base, one, "--output", tmp_path / "o", "--operator", "ties", "--option", "densty=0.5"
    )
    assert wrong.code == 2
    assert "'density'" in wrong.err
    assert not (tmp_path / "o").exists()


def test_exclude_and_allow_missing_renormalise_and_say_so(finished: Case, merit, tmp_path: Path) -> None:
    result = merit("merge", finished.run, "--exclude", 0, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    mine, theirs = weights(tmp_path / "out"), weights(finished.run / "branches" / "1" / "model")
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert "branch 0" in (tmp_path / "out" / "README.md").read_text()
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    shutil.rmtree(run / "merged")
    shutil.rmtree(run / "branches" / "0")
    assert merit("merge", run, "--allow-missing").code == 0
    record = read(run / "merged" / "record.json")
    assert record["excluded"] == ["branch 0"]
    assert record["weights"] == [1.0]


def test_scale_zero_is_the_base_and_the_line_is_straight(finished: Case, merit, tmp_path: Path) -> None:
    base, folders, tokens = inputs(finished)
    words = [f"--checkpoint={folder}={count}" for folder, count in zip(folders, tokens, strict=True)]
    for scale in ("0", "0.5"):
        assert merit("merge", "--base", base, *words, "--output", tmp_path / scale, "--scale", scale).code == 0
    zero, half, one = weights(tmp_path / "0"), weights(tmp_path / "0.5"), weights(finished.run / "merged" / "model")
    for name, start in weights(base).items():
        assert np.array_equal(zero[name], start)
        middle = (start.astype(np.float64) + one[name].astype(np.float64)) / 2
        np.testing.assert_allclose(half[name], middle, rtol=0, atol=1e-7)


def test_scale_auto_shows_the_curve_and_merges_the_chosen_point(finished: Case, merit, tmp_path: Path) -> None:
    words = (
        "merge",
        finished.run,
        "--scale",
        "auto",
        "--set",
        "merge.scales=[0, 0.5, 1]",
        "--set",
        "merge.rule=learned",
    )
    result = merit(*words, "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    points = {point["scale"]: point for point in record["scale_search"]["points"]}
    assert set(points) == {0.0, 0.5, 1.0}
    assert points[0.0]["kept"] == pytest.approx(0, abs=1e-6), "no drift from the base at the base"
    assert points[1.0]["learned"] < points[0.0]["learned"]
    chosen = record["scale_search"]["chosen"]
    assert chosen == min(points, key=lambda scale: points[scale]["learned"])
    assert record["scale"] == chosen
    assert record["scale_search"]["rows_shared_with_evaluation"], "six test rows leave none to spare"
    shown = merit(
        "merge", finished.run, "--scale", "auto", "--set", "merge.scales=[0, 1]", "--output", tmp_path / "again"
    )
    assert "chosen" in shown.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("merge",), "--checkpoint DIR=WEIGHT"),
        (("merge", "--base", "b", "--output", "o"), "--checkpoint DIR=WEIGHT"),
        (("merge", "--base", "b", "--checkpoint", "noweight", "--output", "o"), "expected DIR=WEIGHT"),
        (("merge", "--base", "b", "--checkpoint", "a=1", "--output", "o", "--scale", "auto"), "held-out data"),
    ],
)
def test_incomplete_words_say_what_is_missing(merit, words, said: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = merit(*words)
    assert result.code == 2
    assert said in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ("--base", "{base}", "--checkpoint", "{one}=1", "--output", "{out}", "--exclude", "0"),
        ("--base", "{base}", "--checkpoint", "{one}=1", "--output", "{out}", "--rank", "3"),
        (
            "--base",
            "{base}",
            "--checkpoint",
            "{one}=1",
            "--output",
            "{out}",
            "--adapter",
            "concat",
            "--operator",
            "tsv",
        ),
        ("--base", "{base}", "--checkpoint", "{one}=1", "--output", "{out}", "--adapter", "both"),
        ("{run}", "--adapter", "concat", "--output", "{out}"),
        ("{run}", "--scale", "auto", "--output", "{run}/branches/0/model"),
    ],
)
def test_words_that_do_not_go_together_are_refused_not_ignored(finished: Case, merit, tmp_path: Path, words) -> None:
    base, folders, _ = inputs(finished)
    places = {"base": base, "one": folders[0], "out": tmp_path / "deep" / "out", "run": finished.run}
    result = merit("merge", *(word.format(**places) for word in words))
    assert result.code == 2, result.out
    assert not list(tmp_path.iterdir())


def test_scale_auto_as_the_docs_say_on_a_finished_run(finished: Case, merit, tmp_path: Path) -> None:
    """Fails on commit f5727a1: docs/merge.md had ``merit merge RUN --scale auto``, which a finished run refuses."""
    docs = (Path(__file__).parents[2] / "docs" / "merge.md").read_text(encoding="utf-8")
    lines = [line for line in docs.splitlines() if line.startswith("merit merge runs/my-run --scale auto")]
    assert len(lines) == 1
    words = lines[0].split("#")[0].replace("runs/my-run", str(finished.run)).replace("scaled", str(tmp_path / "out"))
    result = merit(*words.split()[1:], "--set", "merge.scales=[0, 1]")
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "scale.svg").is_file()


def test_scale_auto_into_a_folder_that_is_not_there_yet(finished: Case, merit, tmp_path: Path) -> None:
    output = tmp_path / "new" / "deep"
    words = ("--scale", "auto", "--set", "merge.scales=[0, 1]", "--output", output)
    assert merit("merge", finished.run, *words).code == 0
    assert (output / "model.safetensors").is_file()
    assert (output / "scale.svg").is_file()
    assert [path.name for path in output.parent.iterdir()] == ["deep"]
