"""What `merit gradients` prints: every dataset, unknown figures as a dash, what was left out, and the comparison."""

from __future__ import annotations

import io

from rich.console import Console
from tests.conflict.conftest import make_dataset
from tests.conflict.test_measure import damaged, run

from merit.conflict.tables import render


def printed(parts) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
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
