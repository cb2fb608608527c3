"""Whole runs: the files that people script against, resuming, stages one by one, and what a changed recipe does."""

from __future__ import annotations

import json
import shutil
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tests.builders import TASKS, Case, make_case, read, snapshot, task_rows, weights, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_the_run_folder_is_what_the_interface_promises(finished: Case) -> None:
    run = finished.run
    datasets = read(run / "mixture" / "datasets.json")
    assert [item["name"] for item in datasets] == sorted(TASKS)
    assert all({"rows", "rows_dropped", "tokens", "target_tokens"} <= set(item) for item in datasets)
    geometry = np.load(run / "conflict" / "geometry.npz")
    count = len(TASKS)
    assert geometry["gram"].shape == geometry["cosine"].shape == (count, count)
    assert geometry["gram"].dtype == geometry["cosine"].dtype == np.float64
    assert geometry["scores"].shape[0] == count
    sketches = load_file(run / "conflict" / "sketches.safetensors")
    assert set(sketches) == set(TASKS)
    assert all(vector.dtype == np.float32 and vector.shape == (4096,) for vector in sketches.values())
    split = read(run / "split" / "split.json")
    assert sorted(name for group in split["groups"] for name in group) == sorted(TASKS)
    assert len(split["groups"]) == 2
    assert set(split["stability"]) == set(TASKS)
    targets = {item["name"]: item["target_tokens"] for item in datasets}
    for k, group in enumerate(split["groups"]):
        record = read(run / "branches" / str(k) / "record.json")
        assert record["target_tokens"] == sum(targets[name] for name in group), "one epoch trains every target once"
        assert record["tokens"] >= record["target_tokens"]
        assert record["steps"] > 0
        assert record["seconds"] > 0
        assert record["peak_memory_bytes"] > 2**20
    results = read(run / "evaluation" / "results.json")
    assert set(results) == {"base", "joint", "random", "merged", "branch-0", "branch-1"}
    for figures in results.values():
        assert set(figures) == set(TASKS)
        assert all(set(item) == {"loss", "exact_match", "examples", "target_tokens"} for item in figures.values())
    for folder in ("mixture", "conflict", "split", "branches/0", "merged", "evaluation", "baselines/random/merged"):
        record = read(run / folder / "record.json")
        assert {"format", "fingerprint", "settings", "inputs", "seed", "versions", "outputs"} <= set(record)
    assert (run / "recipe.yaml").is_file()


def test_the_merged_model_is_the_token_weighted_average(finished: Case) -> None:
    run = finished.run
    records = [read(run / "branches" / str(k) / "record.json") for k in range(2)]
    branches = [weights(run / "branches" / str(k) / "model") for k in range(2)]
    tokens = [record["tokens"] for record in records]
    merged = weights(run / "merged" / "model")
    for name, tensor in merged.items():
        exact = sum(n * branch[name].astype(np.float64) for n, branch in zip(tokens, branches, strict=True)) / sum(
            tokens
        )
        np.testing.assert_array_equal(tensor, exact.astype(np.float32))
    record = read(run / "merged" / "record.json")
    assert record["operator"] == "average"
    assert record["scale"] == 1.0
    assert record["weights"] == pytest.approx([n / sum(tokens) for n in tokens])


def test_the_merged_folder_loads_and_answers(finished: Case) -> None:
    folder = finished.run / "merged" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "upper abc"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    card = (folder / "README.md").read_text()
    assert "branch 0" in card
    assert "average" in card


def test_training_learned_something(finished: Case) -> None:
    results = read(finished.run / "evaluation" / "results.json")
    loss = {model: np.mean([item["loss"] for item in figures.values()]) for model, figures in results.items()}
    assert loss["joint"] < loss["base"] - 0.5
    assert loss["merged"] < loss["base"] - 0.2


def test_running_again_does_nothing(finished: Case, merit) -> None:
    before = snapshot(finished.run)
    result = merit("run", finished.recipe, "--output", finished.run)
    assert result.code == 0
    after = snapshot(finished.run)
    assert after == before


def test_json_prints_one_object_and_the_table_both_columns(finished: Case, merit) -> None:
    facts = json.loads(merit("run", finished.recipe, "--output", finished.run, "--json").out)
    assert set(facts["results"]) >= {"base", "merged", "joint", "random"}
    assert all(row["state"] == "done" for row in facts["stages"])
    shown = merit("evaluate", finished.run).out
    for word in ("base", "joint", "random", "merged", "drift"):
        assert word in shown


