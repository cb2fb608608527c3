"""What a user can get wrong: exit code 2, one message that says what and where, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.builders import Case, make_base, make_case, task_rows, write_rows
from tests.e2e.test_places import files_of_at_most


def refused(merit, case: Case, *words: str, command: str = "run", extra: tuple[str, ...] = ()) -> str:
    result = merit(command, case.recipe, "--output", case.run, "--quiet", *extra)
    assert result.code == 2, (result.code, result.err)
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, (word, result.err)
    return result.err


def nothing_made(run: Path) -> bool:
    """No stage's results stand, and nothing that looks like a model."""
    return not list(run.rglob("record.json")) and not list(run.rglob("*.safetensors"))


def test_unknown_recipe_key(case: Case, merit) -> None:
    case.write(trian={"epochs": 1})
    refused(merit, case, "trian", "'train'")
    assert not case.run.exists()


def test_a_dataset_that_dominates_is_told_before_anything_is_trained(case: Case, merit) -> None:
    write_rows(case.folder / "mixture" / "upper" / "train.jsonl", task_rows("upper", 900, seed=0))
    result = merit("check", case.recipe, "--output", case.run, "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert any("upper holds" in note and "%" in note for note in plan["notes"])
    assert plan["steps"] > 0


def test_what_is_too_small_to_tell_anything_is_told_before_anything_is_trained(case: Case, merit) -> None:
    """Six datasets in four groups, three dozen steps: every limit that the report would name only at the end."""
    case.write(split={"axes": 2}, train={"batch_size": 64, "max_length": 96})
    notes = json.loads(merit("check", case.recipe, "--output", case.run, "--json").out)["notes"]
    for words in ("6 datasets in 4 groups", "about 1 optimizer step per branch", "6 datasets with held-out rows"):
        assert [note for note in notes if words in note], words
    case.write(split={"axes": 1}, train={"batch_size": 2, "max_length": 96}, evaluate={"heldout": False})
    few = json.loads(merit("check", case.recipe, "--output", case.run, "--json").out)["notes"]
    assert not [note for note in few if "per branch" in note or "groups:" in note or "held-out rows:" in note]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["upper"]),
        ("", ["upper", "empty"]),
        ('{"messages": [\n', ["train.jsonl", "line 1"]),
        (json.dumps(task_rows("upper", 1, 0)[0]) + '\n{"messages": [}\n', ["train.jsonl", "line 2"]),
        ('{"messages": [{"role": "user", "content": "hello"}]}\n', ["upper", "assistant", "mixture.bad_rows"]),
        ('{"text": "hello"}\n', ["upper", "text"]),
    ],
    ids=["missing", "empty", "malformed", "malformed line 2", "no assistant turn", "unknown format"],
)
def test_a_bad_dataset_is_named_with_its_place(case: Case, merit, content: str | None, words: list[str]) -> None:
    file = case.folder / "mixture" / "upper" / "train.jsonl"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    refused(merit, case, *words)
    assert nothing_made(case.run)


def test_malformed_json_past_the_first_rows_stops_before_anything_expensive(case: Case, merit) -> None:
    rows = [json.dumps(row) for row in task_rows("upper", 40, 0)]
    rows[29] = rows[29][:-4]
    (case.folder / "mixture" / "upper" / "train.jsonl").write_text("\n".join(rows))
    refused(merit, case, "line 30")
    assert nothing_made(case.run)


def test_a_dataset_whose_rows_all_lose_their_targets(case: Case, merit) -> None:
    long = [{"messages": [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "y"}]}] * 4
    write_rows(case.folder / "mixture" / "upper" / "train.jsonl", long)
    refused(merit, case, "upper", "max_length")
    assert nothing_made(case.run)


def test_duplicate_dataset_names(case: Case, merit) -> None:
    path = str(case.folder / "mixture" / "upper" / "train.jsonl")
    case.write(mixture={"datasets": [{"name": "a", "path": path}, {"name": "a", "path": path}]})
    refused(merit, case, "'a'")


def test_fewer_datasets_than_groups(case: Case, merit) -> None:
    refused(merit, case, "6 datasets cannot fill 8 groups", extra=("--set", "split.axes=3"))
    assert not case.run.exists()


def test_an_unknown_dataset_name_in_a_pattern(case: Case, merit) -> None:
    refused(merit, case, "uper", "upper", extra=("--set", "mixture.exclude=[uper]"))


