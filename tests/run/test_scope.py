"""Scopes of a study: every method and seed has stages of its own, and shares those that are the same."""

from __future__ import annotations

from pathlib import Path

from merit.recipe.load import parse_recipe
from merit.recipe.methods import methods_of
from merit.recipe.schema import Recipe
from merit.run import key
from merit.run.scope import Scope, merge_scope, source_scope, study_scopes

RUN = Path("/run")
ROWS = {"a": "1", "b": "2"}


def recipe(**study: object) -> Recipe:
    return parse_recipe(
        {
            "name": "x",
            "model": {"base": "/base"},
            "mixture": {"folder": "/data"},
            "baselines": ["random"],
            "study": {"methods": ["paper", "sceptics", "own+ties"], "seeds": 3, **study},
        }
    )


def test_no_two_scopes_share_a_folder_or_a_branch() -> None:
    made = recipe(learning_rates=[1e-4, 1e-3], batch_sizes=[2])
    scopes = [Scope(RUN), Scope(RUN, "random"), *study_scopes(made, RUN)]
    assert len({scope.root for scope in scopes}) == len(scopes)
    stages = [key.branch_stage(scope.recipe(made), scope, 0, ["a", "b"], base="b", rows=ROWS) for scope in scopes[2:]]
    by_training: dict[str, set[str]] = {}
    for scope, stage in zip(scopes[2:], stages, strict=True):
        seed, _, name = (scope.method or "").partition("/")
        by_training.setdefault(stage.fingerprint, set()).add(seed + "".join(name.partition("@")[1:]))
    assert all(len(names) == 1 for names in by_training.values())  # one seed, one way of training


def test_a_seed_changes_every_branch_and_no_other_setting() -> None:
    made = recipe()
    source = methods_of(made)[1].sources[0]
    first, second = (source_scope(made, RUN, source, seed) for seed in (0, 1))
    assert first.recipe(made).seed == 0
    assert second.recipe(made) == first.recipe(made).model_copy(update={"seed": 1})
    one, other = (
        key.branch_stage(scope.recipe(made), scope, 0, ["a"], base="b", rows=ROWS) for scope in (first, second)
    )
    assert one.fingerprint != other.fingerprint


def test_members_of_a_soup_differ_in_the_order_alone() -> None:
    made = recipe()
    soup = next(method for method in methods_of(made) if method.name == "soup-3")
    members = merge_scope(made, RUN, soup, 4).sources
    recipes = [member.recipe(made) for member in members]
    assert len({one.train.data_seed for one in recipes}) == 3
    plain = [one.train.model_copy(update={"data_seed": None}) for one in recipes]
    assert plain[0] == plain[1] == plain[2]
    assert {one.seed for one in recipes} == {4}


def test_gradients_are_each_seeds_own_or_the_runs() -> None:
    assert {scope.shared for scope in study_scopes(recipe(), RUN)} == {RUN / "study" / f"s{seed}" for seed in range(3)}
    assert {scope.shared for scope in study_scopes(recipe(gradients="once"), RUN)} == {RUN}


def test_a_scale_is_chosen_on_other_rows_when_another_method_searches_its_weights() -> None:
    """A merge made on the evaluation's own rows does not stand any more then."""
    rows = []
    for methods in (["joint+scale=auto"], ["joint+scale=auto", "own+weights=auto"]):
        made = recipe(methods=methods)
        (method,) = [method for method in methods_of(made) if method.name == "joint+scale=auto"]
        scope = merge_scope(made, RUN, method, 0)
        rows.append(key.merged_stage(scope.recipe(made), scope, {}, base="b").settings.get("rows"))
    assert rows == [None, "choosing half"]