def test_report_and_card_are_of_this_run_and_name_no_folder_of_this_machine(
    finished: Case, merit, tmp_path: Path
) -> None:
    page = (finished.run / "report.html").read_text(encoding="utf-8")
    summary = json.loads((finished.run / "evaluation" / "summary.json").read_text())
    assert escape(summary["verdict"][0]) in page
    assert str(finished.run.parent) not in page.split('id="provenance"')[0]  # the recipe in there is the user's own
    other = merit("report", finished.run, "--output", tmp_path / "page.html", "--json")
    assert other.code == 0
    assert json.loads(other.out)["bytes"] == (tmp_path / "page.html").stat().st_size
    shown = merit("push", finished.run, "--to", "me/model", "--dry-run", "--json")
    assert shown.code == 0
    found = json.loads(shown.out)
    assert found["sent"] is False
    assert found["files"]["model.safetensors"] == (finished.run / "merged/model/model.safetensors").stat().st_size
    assert str(finished.run.parent) not in found["card"]
    assert summary["verdict"][0] in found["card"]
    assert merit("push", finished.run, "--to", "nonsense", "--dry-run").code == 2
    assert merit("report", tmp_path).code == 2


def test_status_tells_done_from_stale_and_missing(finished: Case, merit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    shutil.rmtree(run / "merged")
    recipe = (run / "recipe.yaml").read_text().replace("learning_rate: 0.005", "learning_rate: 0.001")
    (run / "recipe.yaml").write_text(recipe)
    states = {row["stage"]: row for row in json.loads(merit("status", run, "--json").out)["stages"]}
    assert states["mixture"]["state"] == states["gradients"]["state"] == states["split"]["state"] == "done"
    assert states["branch 0"]["state"] == "stale"
    assert states["branch 0"]["changed"] == ["train.learning_rate: 0.005 -> 0.001"]
    assert states["merged"]["state"] == "missing"


def test_a_changed_recipe_is_refused_and_redo_makes_only_what_it_changes(finished: Case, merit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    before = snapshot(run)
    words = ("run", finished.recipe, "--output", run, "--quiet", "--set", "train.learning_rate=0.001")
    refused = merit(*words)
    assert refused.code == 2
    assert "train.learning_rate: 0.005 -> 0.001" in refused.err
    assert "--output" in refused.err
    assert "--redo" in refused.err
    changed = {name for name, facts in snapshot(run).items() if before.get(name) != facts}
    assert not changed, "refused: nothing is touched, the recipe included"
    assert merit(*words, "--redo").code == 0
    after = snapshot(run)
    assert after["conflict/geometry.npz"] == before["conflict/geometry.npz"]
    assert after["branches/0/model/model.safetensors"] != before["branches/0/model/model.safetensors"]
    assert not np.array_equal(
        weights(run / "merged" / "model")["model.norm.weight"],
        weights(finished.run / "merged" / "model")["model.norm.weight"],
    )


def test_stages_one_by_one_give_the_same_bits(finished: Case, merit, tmp_path: Path, base: Path) -> None:
    case = make_case(tmp_path, base, baselines=["joint", "random"])
    for words in (
        ("check", case.recipe),
        ("gradients", case.recipe, "--output", case.run),
        ("split", case.run),
        ("train", case.run, "--branch", 1),
        ("train", case.run),
        ("merge", case.run),
    ):
        result = merit(*words)
        assert result.code == 0, (words, result.err)
        if words[0] == "check":
            assert "optimizer steps in all" in " ".join(result.out.split())
    for k in range(2):
        mine, theirs = (weights(run / "branches" / str(k) / "model") for run in (case.run, finished.run))
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_a_branch_trains_where_only_recipe_split_data_and_base_are(finished: Case, merit, tmp_path: Path) -> None:
    run = tmp_path / "elsewhere"
    for name in ("recipe.yaml", "split", "baselines/joint/split", "baselines/random/split"):
        source = finished.run / name
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, run / name) if source.is_dir() else shutil.copy(source, run / name)
    result = merit("train", run, "--branch", 1)
    assert result.code == 0, result.err
    assert not (run / "branches" / "0" / "record.json").exists()
    mine, theirs = (weights(folder / "branches" / "1" / "model") for folder in (run, finished.run))
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_a_branch_refuses_other_rows_than_the_split_was_made_from(
    finished: Case, merit, tmp_path: Path, base: Path
) -> None:
    case = make_case(tmp_path, base, baselines=["joint", "random"])
    for name in ("split", "baselines"):
        shutil.copytree(finished.run / name, case.run / name)
    shutil.copy(finished.run / "recipe.yaml", case.run / "recipe.yaml")
    rows = (case.folder / "mixture" / "first" / "train.jsonl").read_text().splitlines()
    (case.folder / "mixture" / "first" / "train.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    result = merit("train", case.run, "--branch", 1, "--set", f"mixture.folder={case.folder / 'mixture'}")
    assert result.code == 2
    assert "not those that the split was made from" in result.err


def test_an_added_dataset_costs_one_gradient(finished: Case, merit, tmp_path: Path, base: Path) -> None:
    case = make_case(tmp_path, base)
    write_rows(case.folder / "mixture" / "another" / "train.jsonl", task_rows("upper", 20, seed=9))
    shutil.copytree(finished.run / "conflict", case.run / "conflict")
    words = ("gradients", case.recipe, "--output", case.run, "--quiet")
    refused = merit(*words)
    assert refused.code == 2
    assert "input.rows of another" in refused.err
    assert merit(*words, "--redo").code == 0
    assert read(case.run / "conflict" / "record.json")["reused_datasets"] == len(TASKS)
    old, new = (np.load(run / "conflict" / "geometry.npz") for run in (finished.run, case.run))
    places = [list(new["names"]).index(name) for name in old["names"]]
    np.testing.assert_array_equal(new["gram"][np.ix_(places, places)], old["gram"])


@pytest.mark.parametrize("method", ["joint", "kmeans"])
def test_other_methods_are_settings(method: str, case: Case, merit) -> None:
    case.write(split={"method": method, "axes": 1}, evaluate={"drift": {"prompts": 0}, "exact_match": "never"})
    assert merit("run", case.recipe, "--output", case.run, "--quiet").code == 0
    results = read(case.run / "evaluation" / "results.json")
    assert ("joint" in results) == (method == "joint")
    assert (case.run / "conflict").exists() == (method == "kmeans"), "joint needs no gradient"
    if method == "joint":
        assert results["joint"] == results["merged"]
        one, other = (weights(case.run / folder / "model") for folder in ("branches/0", "merged"))
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_lora_branches_merge_into_a_full_model(case: Case, merit) -> None:
    from peft import PeftModel

    lora = {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "down_proj"]}
    case.write(model={**case.settings["model"], "trainable": "lora", "lora": lora})
    result = merit("run", case.recipe, "--output", case.run, "--quiet")
    assert result.code == 0, result.err
    tokens = [read(case.run / "branches" / str(k) / "record.json")["tokens"] for k in range(2)]
    expected: dict[str, torch.Tensor] = {}
    for k, count in enumerate(tokens):
        whole = AutoModelForCausalLM.from_pretrained(case.settings["model"]["base"])
        full = PeftModel.from_pretrained(whole, case.run / "branches" / str(k) / "model").merge_and_unload()
        for name, tensor in full.state_dict().items():
            expected[name] = expected.get(name, 0) + count / sum(tokens) * tensor.double()
    merged = AutoModelForCausalLM.from_pretrained(case.run / "merged" / "model").state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6)
    assert read(case.run / "evaluation" / "results.json")["branch-0"]


