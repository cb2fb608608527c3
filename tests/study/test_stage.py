"""Whole studies on a tiny model: shared stages, equal budgets, known baselines, and the same table after a kill anywhere."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import builders
from tests.builders import Case

from merit.errors import Interrupted, RecipeError
from merit.evaluation.halves import row_digest
from merit.progress import Silent
from merit.recipe.load import changed, load_recipe
from merit.run import scale_search
from merit.run.evaluating import held_out_rows, reporting_rows
from merit.run.session import Session
from merit.run.store import Stage
from merit.study.cost import Cost
from merit.study.figures import Run, StudyResult, Surgery
from merit.study.stage import run_study
from merit.train.result import BranchResult

METHODS = ["base", "joint", "wise_ft", "joint_matched", "soup-2", "random-2", "own", "own+ties"]


def small(folder: Path, base: Path, **changes: Any) -> Case:
    """Four datasets, one epoch, losses only."""
    case = builders.make_case(
        folder,
        base,
        **{
            "mixture": {"folder": "mixture", "include": ["upper", "first", "length", "double"], "samples": 16},
            "conflict": {"examples": 8, "sketch_size": 1024},
            "evaluate": {"exact_match": "never", "drift": {"prompts": 0}, "kept_folder": "kept"},
            "study": {"methods": METHODS, "seeds": 2, "scales": [0.5]},
            **changes,
        },
    )
    for task in ("last", "reverse"):
        builders.write_rows(folder / "kept" / task / "test.jsonl", builders.task_rows(task, 6, seed=2))
    return case


def study(case: Case, run: Path, agree: bool = True) -> StudyResult | None:
    seen: list[Cost] = []

    def ask(cost: Cost) -> bool:
        seen.append(cost)
        return agree

    result = run_study(Session(load_recipe(case.recipe), run, Silent()), ask)
    assert len(seen) == 1
    return result


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Case, StudyResult]:
    case = small(tmp_path_factory.mktemp("study"), base)
    result = study(case, case.run)
    assert result is not None
    return case, result


def but_time(found: StudyResult) -> Any:
    runs = [(run.method, run.seed, run.values, run.target_tokens, run.line) for run in found.runs]
    return runs, found.differences


def only(result: StudyResult, method: str, seed: int) -> Run:
    (found,) = [run for run in result.of(method) if run.seed == seed]
    return found


def model(case: Case, place: str) -> dict[str, np.ndarray]:
    return builders.weights(case.run / "study" / place / "model")


def test_every_method_has_every_seed_and_the_same_budget_to_the_token(done: tuple[Case, StudyResult]) -> None:
    case, result = done
    assert len(result.runs) == len(result.methods) * 2
    counts = builders.read(case.run / "mixture" / "datasets.json")
    targets, tokens = (sum(item[key] for item in counts) for key in ("target_tokens", "tokens"))
    for name, factor in {"joint": 1, "random-2": 1, "pca-1d": 1, "pca-1d+ties": 1, "soup-2": 2, "wise_ft": 1}.items():
        for run in result.of(name):
            assert (run.target_tokens, run.tokens) == (factor * targets, factor * tokens), name


def test_common_stages_are_made_once(done: tuple[Case, StudyResult]) -> None:
    case, _ = done
    for seed in ("s0", "s1"):
        trained = {path.parent.relative_to(case.run / "study" / seed).as_posix() for path in
                   (case.run / "study" / seed).glob("*/branches/*/record.json")}  # fmt: skip
        assert trained == {
            *("joint/branches/0", "joint@order=1/branches/0"),
            *("random-2/branches/0", "random-2/branches/1", "pca-1d/branches/0", "pca-1d/branches/1"),
        }
    assert not (case.run / "branches").exists()


def test_baselines_are_what_their_definitions_say(done: tuple[Case, StudyResult]) -> None:
    case, result = done
    theta = builders.weights(Path(load_recipe(case.recipe).model.base))
    joint, other = model(case, "s0/joint/branches/0"), model(case, "s0/joint@order=1/branches/0")
    wise, soup = model(case, "s0/merges/wise_ft/merged"), model(case, "s0/merges/soup-2/merged")
    for name in theta:
        a, b, zero = (item[name].astype(np.float64) for item in (joint, other, theta))
        np.testing.assert_allclose(soup[name], (a + b) / 2, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(wise[name], (zero + a) / 2, rtol=1e-6, atol=1e-7)
    matched, own = only(result, "joint_matched", 0), only(result, "pca-1d", 0)
    line = only(result, "joint", 0).line
    assert own.line is not None
    assert line is not None
    assert matched.scale * line.displacement == pytest.approx(own.line.displacement)
    moved = sum(np.square(joint[name].astype(np.float64) - theta[name]).sum() for name in theta) ** 0.5
    assert line.displacement == pytest.approx(moved, rel=1e-6)


def test_a_lines_ends_are_the_models_themselves(done: tuple[Case, StudyResult]) -> None:
    _, result = done
    base = only(result, "base", 0).values
    for run in result.runs:
        if run.line is None:
            continue
        ends = {point.scale: point.losses for point in run.line.points}
        assert sorted(ends) == [0.0, 0.5, 1.0]
        for part, column in (("mixture", "learned"), ("kept", "kept")):
            assert ends[0.0][part] == pytest.approx(base[column], rel=1e-5)  # type: ignore[index]
            assert ends[1.0][part] == pytest.approx(run.values[column], rel=1e-4)  # type: ignore[index]
    half = {p.scale: p.losses for p in only(result, "joint", 1).line.points}[0.5]  # type: ignore[union-attr]
    assert half["mixture"] == pytest.approx(only(result, "wise_ft", 1).values["learned"], rel=1e-4)


def test_seeds_differ_and_only_in_what_depends_on_them(done: tuple[Case, StudyResult]) -> None:
    _, result = done
    for method in result.methods:
        first, second = (only(result, method, seed).values for seed in (0, 1))
        assert (first == second) == (method == "base"), method


def test_a_second_call_changes_nothing(done: tuple[Case, StudyResult]) -> None:
    case, result = done
    before = builders.snapshot(case.run / "study")
    assert study(case, case.run) == result
    changed = {name for name, facts in builders.snapshot(case.run / "study").items() if before.get(name) != facts}
    assert changed <= {"study.json"}


def test_the_status_lists_a_finished_study_as_done(done: tuple[Case, StudyResult]) -> None:
    case, result = done
    told = builders.call("status", case.run / "study", "--json")
    stages = {row["stage"]: row for row in json.loads(told.out)["stages"]}
    assert {row["state"] for row in stages.values()} == {"done"}, stages
    assert stages["s1 lines"]["detail"] == "5 lines"
    assert stages["s0/random-2"]["detail"] == "2 branches"
    assert sum(run.line is not None for run in result.runs if run.seed == 1) == 5


def test_results_of_another_seed_or_method_are_not_accepted(done: tuple[Case, StudyResult], tmp_path: Path) -> None:
    case, _ = done
    for taken, given in (("s0/joint", "s1/joint"), ("s0/joint@order=1", "s0/joint")):
        run = tmp_path / given.replace("/", "-")
        shutil.copytree(case.run, run)
        shutil.rmtree(run / "study" / taken / "branches")
        shutil.copytree(case.run / "study" / given / "branches", run / "study" / taken / "branches")
        result = builders.call("study", case.recipe, "--output", run, "--yes", "--quiet")
        assert result.code == 2
        assert "other than the current ones" in result.err


@pytest.mark.slow
def test_benchmark_scores_are_columns_of_every_model(done: tuple[Case, StudyResult], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    case, before = done
    run = tmp_path / "run"
    shutil.copytree(case.run, run)
    tasks = {name: tmp_path / f"{name}.jsonl" for name in ("pick", "choose")}
    for number, file in enumerate(tasks.values()):
        rows = [{"question": f"{w}: ", "choices": ["ab", w, "xy"], "answer": number} for w in ("cat", "dog", "emu")]
        builders.write_rows(file, rows)
    recipe = changed(load_recipe(case.recipe), (("evaluate.suites", [str(file) for file in tasks.values()]),))
    result = run_study(Session(recipe, run, Silent()), lambda _: True)
    assert result is not None
    assert result.columns()[-3:] == ("pick acc", "choose acc", "suites, mean")
    for ran, old in zip(result.runs, before.runs, strict=True):
        name = ran.method if ran.method == "base" else f"{ran.method}.s{ran.seed}"
        scores = builders.read(run / "study" / "suites" / name / "scores.json")["scores"]
        assert ran.values["pick acc"] == scores["pick"]["acc"]
        assert ran.values["suites, mean"] == pytest.approx((scores["pick"]["acc"] + scores["choose"]["acc"]) / 2)
        assert old.values.items() <= ran.values.items()
    gain = result.difference("pca-1d", "choose acc", "end")
    ours, joint = ([r.values["choose acc"] for r in result.of(name)] for name in ("pca-1d", "joint"))
    assert gain is not None
    assert gain.mean == pytest.approx(np.mean(ours) - np.mean(joint))
    assert gain.wins == sum(a > b for a, b in zip(ours, joint, strict=True))


def test_refusing_the_cost_trains_nothing(done: tuple[Case, StudyResult], tmp_path: Path) -> None:
    case, _ = done
    assert study(case, tmp_path / "run", agree=False) is None
    assert not list((tmp_path / "run" / "study").glob("s*"))
    asked = builders.call("study", case.recipe, "--output", tmp_path / "run")
    assert asked.code == 2
    assert "--yes" in asked.err


def test_the_cost_says_what_gradient_surgery_takes(done: tuple[Case, StudyResult], tmp_path: Path) -> None:
    case, result = done
    shutil.copytree(case.run, tmp_path / "run")
    recipe = changed(load_recipe(case.recipe), (("study.methods", ["pcgrad", "finch"]),))
    seen: list[Cost] = []
    assert run_study(Session(recipe, tmp_path / "run", Silent()), lambda cost: bool(seen.append(cost))) is None
    count = sum(array.size for array in builders.weights(Path(recipe.model.base)).values())
    assert seen[0].surgery == Surgery(4, count, 4, 6, 2 * 4 * count)
    sources = {*("joint", "joint@balancing=pcgrad", "joint@scheduler=finch", "pca-1d")}
    assert {item.source for item in seen[0].items} == sources
    assert result.surgery is None


def test_surgery_that_does_not_fit_is_refused_before_anything_is_trained(
    done: tuple[Case, StudyResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, _ = done
    monkeypatch.setattr("merit.train.balancing.ROOM", 1000)
    recipe = changed(load_recipe(case.recipe), (("study.methods", ["gradnorm"]),))
    with pytest.raises(RecipeError, match="gradnorm would hold"):
        run_study(Session(recipe, tmp_path / "run", Silent()), lambda _: True)
    assert not list((tmp_path / "run" / "study").glob("s*"))


def test_budgets_are_equal_to_the_token_for_every_way_to_train(tmp_path: Path, base: Path) -> None:
    names = ["one_budget", "joint@budget=0.5", "own@rounds=2", "finch", "pcgrad", "gradnorm"]
    result = study(small(tmp_path, base, study={"methods": names, "seeds": 1, "scales": [0.5]}), tmp_path / "run")
    assert result is not None
    whole = only(result, "joint", 0)
    for name in ("pca-1d@rounds=2", "finch", "pcgrad", "gradnorm", "pca-1d"):
        assert (only(result, name, 0).tokens, only(result, name, 0).target_tokens) == (
            whole.tokens,
            whole.target_tokens,
        )
    half, again = only(result, "one_budget", 0), only(result, "joint@budget=0.5", 0)
    assert half.tokens == again.tokens
    assert half.tokens == pytest.approx(whole.tokens / 2, rel=0.1)  # rows are not cut


def test_a_mixture_that_is_too_small_is_refused_by_the_methods_name(tmp_path: Path, base: Path) -> None:
    case = small(tmp_path, base, study={"methods": ["pca-3d"]})
    result = builders.call("study", case.recipe, "--output", case.run, "--yes")
    assert result.code == 2
    assert "study.methods: pca-3d" in result.err
    assert not case.run.exists()


@pytest.mark.slow
def test_searched_weights_are_reported_on_rows_that_no_search_saw(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With searched weights every method is measured on the same half, in every seed; a λ is chosen on the other half."""
    chose: set[bytes] = set()
    measure = scale_search._mean_loss

    def noted(session: Session, model: Any, datasets: Any) -> float:
        chose.update(row_digest(row, 0) for rows in datasets.values() for row in rows)
        return measure(session, model, datasets)

    monkeypatch.setattr(scale_search, "_mean_loss", noted)
    case = small(
        tmp_path,
        base,
        merge={"search": {"evaluations": 8}, "scales": [0.5]},
        study={
            "methods": ["base", "own+weights=auto", "joint+weights=auto", "joint+scale=auto"],
            "seeds": 2,
            "scales": [0.5],
        },
    )
    result = study(case, case.run)
    assert result is not None
    searched = {"pca-1d+weights=auto", "joint+weights=auto", "joint+scale=auto"}
    assert set(result.methods) == {"base", "joint", "pca-1d", *searched}
    record = builders.read(case.run / "study" / "evaluation" / "record.json")
    assert record["settings"]["rows"] == "reporting half"
    figures = builders.read(case.run / "study" / "evaluation" / "results.json")
    counted = {name: [entry["examples"] for entry in by.values()] for name, by in figures.items()}
    assert all(sum(counts) == 12 for counts in counted.values()), counted  # of 24 test rows
    assert only(result, "pca-1d+weights=auto", 0).line is not None
    rows = held_out_rows(case.run / "mixture")
    reporting = reporting_rows(rows, 0)
    told = {row_digest(row, 0) for part in (reporting.test, reporting.kept) for sets in part.values() for row in sets}
    everything = {row_digest(row, 0) for part in (rows.test, rows.kept) for sets in part.values() for row in sets}
    assert chose
    assert chose == everything - told
    for seed in (0, 1):
        merges = case.run / "study" / f"s{seed}" / "merges"
        scale = builders.read(merges / "joint+scale=auto" / "merged" / "record.json")["scale_search"]
        assert scale["rows_shared_with_evaluation"] == []
        weight = builders.read(merges / "joint+weights=auto" / "merged" / "record.json")["weight_search"]
        assert len(weight["points"]) == 8
        assert len(weight["chosen"]["coefficients"]) == 1


