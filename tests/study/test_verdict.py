"""A study's answer: called only where every seed agrees, and about these runs only with fewer than three."""

from __future__ import annotations

from merit.study.figures import Column, Difference, Place
from merit.study.verdict import judge_study


def find(**wins: int) -> object:
    """Differences of ``own`` over five seeds, by column and the seeds that it wins in."""

    def look(method: str, column: Column, place: Place) -> Difference | None:
        count = wins.get(f"{column}_{place}")
        if method != "own" or count is None:
            return None
        return Difference(method, column, place, -0.5, (-1, 0), 0.03, 0.06, 5, count, 5 - count)

    return look


def test_all_seeds_must_agree() -> None:
    first, *_ = judge_study(find(learned_end=0, kept_end=5, unseen_end=3), "own", "joint", 5, 10**10)  # type: ignore[arg-type]
    assert "over 5 seeds" in first
    assert "learned less" in first
    assert "kept more" in first
    assert "3 of 5 seeds, which is no clear difference" in first


def test_few_seeds_speak_of_these_runs_only() -> None:
    first, caution = judge_study(find(learned_end=5), "own", "joint", 2, 10**10)  # type: ignore[arg-type]
    assert "in these runs (2 of 3 seeds) only" in first
    assert "nothing follows about the methods" in caution


def test_equal_learning_is_said_next_to_the_end() -> None:
    first, *_ = judge_study(find(kept_end=5, kept_equal=0), "own", "joint", 5, 10**10)  # type: ignore[arg-type]
    assert "at equal learning, it kept less" in first


def test_a_comparison_of_some_seeds_is_not_called() -> None:
    """At equal learning only the seeds in which the method learns enough are compared."""

    def look(method: str, column: Column, place: Place) -> Difference | None:
        count = {"end": 5, "equal": 2}[place]
        return (
            Difference(method, column, place, -0.5, (-1, 0), 0.03, 0.06, count, count, 0) if column == "kept" else None
        )

    first, *_ = judge_study(look, "own", "joint", 5, 10**10)
    ended, equal = first.split("at equal learning")
    assert "it kept more (" in ended
    assert "2 of 2 seeds, which is no clear difference" in equal
    assert "only 2 of 5 seeds reach that loss" in equal


def test_small_models_get_their_warning() -> None:
    assert any("small models favour mixing" in said for said in judge_study(find(kept_end=5), "own", "joint", 5, 10**6))  # type: ignore[arg-type]


def test_nothing_to_compare() -> None:
    assert "own baseline" in judge_study(find(), "joint", "joint", 5, 1)[0]  # type: ignore[arg-type]
    assert "Nothing was measured" in judge_study(find(), "own", "joint", 5, 1)[0]  # type: ignore[arg-type]
