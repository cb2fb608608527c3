"""Every branch of the verdict, from synthetic tables through the real summary."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

from merit.evaluation.calls import Advice, Side, across_seeds
from merit.evaluation.figures import Drift, Figures
from merit.evaluation.results import Evaluation
from merit.evaluation.summary import About, summarise
from merit.report.evaluation import dataset_table, markdown, overview, render, terminal

N = 16  # datasets; with 13 or fewer and ties, Wilcoxon's exact p takes half a second
NOISE = np.random.default_rng(0).normal(0, 0.05, size=(8, N))
NOISE -= NOISE.mean(axis=1, keepdims=True)


def table(loss, match=None, n=N, noise=0):
    return {
        f"d{i}": Figures(
            float(loss + NOISE[noise][i]), None if match is None else float(match + NOISE[noise][i] / 10), 4, 9
        )
        for i in range(n)
    }


def moved(kl):
    sums = (kl + NOISE[7] * 0.1) * 5 if kl else np.zeros(N)
    return Drift(kl, 0.9, 5 * N, N, tuple(sums.tolist()), (5,) * N)


def evaluation(results, kept=None, drift=None, method="pca", about=None, trained_tokens=None, unseen=None, **options):
    sets = {"mixture": results, "kept": kept or {}, **({"unseen": unseen} if unseen else {})}
    known = About(method, trained_tokens or {}, about or {})
    return Evaluation(sets, drift or {}, summarise(sets, drift or {}, known, **options))


def spoken(*args, **options):
    return list(evaluation(*args, **options).verdict.sentences)


def sentences(other, mixture, kept=None, drift=None, method="pca", n=N, **options):
    """Verdict on base, one other baseline and merged; each pair is (other, merged)."""
    results = {"base": table(3.0, 0.1, n), other: table(mixture[0], 0.5, n, 1), "merged": table(mixture[1], 0.5, n, 2)}
    kepts = {}
    if kept:
        kepts = {"base": table(0.5, 0.9, n), other: table(kept[0], 0.4, n, 3), "merged": table(kept[1], 0.4, n, 4)}
    drifts = {name: moved(kl) for name, kl in zip((other, "merged"), drift or (), strict=False)}
    if drift:
        drifts["base"] = moved(0.0)
    return spoken(results, kepts, drifts, method=method, **options)


def judged(other, mixture, kept=None, unseen=None):
    tables = {
        "base": table(3.0, 0.1),
        other: table(mixture[0], 0.5, noise=1),
        "merged": table(mixture[1], 0.5, noise=2),
    }
    kepts = {"base": table(0.5), other: table(kept[0], noise=3), "merged": table(kept[1], noise=4)} if kept else {}
    new = {"base": table(2.0), other: table(unseen[0], noise=5), "merged": table(unseen[1], noise=6)} if unseen else {}
    return evaluation(tables, kepts, unseen=new).verdict


def against(other, *args, **kwargs):
    [found] = [s for s in sentences(other, *args, **kwargs) if s.startswith("Against ")]
    return found


HIGH, LOW = 2.0, 1.0


@pytest.mark.parametrize(
    ("mixture", "kept", "wanted"),
    [
        ((HIGH, LOW), (HIGH, LOW), "the merged model did better on both"),
        ((HIGH, LOW), (LOW, LOW), "the merged model learned more, with no clear difference in what was kept"),
        ((LOW, LOW), (HIGH, LOW), "the merged model kept more, with no clear difference in what was learned"),
        (
            (LOW, HIGH),
            (HIGH, LOW),
            "a trade-off: the merged model learned less of the mixture and kept more of the base",
        ),
        (
            (HIGH, LOW),
            (LOW, HIGH),
            "a trade-off: the merged model learned more of the mixture and kept less of the base",
        ),
        ((LOW, LOW), (LOW, LOW), "no clear difference, either in what was learned or in what was kept"),
        ((LOW, HIGH), (LOW, LOW), "the jointly trained model learned more, with no clear difference in what was kept"),
        ((LOW, LOW), (LOW, HIGH), "the jointly trained model kept more, with no clear difference in what was learned"),
        ((LOW, HIGH), (LOW, HIGH), "the jointly trained model did better on both"),
    ],
)
def test_calls_against_joint(mixture, kept, wanted):
    found = against("joint", mixture, kept)
    assert found.startswith(f"Against the jointly trained model: {wanted}")
    merged_has_nothing = "the merged model" not in wanted and "jointly trained model" in wanted
    assert ("no reason to prefer the merged model" in found) == merged_has_nothing
    assert "plitting by conflict" not in found


@pytest.mark.parametrize(
    ("mixture", "kept", "method", "said"),
    [
        ((LOW, LOW), (LOW, LOW), "pca", True),
        ((LOW, HIGH), (LOW, LOW), "pca", True),
        ((LOW, HIGH), (LOW, HIGH), "raw_pca", True),
        ((LOW, HIGH), (HIGH, LOW), "pca", False),
        ((HIGH, LOW), (LOW, LOW), "pca", False),
        ((LOW, LOW), (LOW, LOW), "conflict_induced", False),
    ],
)
def test_calls_against_a_random_split(mixture, kept, method, said):
    found = against("random", mixture, kept, method=method)
    assert ("splitting by conflict gave this run no benefit" in found) == said
    assert ("at least 3 seeds" in found) == said


@pytest.mark.parametrize(
    ("mixture", "kept", "use", "advice", "words"),
    [
        ((HIGH, LOW), (HIGH, LOW), "merged", Advice.BETTER, "Use the merged model: it learned more and kept more than"),
        ((HIGH, LOW), (LOW, LOW), "merged", Advice.BETTER, "Use the merged model: it learned more than"),
        (
            (LOW, HIGH),
            (LOW, LOW),
            "joint",
            Advice.BETTER,
            "Use the jointly trained model: it learned more than the merged",
        ),
        (
            (LOW, HIGH),
            (HIGH, LOW),
            None,
            Advice.TRADE,
            "A trade-off, no clear winner: the merged model kept more of the base",
        ),
        (
            (HIGH, LOW),
            (LOW, HIGH),
            None,
            Advice.TRADE,
            "winner: the merged model learned more of the mixture, the jointly trained model kept more of the base",
        ),
        ((LOW, LOW), (LOW, LOW), None, Advice.EQUAL, "Use either the merged model or the jointly trained model"),
        ((HIGH, LOW), None, "merged", Advice.ONE_COLUMN, "what was kept was not measured on enough data"),
        ((LOW, LOW), None, None, Advice.UNKNOWN, "No recommendation: too little was measured"),
    ],
)
def test_the_first_sentence_says_what_to_use_and_how_sure(mixture, kept, use, advice, words):
    """Fails on commit f5727a1 (A12): there was no recommendation, and no word on how sure."""
    found = judged("joint", mixture, kept)
    assert (found.recommendation.use, found.recommendation.advice) == (use, advice)
    assert words in found.sentences[0]
    if advice is not Advice.UNKNOWN:
        assert "at most 5 % risk of a false call" in found.sentences[0]
        assert "one training seed" in found.sentences[0]


def test_keeping_more_recommends_nothing_where_learning_could_not_be_compared():
    """Four datasets, a few steps: the merge had moved less, kept more by drift, and was recommended for it."""
    tables = {"base": table(3.0, n=4), "joint": table(2.9, n=4, noise=1), "merged": table(2.95, n=4, noise=2)}
    drifts = {"base": moved(0.0), "joint": moved(0.2), "merged": moved(0.1)}
    found = evaluation(tables, drift=drifts).verdict
    (joint,) = [item for item in found.comparisons if item.other == "joint"]
    assert (joint.learned, joint.kept) == (Side.UNKNOWN, Side.MORE)
    assert (found.recommendation.use, found.recommendation.advice) == (None, Advice.UNKNOWN)
    assert found.sentences[0].startswith("No recommendation")


@pytest.mark.parametrize(
    ("kept", "unseen", "use", "advice", "words", "call"),
    [
        (
            (LOW, LOW),
            (HIGH, LOW),
            None,
            Advice.TRADE,
            "the merged model did better on unseen tasks, the jointly trained model learned more of the mixture",
            "no clear difference in what was kept. On unseen tasks the merged model did better.",
        ),
        (
            (HIGH, LOW),
            (HIGH, LOW),
            None,
            Advice.TRADE,
            "the merged model kept more of the base and did better on unseen tasks, the jointly",
            "kept more of the base. On unseen tasks the merged model did better.",
        ),
        (
            (LOW, LOW),
            (LOW, LOW),
            "joint",
            Advice.BETTER,
            "it learned more than the merged model, with no clear difference in what was kept or on unseen tasks",
            "no reason to prefer the merged model. On unseen tasks there is no clear difference.",
        ),
        (
            (LOW, HIGH),
            (LOW, HIGH),
            "joint",
            Advice.BETTER,
            "it learned more, kept more and did better on unseen tasks than the merged model",
            "On unseen tasks the jointly trained model did better.",
        ),
    ],
)
def test_unseen_tasks_count_like_the_other_columns(kept, unseen, use, advice, words, call):
    found = judged("joint", (LOW, HIGH), kept, unseen)
    assert (found.recommendation.use, found.recommendation.advice) == (use, advice)
    assert words in found.sentences[0]
    assert found.sentences[3].startswith(
        f"Unseen (mean over {N} held-out datasets, nobody trains on them): loss base 2.0"
    )
    [said] = [s for s in found.sentences if s.startswith("Against ")]
    assert call in said
    assert "unseen: loss" in said
    assert f"{N} unseen tasks" in found.sentences[-1]
    more = found.against("joint").unseen
    assert across_seeds([found.against("joint")] * 3)[2] is more


def test_one_seed_says_nothing_of_methods():
    """Fails on commit f5727a1 (A12): one seed carried "joint training learned more"."""
    for other in ("joint", "random", "kmeans"):
        for mixture in ((HIGH, LOW), (LOW, HIGH), (LOW, LOW)):
            for kept in ((HIGH, LOW), (LOW, HIGH), (LOW, LOW)):
                text = " ".join(sentences(other, mixture, kept))
                assert not re.search(r"(joint training|split) (learned|kept|did)", text)
                assert "speaks for" not in text
                assert "conclusions about methods need at least 3 seeds" in text


def test_methods_take_three_seeds_that_agree():
    """Fails on commit f5727a1 (A12)."""
    more, less, same = (
        judged("joint", pair, (LOW, LOW)).against("joint") for pair in ((HIGH, LOW), (LOW, HIGH), (LOW, LOW))
    )
    assert across_seeds([more, more]) == (Side.UNKNOWN, Side.UNKNOWN, Side.UNKNOWN)
    assert across_seeds([more, more, more]) == (Side.MORE, Side.SAME, Side.UNKNOWN)
    assert across_seeds([more, more, same])[0] is Side.SAME
    assert across_seeds([more, more, less])[0] is Side.MIXED


def test_drift_stands_in_for_kept_sets_and_says_so():
    found = against("joint", (LOW, HIGH), drift=(0.9, 0.3))
    assert "a trade" in found
    assert found.count("judged by drift alone.") == 1
    found = against("joint", (LOW, HIGH), (LOW, LOW), drift=(0.9, 0.3))
    assert "judged by drift alone; the kept sets show no clear difference." in found
    assert "judged by drift" not in against("joint", (LOW, HIGH), (HIGH, LOW), drift=(0.9, 0.3))
    found = against("joint", (LOW, HIGH), (LOW, LOW), drift=(0.9, 0.3), n=5)
    assert "judged by drift alone; the kept sets are too few to compare." in found


def test_measures_that_disagree_are_no_verdict():
    found = against("joint", (LOW, LOW), (HIGH, LOW), drift=(0.3, 0.9))
    assert "the measures of what was kept disagree" in found


def test_few_datasets_are_not_called():
    found = sentences("joint", (HIGH, LOW), (HIGH, LOW), n=4)
    assert "too little was measured" in found[-2]
    assert found[1].count("too few to compare") == 2
    assert "better" not in " ".join(found[:3])
    assert "too little was measured" in against("joint", (LOW, LOW))


def test_learned_and_kept_stand_side_by_side():
    found = sentences("joint", (LOW, HIGH), (HIGH, LOW), drift=(0.9, 0.3))
    advice, learned, kept, unseen, both, joint, caution = found
    assert unseen.startswith("Unseen: not measured; give evaluate.unseen_folder")
    assert learned.startswith(f"Learned (mean over {N} held-out datasets, base → merged): loss 3.0")
    assert "better" in learned
    assert "no clear sign" not in learned
    assert kept.startswith(f"Kept (mean over {N} held-out datasets): loss base 0.5")
    assert "drift from the base joint 0.9000, merged 0.3000 nats/token" in kept
    assert "no column decides alone" in both
    assert "above joint's" in both
    assert "learned: loss +1.0" in joint
    assert "kept: loss -1.0" in joint
    assert advice.startswith("A trade-off")
    assert "one training seed" in caution
    assert f"{N} mixture datasets, {N} kept datasets, {N} answers" in caution
    assert "below joint's" in sentences("joint", (HIGH, LOW))[4]


def test_a_model_that_learned_nothing():
    results = {"base": table(3.0, 0.1), "merged": table(3.0, 0.1, noise=1)}
    assert "no clear sign that the merged model learned" in spoken(results, {}, {})[1]
    results["merged"] = table(4.0, 0.05)
    assert "no clear sign that the merged model learned" in spoken(results, {}, {})[1]
    results["merged"] = table(4.0, 0.5)
    assert "disagree on whether" in spoken(results, {}, {})[1]


def test_what_was_not_measured_is_said():
    assert spoken({"base": table(3.0)}, {}, {}) == ["No merged model was measured, so nothing is compared."]
    assert spoken({"base": {}, "joint": {}}, {}, {})[0].startswith("Nothing was measured")
    found = spoken({"base": {}, "merged": {}}, {}, {"base": moved(0.0), "merged": moved(0.5)})
    assert found[1].startswith("Learned: not measured")
    assert "merged 0.5000" in found[2]
    found = spoken({"base": table(3.0), "merged": table(1.0)}, {}, {})
    assert found[2].startswith("Kept: not measured")
    assert found[4].startswith("Learned or kept was not measured")
    assert sentences("joint", (LOW, LOW), (LOW, LOW))[4].startswith("Read them together")


def test_nothing_measured_claims_nothing_and_says_what_to_add():
    models = ("base", "joint", "random", "merged")
    summary = evaluation({name: {} for name in models}, {}, {}, trained_tokens=dict.fromkeys(models, 9))
    text = str(summary.verdict).replace("\n", " ")
    assert text.startswith("Nothing was measured")
    for advice in ("test.jsonl", "evaluate.kept_folder", "evaluate.drift.prompts", "evaluate.unseen_folder"):
        assert advice in text
    for claim in ("interval", "seed", "Read them", "difference"):
        assert claim not in text
    page = markdown(summary)
    assert "Target tokens:" in page
    for claim in ("nats", "Drift:", "↓", "↑", "95 %"):
        assert claim not in page
    assert "| merged | 9 |" in page


def test_intervals_are_spoken_of_only_where_they_are_shown():
    few = sentences("joint", (HIGH, LOW), n=5)
    assert "Too little was measured to call any difference" in few[-1]
    assert "95 %" not in " ".join(few)
    one = " ".join(sentences("joint", (HIGH, LOW), n=1))
    assert "(1 dataset: too few to compare)" in one
    assert "1 datasets" not in one
    assert "Differences are over 16 mixture datasets; the 95 % intervals" in sentences("joint", (HIGH, LOW))[-1]
    mixed = sentences("joint", (HIGH, LOW), drift=(0.9, 0.3), n=5)[-1]
    assert "Differences are over 16 answers of the base;" in mixed


def test_a_merge_that_is_not_plain_is_called_so():
    about = {"merged": "operator ties, without branch 1", "joint": "half an epoch"}
    found = sentences("joint", (HIGH, LOW), (HIGH, LOW), about=about)
    assert found[1] == (
        "merged is not the plain token-weighted average of all branches: operator ties, without branch 1."
    )
    assert found[-2].startswith(
        "Against the jointly trained model (half an epoch): the merged model did better on both"
    )
    assert "plain" not in " ".join(sentences("joint", (HIGH, LOW), about={"joint": "half an epoch"}))
    nothing = spoken({"base": {}, "merged": {}}, {}, {}, about=about)
    assert nothing[0].startswith("merged is not the plain")


def test_remarks_stand_under_the_tables():
    results = {"base": table(3.0), "merged": table(1.0)}
    summary = evaluation(results, about={"merged": "operator ties"})
    assert "\nmerged: operator ties.\n" in markdown(summary).split("## Verdict")[0]
    assert "merged: operator ties." in shown(summary)


def test_budgets_that_differ_are_said():
    tokens = {"base": 0, "random": 2000, "merged": 1000}
    found = against("random", (LOW, HIGH), (LOW, LOW), trained_tokens=tokens)
    assert found.startswith(
        "Against the random split's model, at a different budget (merged 1,000 target tokens, random 2,000):"
    )
    assert "the random split's model learned more" in found
    assert "may come from the budget alone" in found
    assert "no reason to prefer the merged model" in found
    assert "plitting by conflict" not in found
    same = against("random", (LOW, HIGH), (LOW, LOW), trained_tokens={**tokens, "random": 1000})
    assert "budget" not in same
    assert "splitting by conflict gave this run no benefit" in same
    assert "budget" not in against("random", (LOW, HIGH), (LOW, LOW), trained_tokens={"merged": 1000})


def test_names_cannot_break_a_table():
    results = {"base": {"a|b": table(1.0)["d0"]}}
    assert "| a\\|b | 4 | " in markdown(evaluation(results))


def test_tables_show_every_model_and_leave_out_what_nobody_has():
    results = {"base": table(3.0), "merged": table(1.0, 0.5)}
    summary = evaluation(results, trained_tokens={"merged": 12345}, short={"d0"})
    header, rows = overview(summary.summary)
    assert header == ["model", "learned loss ↓", "learned exact match ↑", "target tokens"]
    assert [row[0] for row in rows] == ["base", "merged"]
    assert rows[0][2:] == ["–", "–"]
    assert rows[1][3] == "12,345"
    assert dataset_table(results, ["base", "merged"], "exact_match")[1][0][:3] == ["d0", "4", "–"]
    page = markdown(summary)
    assert "## Kept" not in page
    assert "| d15 |" in page
    assert "short: loss ↓ (1 dataset) | long: loss ↓ (15 datasets)" in page
    widths = {line.count("|") for line in page.split("## Verdict")[0].splitlines() if line.startswith("|")}
    assert widths == {5}
    page = evaluation(results, unseen=results)
    assert overview(page.summary)[0][1:5] == [
        "learned loss ↓",
        "learned exact match ↑",
        "unseen loss ↓",
        "unseen exact match ↑",
    ]
    assert "## Unseen: loss ↓ (nats per target token)" in markdown(page)


def shown(summary, width=120):
    console = Console(width=width, file=io.StringIO())
    for item in terminal(summary):
        console.print(item)
    return console.file.getvalue()


def test_terminal_shows_table_and_verdict(tmp_path):
    summary = evaluation({"base": table(3.0), "merged": table(1.0, 0.5)})
    summary.save(tmp_path)
    text = shown(summary)
    assert [line.split() for line in text.splitlines()[1:4]] == [
        ["learned"],
        ["learned", "exact"],
        ["model", "loss", "↓", "match", "↑"],
    ]
    assert "Caution: one training seed" in text
    console = Console(width=120, file=io.StringIO())
    for item in render(tmp_path):
        console.print(item)
    assert console.file.getvalue() == text


def test_eighty_columns_hold_every_column():
    names = ("base", "joint", "conflict_induced", "merged", "branch-10")
    results = {name: table(12.0, 0.5) for name in names}
    drift = {name: moved(0.0 if name == "base" else 1.25) for name in names}
    text = shown(evaluation(results, results, drift, trained_tokens=dict.fromkeys(names, 9_876_543_210)), width=80)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    line = next(line for line in lines if line.startswith("conflict_induced "))
    assert line.split() == ["conflict_induced", "12.000", "0.500", "12.000", "0.500", "1.2500", "9,876,543,210"]
    assert "…" not in text
