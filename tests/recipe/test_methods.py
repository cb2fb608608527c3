"""Names of a study's methods: what each changes, which sets exist, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from merit.errors import RecipeError
from merit.recipe.load import changed, parse_recipe
from merit.recipe.methods import Method, methods_of
from merit.recipe.schema import Recipe


def recipe(*methods: str, **study: Any) -> Recipe:
    block = {"methods": list(methods) or ["base"], **study}
    return parse_recipe(
        {
            "name": "x",
            "model": {"base": "/base"},
            "mixture": {"folder": "/data"},
            "train": {"epochs": 3},
            "study": block,
        }
    )


def named(*methods: str, **study: Any) -> dict[str, Method]:
    return {method.name: method for method in methods_of(recipe(*methods, **study))}


def changes(method: Method) -> dict[str, Any]:
    (source,) = method.sources
    return dict(source.changes)


def test_without_a_block_base_baseline_and_own_method_are_compared() -> None:
    plain = parse_recipe({"name": "x", "model": {"base": "/b"}, "mixture": {"folder": "/d"}})
    names = [method.name for method in methods_of(plain)]
    assert names == ["base", "joint", "wise_ft", "one_budget", "random-4", "pca-2d"]
    assert plain.study.seeds_from(7) == (7, 8, 9, 10, 11)


def test_own_and_baseline_are_always_there_and_nothing_twice() -> None:
    assert list(named("pca-2d", "own", "pca-2d")) == ["joint", "pca-2d"]


def test_sizes_are_groups_or_axes() -> None:
    found = named("random-8", "raw_pca-3d", "kmeans-2", "conflict_induced", "pca-8")
    assert changes(found["random-8"]) == {"split.method": "random", "split.axes": 3}
    assert changes(found["raw_pca-3d"]) == {"split.method": "raw_pca", "split.axes": 3}
    assert changes(found["kmeans-2"])["split.axes"] == 1
    assert changes(found["conflict_induced-2"])["split.axes"] == 1
    assert changes(found["pca-3d"])["split.axes"] == 3


def test_finch_is_joint_training_at_a_rate_that_follows_the_loss() -> None:
    method = named("sceptics")["finch"]
    assert changes(method) == {"split.method": "joint", "train.scheduler": "finch"}
    assert method.merge is None


def test_searches_of_a_study_have_equal_budgets() -> None:
    """Four branches would get 16 + 12 x 4 points, joint training 28; here all get the most."""
    found = named("searched", "pca-3d+weights=auto")
    searched = [method for name, method in found.items() if "auto" in name]
    assert len(searched) == 4
    assert {dict(method.merge or ())["merge.search.evaluations"] for method in searched} == {16 + 12 * 8}
    assert all(("merge.search.evaluations", 112) not in (found[name].merge or ()) for name in ("joint", "pca-2d"))


def test_budgets_multiply_the_epochs() -> None:
    found = named("joint@budget=0.5", "one_budget")
    assert changes(found["joint@budget=0.5"])["train.epochs"] == 1.5
    assert changes(found["one_budget"])["train.epochs"] == 0.75  # one of four branches
    assert found["joint"].merge is None


def test_a_soup_shares_its_first_member_with_joint_training() -> None:
    found = named("soup-3")
    members = found["soup-3"].sources
    assert members[0] == found["joint"].sources[0]
    seeds = {source.data_seed(seed) for source in members for seed in range(50)}
    assert len(seeds) == 150  # the orders of one seed are those of no other


def test_merges_share_the_branches_they_merge() -> None:
    found = named("operators", "own+scale=0.5", "own@learning_rate=0.01+ties")
    assert found["pca-2d+ties"].sources == found["pca-2d"].sources
    assert found["pca-2d+ties"].merge == (("merge.operator", "ties"),)
    assert found["pca-2d+scale=0.5"].merge == (("merge.scale", 0.5),)
    assert found["pca-2d@learning_rate=0.01+ties"].sources != found["pca-2d"].sources
    assert "pca-2d+average" not in found


def test_searched_methods_are_searched_in_the_same_way() -> None:
    found = {name: method for name, method in named("searched").items() if "+" in name}
    assert list(found) == ["pca-2d+weights=auto", "random-4+weights=auto", "joint+weights=auto"]
    assert {dict(method.merge or ())["merge.weights"] for method in found.values()} == {"auto"}


def test_grids_add_methods() -> None:
    found = named(batch_sizes=[4], learning_rates=[1e-4], sgd_learning_rates=[0.1, 1.0])
    assert changes(found["joint@batch_size=4"])["train.batch_size"] == 4
    assert changes(found["pca-2d@learning_rate=0.0001"])["train.learning_rate"] == 1e-4
    assert changes(found["pca-1d@optimizer=sgd@learning_rate=1"])["train.optimizer"] == "sgd"
    assert len(found) == 1 + 1 + 1 + 2 + 8 + 1


@pytest.mark.parametrize(
    "name",
    [
        "pcca-2d",
        "random-3",
        "random-1",
        "joint@budjet=1",
        "own+tiess",
        "own+scal=1",
        "base+ties",
        "pca-9d",
        "soup-1",
        "",
    ],
)
def test_what_cannot_be_read_is_refused_when_the_recipe_is(name: str) -> None:
    with pytest.raises(RecipeError, match=r"study\.methods"):
        recipe(name)


def test_an_invalid_value_is_refused_by_its_key() -> None:
    with pytest.raises(RecipeError, match="learning_rate"):
        changed(recipe(), named("joint@learning_rate=-1")["joint@learning_rate=-1"].sources[0].changes)


def test_changes_leave_everything_else_as_it_was() -> None:
    before = recipe()
    after = changed(before, [("train.epochs", 1), ("seed", 5)])
    assert after.train.epochs == 1
    assert after.seed == 5
    assert changed(after, [("train.epochs", 3.0), ("seed", 0)]) == before
