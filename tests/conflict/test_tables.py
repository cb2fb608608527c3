"""What `merit gradients` prints: every dataset, unknown figures as a dash, what was left out, and the comparison."""

from __future__ import annotations

import io

from rich.console import Console
from tests.conflict.conftest import make_dataset
from tests.conflict.test_measure import damaged, run

from merit.files import read_json, write_json
from merit.report.conflict import render


def printed(parts, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    for part in parts:
        console.print(part)
    return console.export_text()


def test_every_dataset_and_the_suggestion_are_shown(make_recipe, mixture, tmp_path):
    run(make_recipe(examples=2), mixture | {"single": make_dataset("single", 1, seed=0)}, tmp_path)
    comparison = [
        {"representation": "sketch", "setting": 64, "bytes": 256, "pearson": 0.5, "spearman": 0.4, "mae": 0.125}
        | {"rmse": 0.2, "max_error": 0.75}
    ]
    text = printed(render(tmp_path, comparison))
    assert all(name in text for name in mixture)
    assert "–" in next(line for line in text.splitlines() if "single" in line), "no half-samples, no reliability"
    assert "r = 1" in text
    assert "single example" in text
    assert "0.12500" in text


def test_one_dataset_alone_can_be_shown(make_recipe, mixture, tmp_path):
    run(make_recipe(), {"d0": mixture["d0"]}, tmp_path)
    assert "d0" in printed(render(tmp_path))


def test_what_was_left_out_is_said(base, make_recipe, tmp_path):
    mixture = {name: make_dataset(name, 12, seed=i, high=50) for i, name in enumerate(("a", "b", "c"))}
    mixture["bad"] = make_dataset("bad", 12, seed=9, low=60, high=61)
    broken = damaged(base, tmp_path / "broken", 60, float("inf"))
    run(make_recipe(model={"base": broken}, skip_bad=True), mixture, tmp_path / "c")
    text = printed(render(tmp_path / "c"))
    assert "left out: conflict: bad has a non-finite loss" in text


def test_eighty_columns_cut_nothing_short(make_recipe, mixture, tmp_path):
    name = "dataset_of_20_letter"
    run(make_recipe(examples=2), mixture | {name: make_dataset(name, 20, seed=1)}, tmp_path)
    table = read_json(tmp_path / "datasets.json")
    table[-1] |= {"examples": 12_345, "rows": 1_234_567, "loss_per_token": 12.345, "norm": 123.456}
    write_json(tmp_path / "datasets.json", table)
    comparison = [
        {"representation": "sketch", "setting": 262144, "bytes": 1_048_576, "pearson": -0.5, "spearman": -0.4}
        | {"mae": 0.125, "rmse": 0.2, "max_error": 0.75}
    ]
    text = printed(render(tmp_path, comparison), width=80)
    assert "…" not in text
    line = next(line for line in text.splitlines() if line.startswith(name))
    assert all(figure in line for figure in ("12,345", "1,234,567", "12.345", "123.456"))
    assert "1,048,576" in text
    assert "-0.50000" in text