@pytest.mark.slow
def test_a_study_killed_anywhere_resumes_to_the_same_table(
    done: tuple[Case, StudyResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop before every third stage that is begun, until nothing is left."""
    case, expected = done
    write = Stage.writing
    begun = 0

    def stopping(stage: Stage, *args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun % 3 == 0:
            raise Interrupted("killed")
        return write(stage, *args, **kwargs)

    monkeypatch.setattr(Stage, "writing", stopping)
    stops = 0
    while True:
        try:
            result = study(case, tmp_path / "run")
            break
        except Interrupted:
            stops += 1
    assert stops > 10

    assert result is not None
    assert but_time(result) == but_time(expected)
    trained = [BranchResult.load(file.parent) for file in (tmp_path / "run").glob("study/*/*/branches/*/record.json")]
    assert len(trained) == 12


@pytest.mark.slow
def test_a_study_whose_process_is_killed_resumes_to_the_same_table(
    done: tuple[Case, StudyResult], tmp_path: Path
) -> None:
    """In the middle of a branch, of the lines and of the evaluation."""
    case, expected = done
    run, log = tmp_path / "run", tmp_path / "log"
    for pattern, sent, code in (
        ("study/s*/*/branches/*/progress.json", signal.SIGKILL, -signal.SIGKILL),
        ("study/s0/lines/*/line.json", signal.SIGKILL, -signal.SIGKILL),
        ("study/evaluation/models/*.json", signal.SIGTERM, 75),
        ("never", None, 0),
    ):
        process = builders.start("study", case.recipe, "--output", run, "--yes", log=log)
        if sent is not None:
            assert builders.until(process, run, pattern), (pattern, log.read_text())
        builders.ended(process, log, sent, code)
    assert but_time(StudyResult.load(run / "study")) == but_time(expected)
