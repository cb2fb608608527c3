"""The benchmark that changes one thing at a time: which halves of a mixture it takes, and which methods it compares."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from benchmarks.study.regime import HERE, MIXTURES, against_best, figures, halves, settings_of, signed

from merit.recipe.load import load_recipe
from merit.recipe.methods import methods_of
from merit.study.figures import Line, Point, Run, StudyResult


def test_the_halves_agree_least_and_most() -> None:
    """Two camps that oppose each other, and bystanders: the least agreeing half has both camps, the most agreeing one."""
    camp = np.array([1.0, 1, 1, -1, -1, -1, 0, 0])
    cosines = 0.8 * np.outer(camp, camp) + 0.2 * np.eye(8)
    names = [*"abcdefgh"]

    def mean(chosen: list[str]) -> float:
        return float(np.mean([cosines[names.index(a), names.index(b)] for a, b in combinations(chosen, 2)]))

    found = halves(names, cosines)
    values = [mean(list(chosen)) for chosen in combinations(names, 4)]
    assert mean(found["least agreeing half"]) == pytest.approx(min(values))
    assert mean(found["most agreeing half"]) > np.quantile(values, 0.9)
    assert all(len(chosen) == len(set(chosen)) == 4 for chosen in found.values())


def test_every_setting_names_methods_of_the_recipe() -> None:
    for file in MIXTURES.values():
        recipe = load_recipe(HERE / file)
        found = settings_of(recipe, ["rate", "epochs", "groups", "rounds"], [3.0])
        assert len({(setting.factor, setting.label) for setting in found}) == len(found) == 8
        names = {name for setting in found for name in (setting.own, setting.random)}
        study = recipe.study.model_copy(update={"methods": sorted(names)})
        assert names <= {method.name for method in methods_of(recipe.model_copy(update={"study": study}))}


def run(method: str, learned: float, kept: float) -> Run:
    ends = [(0.0, 4.0, 1.0), (1.0, learned, kept)]
    line = Line(tuple(Point(s, {"mixture": a, "kept": b, "unseen": b}) for s, a, b in ends), 1.0)
    return Run(method, 0, {"learned": learned, "kept": kept, "unseen": kept}, 1, 1, 1.0, line)


def study_of(*runs: Run) -> StudyResult:
    return StudyResult("x", "pca-2d", "joint", (0,), tuple(item.method for item in runs), runs, (), (), 1)


BASE = Run("base", 0, {"learned": 4.0, "kept": 1.0, "unseen": 1.0}, 0, 0, 0.0)


def test_figures_are_at_the_own_methods_learned_loss() -> None:
    result = study_of(BASE, run("joint", 2.0, 3.0), run("pca-1d", 3.0, 1.5), run("random-2", 3.5, 1.1))
    found = figures(result, "pca-1d", "random-2")
    assert found["equal"]["joint"]["kept"] == [1.5 - 2.0]
    assert found["equal"]["random-2"]["kept"] == []
    assert signed(found["equal"]["random-2"]["kept"], 1) == "other learns less"
    assert found["ended"]["random-2"]["learned"] == 3.5


def test_the_best_joint_line_is_of_any_rate_and_budget() -> None:
    past_its_cliff = study_of(BASE, run("joint", 2.0, 9.0), run("pca-1d", 3.0, 2.5), run("random-2", 3.5, 1.1))
    gentle = study_of(BASE, run("joint", 2.0, 3.0), run("one_budget", 3.5, 0.0))
    assert figures(past_its_cliff, "pca-1d", "random-2")["equal"]["joint"]["kept"] == [2.5 - 5.0]
    found = against_best(past_its_cliff, "pca-1d", {"high": past_its_cliff, "low": gentle}, "kept")
    assert found == ("joint, low", [2.5 - 2.0])
    assert against_best(past_its_cliff, "pca-1d", {"low": study_of(BASE, run("joint", 3.9, 1.0))}, "kept") is None


def test_datasets_without_a_gradient_are_in_neither_half() -> None:
    cosines = np.array([[1, 0.5, np.nan, -0.5], [0.5, 1, np.nan, 0], [np.nan] * 4, [-0.5, 0, np.nan, 1]])
    assert halves([*"abcd"], cosines) == {"least agreeing half": ["a", "d"], "most agreeing half": ["a", "b"]}
