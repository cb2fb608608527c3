"""The shipped recipes of the paper: each is checked offline, without weights or data, in every variant that it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.builders import Result, write_rows

from merit.errors import RecipeError
from merit.recipe.load import dump_recipe, load_recipe, parse_recipe
from merit.run import check as plans
from merit.run.needs import published_weights

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
SCALED = [
    "--set=name=mixture-176-7b-scaled",
    "--set=prepare.stages.knowledge.mixture.exclude=[]",
    "--set=prepare.stages.instruct.mixture.exclude=[]",
]
GIB = 2**30


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's data folder must decide what these recipes find, and the hub must not be asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))


def check(merit: Callable[..., Result], name: str, *words: str) -> dict[str, Any]:
    result = merit("check", "--offline", PAPER / f"{name}.yaml", "--output", "run", "--json", *words)
    assert result.code == 0, result.err
    assert not Path("run").exists()
    assert merit("check", "--offline", PAPER / f"{name}.yaml", "--output", "run", *words).code == 0
    return json.loads(result.out)


def test_every_recipe_of_the_paper_is_tested() -> None:
    assert {path.stem for path in PAPER.glob("*.yaml")} == {"vision-flan-3b", "mixture-176-7b", "flan-text-3b"}


def test_vision_flan(merit: Callable[..., Result]) -> None:
    plan = check(merit, "vision-flan-3b")
    assert plan["split"] == {"method": "pca", "groups": 8}
    assert plan["branches"] == 8 + 1 + 8, "MERIT-3D, joint, random"
    assert plan["base"]["parameters"] == 3_754_622_976
    assert plan["base"]["trainable"] == 3_085_938_688, "the language decoder"
    assert plan["memory_bytes"] == 4 * 3_754_622_976 + 12 * 3_085_938_688
    models = 17 + 2  # branches, the run's merge and random's
    assert plan["disk_bytes"] == 2 * 3_754_622_976 * models + 4 * 3_754_622_976 + 8 * 3_085_938_688
    assert any("not checked: the mixture" in note for note in plan["notes"])
    recipe = load_recipe(PAPER / "vision-flan-3b.yaml")
    assert recipe.model.max_pixels == 784 * 784
    assert recipe.conflict.examples == 200


@pytest.mark.parametrize("words", [[], SCALED], ids=["plain", "scaled"])
def test_the_mixture_of_176(merit: Callable[..., Result], words: list[str]) -> None:
    plan = check(merit, "mixture-176-7b", *words)
    assert plan["split"] == {"method": "pca", "groups": 4}
    assert plan["base"]["parameters"] == 8_292_166_656, "assembled: as large as Qwen2.5-VL-7B"
    steps = {step["name"]: step for step in plan["preparation"]}
    assert list(steps) == ["assemble", "align", "knowledge", "instruct"]
    assert "2,181 steps" in steps["align"]["does"]
    assert len(steps["knowledge"]["datasets"]) == (3 if words else 2)
    assert len(steps["instruct"]["datasets"]) == (4 if words else 1)
    names = [item["name"] for item in plan["datasets"]]
    assert len([name for name in names if name.startswith("cauldron.")]) == 50
    assert len(names) == 56, "Vision-FLAN is cut into its tasks when it is read"
    language, projector = 7_615_616_512, 44_574_464
    assert plan["memory_bytes"] == 4 * 8_292_166_656 + 12 * (language + projector), "stages 1.5 and 2 train most"
    assert plan["disk_bytes"] > 2 * 8_292_166_656 * (4 + 9 + 2), "preparation, branches, merges"
    small = check(merit, "mixture-176-7b", "--set=train.optimizer=adafactor")
    assert small["memory_bytes"] < 64 * GIB < plan["memory_bytes"]


def test_flan(merit: Callable[..., Result]) -> None:
    plan = check(merit, "flan-text-3b")
    assert plan["split"]["groups"] == 4
    assert plan["base"]["trainable"] == plan["base"]["parameters"] == 3_085_938_688
    assert plan["preparation"] == []


def test_what_is_here_is_looked_at_offline_too(merit: Callable[..., Result]) -> None:
    data = Path("flan")
    write_rows(data / "a.jsonl", [{"inputs": "q", "targets": "a", "task": t} for t in ("w", "x", "y", "z")])
    words = (f"--set=mixture.path={data}", "--set=mixture.test=null")
    assert len(check(merit, "flan-text-3b", *words)["datasets"]) == 4
    write_rows(data / "a.jsonl", [{"inputs": "q", "targets": 3, "task": t} for t in ("w", "x", "y", "z")])
    result = merit("check", "--offline", PAPER / "flan-text-3b.yaml", *words, "--set=mixture.bad_rows=error")
    assert result.code == 2
    assert "targets must be text" in result.err


def test_steps_where_every_budget_is_stated(merit: Callable[..., Result]) -> None:
    listed = (
        "[{name: a, path: no/a, samples: 100}, {name: b, path: no/b, samples: 29}, {name: c, path: no/c, samples: 9}]"
    )
    words = ("--set=mixture={datasets: " + listed + ", exclude: [c]}", "--set=train.batch_size=64")
    words += ("--set=split.axes=1", "--set=train.epochs=2")
    assert check(merit, "flan-text-3b", *words)["steps"] == 2 * 3
    assert check(merit, "flan-text-3b", *words, "--set=mixture.datasets.b.samples=null")["steps"] is None


def test_a_model_that_nobody_knows_has_no_figures(merit: Callable[..., Result]) -> None:
    plan = check(merit, "vision-flan-3b", "--set=model.base=somebody/something")
    assert (plan["memory_bytes"], plan["disk_bytes"], plan["base"]["parameters"]) == (None, None, None)
    assert any("memory and disk are not known" in note for note in plan["notes"])


def test_too_few_listed_datasets_are_refused_offline(merit: Callable[..., Result]) -> None:
    listed = "--set=mixture={datasets: [{name: a, path: no/a}]}"
    result = merit("check", "--offline", PAPER / "vision-flan-3b.yaml", listed)
    assert result.code == 2
    assert "8 groups" in result.err


@pytest.mark.parametrize("trainable", ["language", "projector", ["projector", "vision"], "all", ["model.layers.1.*"]])
def test_published_subsets(trainable: Any) -> None:
    recipe = load_recipe(PAPER / "vision-flan-3b.yaml")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"trainable": trainable})})
    roles = {"language": 3_085_938_688, "projector": 36_708_608, "vision": 631_975_680}
    wanted = [trainable] if isinstance(trainable, str) else trainable
    expected = sum(roles[role] for role in wanted) if set(wanted) <= set(roles) else 3_754_622_976
    found = published_weights(recipe)
    assert found is not None
    assert found.trainable == expected


def test_items_of_a_list_are_set_by_name_or_number() -> None:
    path = PAPER / "mixture-176-7b.yaml"
    by_name = load_recipe(path, ["prepare.stages.instruct.train.epochs=2", "mixture.datasets.vlguard.samples=7"])
    by_number = load_recipe(path, ["prepare.stages.2.train.epochs=2", "mixture.datasets.5.samples=7"])
    assert by_name == by_number
    assert by_name.prepare is not None
    assert [stage.train.epochs for stage in by_name.prepare.stages] == [1, 1, 2]
    assert (by_name.prepare.stages[2].train.batch_size, by_name.train.epochs) == (128, 1)
    for wrong in ("prepare.stages.instuct.train.epochs=2", "prepare.stages.3={}"):
        with pytest.raises(RecipeError, match="align, knowledge, instruct"):
            load_recipe(path, [wrong])


def test_a_stage_takes_what_it_does_not_say_from_the_recipes_own_train() -> None:
    recipe = load_recipe(PAPER / "mixture-176-7b.yaml", ["train.warmup_ratio=0.1"])
    assert recipe.prepare is not None
    assert {stage.train.warmup_ratio for stage in recipe.prepare.stages} == {0.1}
    assert recipe.prepare.stages[0].train.learning_rate == 1e-3
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)), ["train.warmup_ratio=0.2"])
    assert again.prepare is not None
    assert {stage.train.warmup_ratio for stage in again.prepare.stages} == {0.1}, "a resolved recipe says all of it"


def test_the_vision_starter_recipe_loads_with_and_without_its_comments(
    tmp_path: Path,
    merit: Callable[..., Result],
) -> None:
    assert merit("init", "--vision", "recipe.yaml").code == 0
    text = Path("recipe.yaml").read_text()
    assert load_recipe(tmp_path / "recipe.yaml").model.trainable == "language"
    block = text[text.index("# prepare:") : text.index("mixture:\n  folder: PATH_TO")]
    Path("recipe.yaml").write_text(text.replace(block, block.replace("\n#", "\n").replace("# prepare", "prepare")))
    prepared = load_recipe(tmp_path / "recipe.yaml").prepare
    assert prepared is not None
    assert [stage.name for stage in prepared.stages] == ["align", "instruct"]


def test_what_is_not_here_is_listed_whatever_it_is_for(merit: Callable[..., Result]) -> None:
    write_rows(Path("a.jsonl"), [{"inputs": "q", "targets": "a"}])
    listed = "[{name: a, path: a.jsonl}, {name: b, path: a.jsonl, test: no/b.jsonl}, {name: c, path: no/c.jsonl}]"
    words = ("--set=mixture={datasets: " + listed + "}", "--set=split.axes=1")
    words += ("--set=evaluate.kept=[{name: k, path: no/k.jsonl}]", "--set=evaluate.kept_folder=no/kept")
    plan = check(merit, "flan-text-3b", *words)
    assert [(item["name"], item["format"]) for item in plan["datasets"]] == [
        ("a", "flan"),
        ("b", plans.NOT_CHECKED),
        ("c", plans.NOT_CHECKED),
    ]
    assert plan["kept"] == ["k"]
    assert any("not checked: 3 datasets, b, c, k." in note for note in plan["notes"])
