"""Averages, intervals and paired comparisons against references written out here."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from merit.evaluation.figures import Average, Drift, Figures
from merit.evaluation.statistics import interval
from merit.evaluation.summary import About, macro, model_order, paired, paired_drift
from merit.evaluation.summary import summarise as summarise_sets


def summarise(results, kept, drift, method="pca", about=None, tokens=None, **options):
    known = About(method, tokens or {}, about or {})
    return summarise_sets({"mixture": results, "kept": kept}, drift, known, **options)


def figures(losses, matches=None, tokens=None):
    matches = matches if matches is not None else [None] * len(losses)
    tokens = tokens or [10] * len(losses)
    return {
        f"d{i}": Figures(loss, match, 5, n)
        for i, (loss, match, n) in enumerate(zip(losses, matches, tokens, strict=True))
    }


def test_macro_weighs_datasets_and_pooled_weighs_tokens():
    found = macro(figures([1.0, 3.0], [0.5, None], [1, 3]))
    assert found == Average(2.0, 0.5, 2.5, datasets=2, exact_match_datasets=1, examples=10, target_tokens=4)
    assert macro(figures([1.0, 3.0]), only={"d1"}).loss == 3.0
    assert macro(figures([1.0, 3.0])).exact_match is None
    assert macro({}) is None


def test_order():
    names = ["branch-10", "merged", "branch-2", "kmeans", "base", "random", "joint"]
    assert model_order(names) == ("base", "joint", "random", "kmeans", "merged", "branch-2", "branch-10")


def test_interval_covers_the_truth_as_often_as_it_says():
    """Normal differences over 8 datasets: plain percentiles would cover about 90 %, this one about 95 %."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        low, high = interval(rng.normal(0.3, 1.0, size=8), seed=seed)
        covered += low <= 0.3 <= high
    assert 0.92 <= covered / 300 <= 0.985


def test_interval_is_as_wide_as_students_for_many_units():
    values = np.random.default_rng(1).normal(size=400)
    low, high = interval(values)
    student = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(student, abs=0.01)
    assert interval(values) == (low, high)


def test_paired_difference_is_merged_minus_other():
    ours, theirs = figures([1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 9.0]), figures([1.5, 2.6, 3.7, 1.4, 2.5, 3.3, 9.0])
    found = paired(ours, theirs, "loss")
    differences = np.asarray([-0.5, -0.6, -0.7, -0.4, -0.5, -0.3, 0.0])
    assert found.difference == pytest.approx(differences.mean())
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert (found.wins, found.losses, found.ties, found.units) == (6, 0, 1, 7)
    assert found.outcome == "better"
    assert paired(theirs, ours, "loss").outcome == "worse"


def test_higher_exact_match_is_better():
    ours, theirs = figures([1.0] * 7, [0.5 + i / 20 for i in range(7)]), figures([1.0] * 7, [0.1] * 7)
    assert paired(ours, theirs, "exact_match").outcome == "better"
    assert paired(theirs, ours, "exact_match").outcome == "worse"
    assert paired(ours, theirs, "loss").outcome == "unclear"
    assert paired(ours, theirs, "loss").wilcoxon_p == 1.0


def test_too_few_datasets_are_never_called():
    ours, theirs = figures([1.0] * 5), figures([2.0 + i / 10 for i in range(5)])
    assert paired(ours, theirs, "loss").outcome == "few"
    one = paired(figures([1.0]), figures([2.0]), "loss")
    assert one.outcome == "few"
    assert one.ci95 is None
    assert paired(ours, theirs, "exact_match") is None


def test_drift_weighs_answers_by_their_tokens():
    counts = (1, 2, 3, 4, 5, 100)
    ours = Drift(0.0, 1.0, 115, 6, (1.0, 2.0, 3.0, 4.0, 5.0, 60.0), counts)
    theirs = Drift(0.0, 1.0, 115, 6, (2.0, 4.0, 6.0, 8.0, 10.0, 110.0), counts)
    found = paired_drift(ours, theirs)
    assert found.difference == pytest.approx((75 - 140) / 115)
    assert found.outcome == "better"


def test_summary_holds_what_the_tables_show():
    drift = {
        name: Drift(float(i), 1.0, 12, 6, (2.0 * i,) * 6, (2,) * 6)
        for i, name in enumerate(("base", "merged", "joint"))
    }
    results = {name: figures([1.0, 2.0]) for name in ("merged", "base", "joint", "branch-0")}
    found = summarise(results, {}, drift, short={"d0"}, tokens={"merged": 7})
    assert found.models == ("base", "joint", "merged", "branch-0")
    assert found.macro["merged"].short.loss == 1.0
    assert found.macro["merged"].long.loss == 2.0
    assert found.macro["merged"].kept is None
    assert found.macro["merged"].trained_target_tokens == 7
    assert found.macro["branch-0"].drift is None
    assert {(item.other, item.part, item.metric) for item in found.paired} == {
        ("base", "mixture", "loss"),
        ("joint", "mixture", "loss"),
        ("joint", "kept", "drift"),
    }


def test_a_joint_run_is_not_compared_with_itself():
    results = {name: figures([1.0] * 8) for name in ("base", "joint", "merged")}
    assert {item.other for item in summarise(results, {}, {}, method="joint").paired} == {"base"}


def test_another_model_of_the_same_method_is_compared():
    """A split that was imported can be random beside a random baseline: two models, not one."""
    results = {name: figures([1.0] * 8) for name in ("base", "random", "merged")}
    assert {item.other for item in summarise(results, {}, {}, method="random").paired} == {"base", "random"}


def test_remarks_are_kept_for_the_models_there_are():
    results = {name: figures([1.0]) for name in ("base", "merged")}
    assert summarise(results, {}, {}, about={"merged": "scale 0.5", "random": "x", "base": ""}).about == {
        "merged": "scale 0.5"
    }
    assert summarise(results, {}, {}).about == {}