def test_kept_sets_unseen_tasks_and_one_file_with_a_column(case: Case, merit) -> None:
    rows = [{**row, "task": task} for task in TASKS for row in task_rows(task, 12, seed=0)]
    write_rows(case.folder / "all.jsonl", rows)
    write_rows(case.folder / "kept" / "echo" / "test.jsonl", task_rows("upper", 5, seed=3))
    write_rows(case.folder / "new" / "other" / "test.jsonl", task_rows("upper", 4, seed=4))
    case.write(
        mixture={"path": "all.jsonl", "split_by": "task"},
        split={"method": "random", "axes": 1},
        evaluate={"kept_folder": "kept", "unseen_folder": "new", "drift": {"prompts": 0}},
    )
    result = merit("run", case.recipe, "--output", case.run, "--quiet")
    assert result.code == 0, result.err
    assert set(read(case.run / "evaluation" / "kept.json")["merged"]) == {"echo"}
    assert set(read(case.run / "evaluation" / "unseen.json")["merged"]) == {"other"}
    assert "unseen loss" in (case.run / "evaluation" / "table.md").read_text()
    write_rows(case.folder / "new" / "other" / "test.jsonl", task_rows("upper", 4, seed=5))
    changed = merit("evaluate", case.run)
    assert changed.code == 2, "rows of an unseen task changed: the mixture stage is stale"
    assert "other" in changed.err
