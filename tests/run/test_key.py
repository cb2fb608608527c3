"""What decides a stage's answer, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merit.errors import RecipeError
from merit.recipe.load import parse_recipe
from merit.recipe.schema import Recipe
from merit.run import key
from merit.run.scope import Scope
from merit.run.store import Stage

ROWS = {"a": "1" * 64, "b": "2" * 64}


def recipe(**blocks: Any) -> Recipe:
    data: dict[str, Any] = {"name": "x", "model": {"base": "/base"}, "mixture": {"folder": "/data"}}
    for name, block in blocks.items():
        data[name] = {**data.get(name, {}), **block} if isinstance(block, dict) else block
    return parse_recipe(data)


def stages(chosen: Recipe) -> dict[str, Stage]:
    run = Path("/run")
    scope = Scope(run)
    return {
        "mixture": key.mixture_stage(chosen, run, tokenizer="t", sources={"a": "s"}),
        "gradients": key.conflict_stage(chosen, run, base="b", rows=ROWS),
        "split": key.split_stage(chosen, scope, rows=ROWS, geometry="g"),
        "branch": key.branch_stage(chosen, scope, 0, ["a"], base="b", rows=ROWS),
        "merged": key.merged_stage(chosen, scope, {}, base="b"),
    }


def changed(**blocks: Any) -> set[str]:
    """Stages that another setting makes stale."""
    before, after = stages(recipe()), stages(recipe(**blocks))
    return {name for name in before if before[name].fingerprint != after[name].fingerprint}


@pytest.mark.parametrize(
    "blocks",
    [
        {"name": "y"},
        {"mixture": {"folder": "/elsewhere"}},
        {"model": {"base": "/elsewhere"}},
        {"train": {"device": "cpu", "threads": 3, "checkpoint_minutes": 1}},
        {"conflict": {"batch_tokens": 64, "cache": "/cache"}},
        {"conflict": {"stride": 7, "max_examples": 9}},  # of representations and samples that are not used
        {"merge": {"scales": [0.5], "rule": "learned"}},  # of a search that is not made
        {"evaluate": {"batch_tokens": 64}},
    ],
    ids=str,
)
def test_how_an_answer_is_made_decides_nothing(blocks: dict[str, Any]) -> None:
    assert changed(**blocks) == set()


@pytest.mark.parametrize(
    ("blocks", "stale"),
    [
        ({"seed": 1}, {"mixture", "gradients", "branch"}),
        ({"train": {"max_length": 64}}, {"mixture"}),  # later stages see other rows
        ({"train": {"learning_rate": 0.5}}, {"branch"}),
        ({"model": {"trainable": "all"}}, {"gradients", "branch"}),
        ({"conflict": {"examples": 10}}, {"gradients"}),
        ({"split": {"axes": 3}}, {"split"}),
        ({"split": {"method": "random"}}, {"split"}),
        ({"merge": {"operator": "ties"}}, {"merged"}),
        ({"mixture": {"samples": 5}}, {"mixture"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else " ".join(sorted(value)),
)
def test_each_setting_makes_stale_what_it_decides(blocks: dict[str, Any], stale: set[str]) -> None:
    assert changed(**blocks) == stale


def test_every_setting_of_a_branch_decides_it_unless_it_is_known_not_to() -> None:
    """A new key of `train` counts until somebody says that it does not."""
    settings = key.training_settings(recipe())["train"]
    left_out = set(recipe().train.model_dump()) - set(settings)
    assert left_out == {
        *("device", "threads", "processes", "sharding", "loader_workers", "compile", "tf32", "deterministic"),
        *("checkpoint_minutes", "checkpoint_steps", "report_to", "max_length"),
        *("balancing", "max_lr_ratio", "save_second_moments", "rounds", "between"),  # at their defaults
    }


def test_a_branch_depends_on_its_own_group_alone() -> None:
    def of(rows: dict[str, str]) -> str:
        return key.branch_stage(recipe(), Scope(Path("/run")), 0, ["a"], base="b", rows=rows).fingerprint

    assert of(ROWS) == of({**ROWS, "b": "3" * 64})
    assert of(ROWS) != of({**ROWS, "a": "3" * 64})


def test_a_baseline_has_the_same_key_in_a_folder_of_its_own() -> None:
    run = Path("/run")
    own = key.split_stage(recipe(split={"method": "random"}), Scope(run), rows=ROWS, geometry=None)
    baseline = key.split_stage(recipe(split={"method": "random"}), Scope(run, "random"), rows=ROWS, geometry=None)
    assert own.fingerprint == baseline.fingerprint
    assert (baseline.path, baseline.name) == (run / "baselines" / "random" / "split", "random split")


def test_one_round_is_a_recipe_without_rounds() -> None:
    assert changed(train={"rounds": 1, "between": {"optimizer": "reset", "outer": {"scale": 0.5}}}) == set()
    assert "rounds" not in stages(recipe())["branch"].settings["train"]
    assert "between" not in stages(recipe())["branch"].settings["train"]


def test_rounds_decide_branches() -> None:
    assert changed(train={"rounds": 2}) == {"branch"}
    before, after = (
        stages(recipe(train={"rounds": 2, "between": {"allow_missing": allowed, "keep_files": allowed}}))["branch"]
        for allowed in (False, True)
    )
    assert before.fingerprint == after.fingerprint


def test_joint_training_has_no_rounds() -> None:
    assert changed(split={"method": "joint"}, train={"rounds": 2}) == changed(split={"method": "joint"})


@pytest.mark.parametrize(
    ("blocks", "word"),
    [
        ({"model": {"base": "/base", "trainable": "lora"}}, "lora"),
        ({"merge": {"operator": "ties"}}, "ties"),
        ({"merge": {"operator": "task_arithmetic", "options": {"normalize": False}}}, "task_arithmetic"),
        ({"train": {"rounds": 2, "between": {"resplit": True, "optimizer": "keep"}}}, "resplit"),
    ],
)
def test_what_does_not_go_with_rounds_is_refused_by_name(blocks: dict[str, Any], word: str) -> None:
    train = {"rounds": 2, **blocks.pop("train", {})}
    with pytest.raises(RecipeError, match=word):
        recipe(train=train, **blocks)