def test_longer_rows_than_the_base_was_made_for(case: Case, merit) -> None:
    refused(merit, case, "train.max_length", "128", extra=("--set", "train.max_length=4096"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda base: (base / "config.json").unlink(), ["config.json"]),
        (lambda base: _edit(base, model_type="vit", architectures=["ViTModel"]), ["causal language model", "ViTModel"]),
        (lambda base: _edit(base, architectures=["LlamaForSequenceClassification"]), ["causal language model"]),
        (lambda base: _edit(base, quantization_config={"bits": 4}), ["quantized"]),
        (
            lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
            ["pytorch_model.bin", "safetensors"],
        ),
        (lambda base: os.truncate(base / "model.safetensors", 5000), ["model.safetensors"]),
        (lambda base: [file.unlink() for file in base.glob("tokenizer*")], ["tokenizer"]),
        (lambda base: shutil.rmtree(base), ["not a folder"]),
    ],
    ids=["no config", "another kind", "classifier", "quantized", "pickle", "truncated", "no tokenizer", "missing"],
)
def test_a_base_that_cannot_be_trained(tmp_path: Path, merit, damage, words: list[str]) -> None:
    base = make_base(tmp_path / "base")
    damage(base)
    case = make_case(tmp_path / "case", base)
    refused(merit, case, *words)
    assert nothing_made(case.run)


def _edit(base: Path, **changes: object) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))


def _poison(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["pca", "joint"])
def test_non_finite_gradients_and_losses(tmp_path: Path, merit, method: str) -> None:
    base = make_base(tmp_path / "base")
    _poison(base)
    case = make_case(tmp_path / "case", base, split={"method": method, "axes": 1})
    refused(merit, case, "finite")
    assert not list(case.run.glob("branches/*/record.json"))
    assert not (case.run / "conflict" / "record.json").exists()


def damaged_run(finished: Case, folder: Path) -> Path:
    run = folder / "run"
    shutil.copytree(finished.run, run)
    shutil.rmtree(run / "merged")
    return run


def test_a_truncated_branch(finished: Case, merit, tmp_path: Path) -> None:
    run = damaged_run(finished, tmp_path)
    os.truncate(run / "branches" / "1" / "model" / "model.safetensors", 9000)
    result = merit("merge", run)
    assert result.code == 2
    assert "branches/1/model/model.safetensors" in result.err
    assert not (run / "merged" / "model").exists()


def test_a_branch_with_a_flipped_bit(finished: Case, merit, tmp_path: Path) -> None:
    run = damaged_run(finished, tmp_path)
    file = run / "branches" / "0" / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    result = merit("merge", run)
    assert result.code == 2
    assert f"{file} is damaged" in result.err
    assert f"Remove the folder {run / 'branches' / '0'} and" in result.err
    assert not (run / "merged" / "model").exists()


def test_a_branch_of_another_shape(finished: Case, merit, tmp_path: Path) -> None:
    good, odd = finished.run / "branches" / "0" / "model", tmp_path / "odd"
    shutil.copytree(good, odd)
    tensors = load_file(odd / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:, :-1].copy()
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    words = ("--checkpoint", f"{odd}=3", "--checkpoint", f"{good}=5", "--output", tmp_path / "out")
    result = merit("merge", "--base", finished.settings["model"]["base"], *words)
    assert result.code == 2
    for word in (str(odd), "model.layers.1.mlp.up_proj.weight", "(32, 16)", "(32, 15)"):
        assert word in result.err
    assert not (tmp_path / "out").exists()


def test_a_branch_that_came_from_another_base(finished: Case, merit, tmp_path: Path) -> None:
    run = damaged_run(finished, tmp_path)
    other = make_base(tmp_path / "other", seed=1)
    result = merit("merge", run, "--set", f"model.base={other}")
    assert result.code == 2
    assert "input.base" in result.err
    assert not (run / "merged" / "model").exists()


def test_branches_that_are_missing(finished: Case, merit, tmp_path: Path) -> None:
    run = damaged_run(finished, tmp_path)
    shutil.rmtree(run / "branches" / "1")
    result = merit("merge", run)
    assert result.code == 2
    assert "--branch 1" in result.err
    assert "--allow-missing" in result.err
    assert not (run / "merged" / "model").exists()


def test_a_disk_that_fills_up_while_merging(finished: Case, merit, tmp_path: Path) -> None:
    """No file may pass 20 kB here, as on a full disk: the kernel refuses the write."""
    run = damaged_run(finished, tmp_path)
    with files_of_at_most(20_000):
        result = merit("merge", run, "--quiet")
    assert result.code == 2, result.err
    assert "disk" in result.err.lower()
    assert "Traceback" not in result.err
    assert not (run / "merged" / "model").exists()
    assert not list((run / "merged").glob(".model*"))


def test_words_that_make_no_command(merit, case: Case) -> None:
    assert merit("rnu").code == 2
    assert merit("run").code == 2
    assert "no such stage" in refused(merit, case, extra=("--until", "trian"))
    assert "'train'" in refused(merit, case, extra=("--until", "trian"))
    result = merit("train", case.recipe, "--branch", "x", "--output", case.run)
    assert result.code == 2
    result = merit("status", case.folder / "mixture")
    assert result.code == 2
    assert "run folder" in result.err
