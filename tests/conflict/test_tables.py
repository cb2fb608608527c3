"""What `merit gradients` prints: every dataset, unknown figures as a dash, what was left out, and the comparison."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console
from tests.conflict.conftest import make_dataset, run
from tests.conflict.test_measure import damaged

from merit.conflict.compare import Agreement, Comparison
from merit.report.conflict import render


def printed(parts, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    for part in parts:
        console.print(part)
    return console.export_text()


def test_every_dataset_and_the_suggestion_are_shown(make_recipe, mixture, tmp_path):
    geometry = run(make_recipe(examples=2), mixture | {"single": make_dataset("single", 1, seed=0)}, tmp_path)
    text = printed(render(geometry, [Comparison("sketch", 64, 256, 7, Agreement(21, 0.5, 0.4, 0.125, 0.2, 0.75))]))
    assert all(name in text for name in mixture)
    assert "–" in next(line for line in text.splitlines() if "single" in line), "no half-samples, no reliability"
    assert geometry.summary.suggestion in text
    assert text.count("null") >= 3, "a band next to every spectral figure"
    assert "fewer than four examples" in text
    assert "0.12500" in text


def test_one_dataset_alone_can_be_shown(make_recipe, mixture, tmp_path):
    assert "d0" in printed(render(run(make_recipe(), {"d0": mixture["d0"]}, tmp_path)))


def test_what_was_left_out_is_said(base, make_recipe, tmp_path):
    mixture = {name: make_dataset(name, 12, seed=i, high=50) for i, name in enumerate(("a", "b", "c"))}
    mixture["bad"] = make_dataset("bad", 12, seed=9, low=60, high=61)
    broken = damaged(base, tmp_path / "broken", 60, float("inf"))
    text = printed(render(run(make_recipe(model={"base": broken}, skip_bad=True), mixture, tmp_path / "c")))
    assert "left out: conflict: bad has a non-finite loss" in text


def test_eighty_columns_cut_nothing_short(make_recipe, mixture, tmp_path):
    name = "dataset_of_20_letter"
    geometry = run(make_recipe(examples=2), mixture | {name: make_dataset(name, 20, seed=1)}, tmp_path)
    large = replace(geometry.datasets[-1], examples=12_345, rows=1_234_567, loss_per_token=12.345, norm=123.456)
    geometry = replace(geometry, datasets=[*geometry.datasets[:-1], large])
    comparison = [Comparison("sketch", 262144, 1_048_576, 7, Agreement(21, -0.5, -0.4, 0.125, 0.2, 0.75))]
    text = printed(render(geometry, comparison), width=80)
    assert "…" not in text
    line = next(line for line in text.splitlines() if line.startswith(name))
    assert all(figure in line for figure in ("12,345", "1,234,567", "12.345", "123.456"))
    assert "1,048,576" in text
    assert "-0.50000" in text
