"""A study's tables and plots say what its figures are, in every form."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from PIL import Image
from rich.console import Console, RenderableType

from merit.errors import RunFolderError
from merit.recipe.load import parse_recipe
from merit.report.plots import family_of, mean_lines
from merit.report.study import cost_tables, csv_text, facts, latex, markdown, overview, render, write
from merit.study.compare import compare_methods
from merit.study.cost import Cost, item_of
from merit.study.figures import Line, Point, Run, StudyResult, Surgery
from merit.study.verdict import judge_study

SEEDS = (0, 1, 2)


def plain(*shown: RenderableType) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for item in shown:
        console.print(item)
    return console.export_text()


def line(learned: float, kept: float) -> Line:
    points = [(0.0, 4.0, 1.0), (0.5, 2 + learned / 2, 0.5 + kept / 2), (1.0, learned, kept)]
    return Line(tuple(Point(s, {"mixture": a, "kept": b, "unseen": b + 1}) for s, a, b in points), 1.5)


@pytest.fixture(scope="module")
def result() -> StudyResult:
    rng = np.random.default_rng(0)
    runs = [Run("base", seed, {"learned": 4.0, "kept": 1.0, "unseen": 2.0}, 0, 0, 0.0) for seed in SEEDS]
    for method, learned, kept in (("joint", 2.0, 3.0), ("pca_x-2d", 3.0, 1.4)):
        for seed in SEEDS:
            a, b = learned + rng.normal(0, 0.1), kept + rng.normal(0, 0.1)
            values = {"learned": a, "kept": b, "unseen": b + 1, "piqa acc": 1 / a}
            runs.append(Run(method, seed, values, 1000, 3000, 1.0, line(a, b)))  # type: ignore[arg-type]
    differences = compare_methods(runs, "joint", "pca_x-2d")
    found = StudyResult(
        "test", "pca_x-2d", "joint", SEEDS, ("base", "joint", "pca_x-2d"), tuple(runs), differences, (), 1000
    )
    sentences = judge_study(found.difference, found.own, found.baseline, 3, 1000)
    return StudyResult(**{**vars(found), "verdict": sentences})


def test_means_and_deviations_are_over_seeds(result: StudyResult) -> None:
    header, rows = overview(result)
    values = [run.values["learned"] for run in result.of("joint")]
    assert rows[1][:2] == ["joint", f"{fmean(values):.3f} ± {stdev(values):.3f}"]
    assert rows[1][-1] == "1,000"
    assert header == ["method", "learned ↓", "kept ↓", "unseen ↓", "piqa acc ↑", "target tokens"]
    assert rows[0][4] == "–", "the base was not measured there"
    assert len(rows[1]) == 6


def test_the_first_line_is_the_verdict_everywhere(result: StudyResult) -> None:
    assert markdown(result).splitlines()[0] == result.verdict[0]
    assert plain(*render(result)).split()[:8] == result.verdict[0].split()[:8]
    assert facts(result, Path("x"))["verdict"][0] == result.verdict[0]


def test_a_digit_that_changes_in_a_study_is_noticed(result: StudyResult, tmp_path: Path) -> None:
    result.save(tmp_path)
    assert StudyResult.load(tmp_path) == result
    file = tmp_path / "study.json"
    content = file.read_text()
    file.write_text(content.replace('"p": 0.', '"p": 1.', 1))
    assert file.read_text() != content
    with pytest.raises(RunFolderError, match=r"study\.json is damaged"):
        StudyResult.load(tmp_path)


def test_csv_has_every_run_to_full_precision(result: StudyResult) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(result))))
    assert len(rows) == len(result.runs)
    for row, run in zip(rows, result.runs, strict=True):
        assert float(row["learned"]) == run.values["learned"]
        assert (row["method"], int(row["seed"]), int(row["target_tokens"])) == (run.method, run.seed, run.target_tokens)


def test_latex_escapes_and_balances(result: StudyResult) -> None:
    text = latex(result)
    assert r"pca\_x-2d" in text
    assert "$\\pm$" in text
    assert not set("↓↑±λ") & set(text)
    lines = [item for item in text.splitlines() if item.endswith(r"\\")]
    assert len({item.count("&") for item in lines}) == 1


def test_files_come_back_and_plots_are_pictures(result: StudyResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result.save(tmp_path)
    assert StudyResult.load(tmp_path) == result
    said: list[str] = []
    write(result, tmp_path, said.append)
    assert said == []
    names = {"table.md", "table.csv", "table.tex", "study.json", "kept.png", "kept.svg", "unseen.png", "unseen.svg"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert Image.open(tmp_path / "kept.png").size[0] > 800
    assert "pca_x-2d" in (tmp_path / "unseen.svg").read_text()


def test_methods_of_a_family_share_a_colour() -> None:
    own = "pca-2d"
    assert family_of("pca-2d", own) == own
    assert family_of("pca-2d+ties", own) == family_of("pca-2d+weights=auto", own) != own
    assert len({family_of(name, own) for name in ("joint", "joint@budget=2", "joint@order=1")}) == 1
    different = ("joint", "random-4", "kmeans-4", "raw_pca-2d", "pca-1d", "pca-2d", "pca-2d+ties", "wise_ft", "soup-3")
    assert len({family_of(name, own) for name in different}) == len(different)


def test_a_plots_points_are_means_over_seeds(result: StudyResult) -> None:
    points = mean_lines(result, "kept")["joint"]
    ends = [run.values for run in result.of("joint")]
    assert points[-1] == pytest.approx((1.0, fmean(v["learned"] for v in ends), fmean(v["kept"] for v in ends)))
    assert "base" not in mean_lines(result, "kept")


def test_gradient_surgery_is_counted_next_to_the_papers_count(result: StudyResult, tmp_path: Path) -> None:
    found = replace(result, surgery=Surgery(10, 2_000_000, 10, 45, 40_000_000))
    cost = Cost((), 2, 500, 1e-3, 2, 10**6, 9, 7, "4 steps", found.surgery)
    for text in (markdown(found), plain(*render(found)), plain(*cost_tables(cost))):
        (ours,) = [line for line in text.splitlines() if "this base and mixture" in line]
        (papers,) = [line for line in text.splitlines() if "136 datasets" in line]
        assert all(figure in ours for figure in ("2,000,000", "45", "40.0 MB"))
        assert all(figure in papers for figure in ("136", "9,180", "816 GB"))
    found.save(tmp_path)
    assert StudyResult.load(tmp_path) == found
    assert "surgery" not in markdown(result)


def test_cost_is_exact_where_it_can_be() -> None:
    recipe = parse_recipe(
        {"name": "x", "model": {"base": "b"}, "mixture": {"folder": "d"}, "train": {"epochs": 2, "batch_size": 8}}
    )
    item = item_of("pca-2d", [recipe, recipe], {"a": (100, 1000), "b": (60, 500)}, done=3000)
    assert (item.branches, item.steps, item.tokens, item.left) == (8, 2 * 4 * 10, 6000, 3000)
    cost = Cost((item,), 2, 500, 1e-3, 2, 10**6, 9, 7, "4 steps")
    assert cost.seconds == pytest.approx(1e-3 * (3000 / 2 + 500))
    assert "pca-2d" in plain(*cost_tables(cost))
