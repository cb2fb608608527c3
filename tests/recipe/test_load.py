"""The recipe: what is refused, with which words, and what a resolved recipe says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from merit.errors import RecipeError
from merit.recipe.load import dump_recipe, load_recipe, parse_recipe, recipe_schema
from merit.recipe.schema import Recipe

MINIMAL = {"name": "x", "model": {"base": "b"}, "mixture": {"folder": "f"}}


def refused(*overrides: str, **blocks: object) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**MINIMAL, **blocks}, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rte=1", ["train.learning_rte", "'learning_rate'"]),
        ("modle.base=b", ["modle", "'model'"]),
        ("split.method=pcaa", ["split.method", "'pca'"]),
        ("mixture.datasets=[{name: a, pth: x}]", ["mixture.datasets.0.pth", "'path'"]),
        ("conflict.unrepresentable=1", ["conflict.unrepresentable"]),
        ("mixture.datasets=[{name: é, path: x}]", ["mixture.datasets.0.name", "A-Z, a-z, 0-9 and . _ + -"]),
        ("train.epochs=-1", ["train.epochs", "greater than 0", "-1"]),
        ("train.epochs=many", ["train.epochs", "number", '"many"']),
        ("train.batch_size=0", ["train.batch_size"]),
        ("conflict.examples=some", ["conflict.examples", "auto"]),
        ("conflict.sketch_size=1000", ["sketch_size", "power of two", "1000"]),
        ("mixture.path=x.json", ["exactly one"]),
        ("mixture.test=x.json", ["test goes with path"]),
        ("mixture.folder=null", ["exactly one", "none"]),
        ("train.micro_batch_size=5", ["multiple", "5"]),
        ("baselines=[pca]", ["pca"]),
        ("baselines=[random, random]", ["repeats"]),
        ("name=../up", ["name"]),
        ("seed=-1", ["seed"]),
    ],
)
def test_wrong_values_are_named(override: str, words: list[str]) -> None:
    message = refused(override)
    for word in words:
        assert word in message


def test_dataset_names_must_differ() -> None:
    twice = {"datasets": [{"name": "a", "path": "a.jsonl"}, {"name": "a", "path": "b.jsonl"}]}
    assert "'a'" in refused(mixture=twice)


def test_every_problem_is_listed_at_once() -> None:
    message = refused("train.epochs=-1", "train.batch_size=0")
    assert "train.epochs" in message
    assert "train.batch_size" in message


@pytest.mark.parametrize("override", ["train.epochs", "=3", "a..b=1", "name.x=1"])
def test_malformed_overrides(override: str) -> None:
    assert "--set" in refused(override)


def test_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: x\nmodel: {base: b}\nmixture: {folder: f}\ntrain: {learning_rate: 1e-5}\n")
    assert load_recipe(file).train.learning_rate == 1e-5
    assert load_recipe(file, ["train.learning_rate=2e-5"]).train.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\nname: y\n", ["duplicate key 'name'", "line 2"]),
        ("name: [x\n", ["not valid YAML", "line"]),
        ("- a\n- b\n", ["mapping"]),
        ("", ["empty"]),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    for word in words:
        assert word in str(caught.value)


def test_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="merit init"):
        load_recipe(tmp_path / "none.yaml")


def test_relative_paths_start_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "data").mkdir(parents=True)
    (tmp_path / "there" / "base").mkdir(parents=True)
    file = tmp_path / "here" / "r.yaml"
    file.write_text("name: x\nmodel: {base: base}\nmixture: {folder: data}\n")
    monkeypatch.chdir(tmp_path / "there")
    recipe = load_recipe(file)
    assert recipe.mixture.folder == str(tmp_path / "here" / "data")
    assert recipe.model.base == str(tmp_path / "there" / "base"), "then the working directory"


def test_a_hub_id_stays_one() -> None:
    assert parse_recipe(MINIMAL, ["model.base=Qwen/Qwen2.5-3B"]).model.base == "Qwen/Qwen2.5-3B"


@given(
    st.floats(1e-9, 9, allow_nan=False),
    st.integers(1, 6),
    st.sampled_from(["pca", "random", "joint"]),
    st.lists(st.text(min_size=1, max_size=8), max_size=3),
)
def test_the_resolved_recipe_reads_back_the_same(rate: float, axes: int, method: str, include: list[str]) -> None:
    recipe = parse_recipe(
        {
            **MINIMAL,
            "mixture": {"folder": "/f", "include": include},
            "train": {"learning_rate": rate},
            "split": {"axes": axes, "method": method},
        }
    )
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)))
    assert again == recipe
    assert recipe.group_count == (1 if method == "joint" else 2**axes)


def test_every_field_is_documented() -> None:
    def walk(block: dict, where: str) -> None:
        for name, field in block.get("properties", {}).items():
            blocks = "$ref" in field or "allOf" in field
            assert blocks or field.get("description"), f"{where}.{name} has no description"

    schema = recipe_schema()
    walk(schema, "recipe")
    for name, block in schema["$defs"].items():
        walk(block, name)
    json.dumps(schema)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load(path: Path) -> None:
    assert isinstance(load_recipe(path), Recipe)


def test_the_starter_recipe_loads(tmp_path: Path) -> None:
    from importlib import resources

    file = tmp_path / "recipe.yaml"
    file.write_text(resources.files("merit").joinpath("starter_recipe.yaml").read_text())
    assert load_recipe(file).split.method == "pca"


def test_start_up_imports_no_ml_library() -> None:
    code = (
        "import sys, merit, merit.cli, merit.recipe.load, merit.run.status, merit.report.status, merit.report.merge\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'peft', 'numba', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "text",
    ["? [a, b]\n: 1\n", "d: 2020-13-45\n", "a: &a [*a]\n", "a: " + "[" * 3000, "name: {? [x] : 1}\n"],
    ids=["list as key", "no such date", "circle", "deep", "list as key inside"],
)
def test_odd_yaml_is_refused_in_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "odd.yaml")
    assert "\n" not in caught.value.message


def test_yaml_merge_keys_work(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: {base: b}\nmixture:\n  datasets:\n    - &d {name: a, path: x.jsonl, samples: 5}\n"
        "    - {<<: *d, name: c}\n"
    )
    datasets = load_recipe(tmp_path / "r.yaml").mixture.datasets
    assert datasets is not None
    assert [(item.name, item.samples) for item in datasets] == [("a", 5), ("c", 5)]


def bomb(levels: int, merge: bool) -> str:
    lines = ["a0: &a0 {k0: 1}" if merge else "a0: &a0 [1, 1]"]
    for i in range(1, levels):
        last = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i}\n  <<: [{last}]\n  k{i}: 1" if merge else f"a{i}: &a{i} [{last}]")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("text", [bomb(9, False), bomb(9, True), bomb(40, False), "a: &a [*a]\n", "a: &a {b: *a}\n"])
def test_a_few_lines_of_aliases_that_stand_for_billions_are_refused_at_once(tmp_path: Path, text: str) -> None:
    """On commit f5727a1 the larger ones take minutes and end in MemoryError."""
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match="anchors"):
        load_recipe(file)


def test_anchors_of_an_ordinary_size_are_followed(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    rows = "\n".join(f"    - {{<<: *common, name: d{i}, path: d{i}.jsonl}}" for i in range(500))
    file.write_text(
        "name: x\nmodel: {base: b/c}\nmixture:\n  datasets:\n"
        "    - &common {name: d, path: d.jsonl, samples: 9}\n" + rows + "\n"
    )
    datasets = load_recipe(file).mixture.datasets or []
    assert len(datasets) == 501
    assert {item.samples for item in datasets} == {9}


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "/" + "y" * 5000, "~nobody-of-that-name/x"])
def test_a_path_that_cannot_be_one_is_refused(tmp_path: Path, path: str) -> None:
    """On commit f5727a1 a traceback."""
    with pytest.raises(RecipeError, match="cannot be one"):
        parse_recipe({**MINIMAL, "mixture": {"folder": path}}, folder=tmp_path)
