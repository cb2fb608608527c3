"""A whole preparation on tiny real checkpoints: assemble, three stages on generated pictures, and the run that follows."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.builders import ended, start, until
from tests.builders import make_vision_base as make_base
from tests.e2e.conftest import Result, make_case, write_rows
from tests.hf.vision_cases import COLOURS, picture
from tests.prepare.test_assemble import llama_tokenizer, make_encoder, make_language_model, tensors

from merit.hf import checkpoint
from merit.hf.families import FAMILIES

ROLE = FAMILIES["qwen2_5_vl"].role
STAGES = ("align", "knowledge", "instruct")


def pictures(folder: Path, count: int, seed: int) -> list[tuple[str, str, str]]:
    """(file name, colour, size in words) of pictures written into ``folder``."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number in range(count):
        colour, size = rng.choice(list(COLOURS)), rng.choice([(16, 16), (24, 16)])
        picture(colour, size, rng.randrange(4)).save(folder / f"{number}.png")
        found.append((f"{number}.png", colour, f"{size[0]} wide"))
    return found


def write_data(folder: Path) -> None:
    """Captions in LLaVA's form for the stages, a small mixture in message form for the run."""
    for place, stage in enumerate(STAGES):
        shown = pictures(folder / stage / "images", 20, seed=place)
        answer = {"align": "{0}", "knowledge": "It is {0} and {1}.", "instruct": "{1}"}[stage]
        rows = [
            {
                "image": name,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{stage}?"},
                    {"from": "gpt", "value": answer.format(colour, size)},
                ],
            }
            for name, colour, size in shown
        ]
        (folder / stage / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    for place, task in enumerate(("colour", "width")):
        shown = pictures(folder / "mixture" / task, 18, seed=10 + place)
        rows = [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{task}?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": colour if task == "colour" else size}]},
                ],
                "images": [name],
            }
            for name, colour, size in shown
        ]
        write_rows(folder / "mixture" / task / "train.jsonl", rows[:12])
        write_rows(folder / "mixture" / task / "test.jsonl", rows[12:])


def settings(root: Path) -> dict[str, Any]:
    def stage(name: str, trainable: Any, **train: Any) -> dict[str, Any]:
        data = {"name": f"{name}-data", "path": f"{name}/rows.json", "images": f"{name}/images"}
        return {"name": name, "mixture": {"datasets": [data]}, "trainable": trainable, "train": train}

    return {
        "name": "tiny",
        "model": {"base": str(root / "lm"), "dtype": "float32"},
        "prepare": {
            "assemble": {"vision_from": str(root / "vlm"), "projector": "new"},
            "stages": [
                stage("align", "projector", learning_rate=5e-2, epochs=2),
                stage("knowledge", ["projector", "language"]),
                stage("instruct", "language", learning_rate=1e-2, batch_size=5),
            ],
        },
        "mixture": {"folder": "mixture"},
        "conflict": {"examples": 8, "sketch_size": 1024},
        "split": {"axes": 1},
        "train": {"learning_rate": 5e-3, "batch_size": 4, "max_length": 128, "threads": 1, "checkpoint_minutes": 1e-6},
        "evaluate": {"max_examples": 4, "max_new_tokens": 4, "drift": {"prompts": 2, "tokens": 4}},
    }


def write_recipe(folder: Path, values: dict[str, Any]) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return file


def change(root: Path, place: int, **train: Any) -> dict[str, Any]:
    """The recipe with other hyperparameters in one stage."""
    values = settings(root)
    values["prepare"]["stages"][place]["train"] |= train
    return values


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preparation")
    make_base("qwen2_5_vl", folder / "vlm", dtype="bfloat16")
    make_language_model(folder / "lm", hidden_size=48, num_attention_heads=2, dtype="float32")
    write_data(folder)
    write_recipe(folder, settings(folder))
    return folder


@pytest.fixture(scope="module")
def prepared(root: Path, merit: Callable[..., Result]) -> Path:
    """A finished preparation; read-only for the tests that share it."""
    run = root / "run"
    result = merit("prepare", root / "recipe.yaml", "--output", run, "--quiet")
    assert result.code == 0, result.err
    return run


def stage_model(run: Path, name: str) -> Path:
    inner = run / "preparation" / name
    return inner / "model" if name == "assemble" else inner / "branches" / "0" / "model"


def changed_roles(before: Path, after: Path) -> set[str]:
    old, new = tensors(before), tensors(after)
    assert set(old) == set(new)
    assert all(old[name].dtype == new[name].dtype for name in old)
    return {ROLE(name) for name in old if not np.array_equal(old[name], new[name])}


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def test_every_stage_changes_what_it_trains_and_nothing_else(root: Path, prepared: Path) -> None:
    assembled = tensors(stage_model(prepared, "assemble"))
    for folder, role in ((root / "vlm", "vision"), (root / "lm", "language")):
        for name, value in tensors(folder).items():
            if ROLE(name) == role:
                assert np.array_equal(assembled[name], value), name
    models = [stage_model(prepared, name) for name in ("assemble", *STAGES)]
    assert changed_roles(models[0], models[1]) == {"projector"}
    old, new = tensors(models[0]), tensors(models[1])
    moved = [name for name in old if ROLE(name) == "projector" and not np.array_equal(old[name], new[name])]
    assert len(moved) == 5, "norm, two weights, two biases"
    assert changed_roles(models[1], models[2]) == {"projector", "language"}
    assert changed_roles(models[2], models[3]) == {"language"}


def test_the_prepared_base_is_the_last_stages_model_and_an_ordinary_checkpoint(prepared: Path) -> None:
    from merit.hf.base import open_base
    from merit.recipe.schema import ModelSettings

    base = prepared / "prepared" / "base"
    last = stage_model(prepared, "instruct")
    assert {file.name for file in base.iterdir()} == {file.name for file in last.iterdir() if file.is_file()}
    assert changed_roles(last, base) == set()
    assert record(prepared / "prepared")["model_fingerprint"] == checkpoint.fingerprint(base)
    info = open_base(ModelSettings(base=str(base)))
    assert info.family is FAMILIES["qwen2_5_vl"]
    assert open_base(ModelSettings(base=str(base))).images.token == "<|image_pad|>"


def test_records_and_status(prepared: Path, merit: Callable[..., Result]) -> None:
    facts = record(prepared / "preparation" / "assemble")
    assert facts["projector"] == "new"
    assert set(facts["inputs"]) == {"language model", "vision_from"}
    rows = {row["stage"]: row for row in json.loads(merit("status", prepared, "--json").out)["stages"]}
    names = ["prepare assemble"]
    names += [name for stage in STAGES for name in (f"prepare {stage} mixture", f"prepare {stage}")] + ["prepare"]
    assert [name for name in rows if name.startswith("prepare")] == names
    assert {rows[name]["state"] for name in names} == {"done"}
    assert rows["mixture"]["state"] == "missing"
    assert record(prepared / "preparation" / "instruct" / "branches" / "0")["steps"] == 4, "20 rows, batches of 5"


def test_done_stages_are_not_done_again(root: Path, prepared: Path, merit: Callable[..., Result]) -> None:
    files = sorted(prepared.rglob("record.json"))
    before = [file.stat().st_mtime_ns for file in files]
    result = merit("prepare", root / "recipe.yaml", "--output", prepared, "--json", "--quiet")
    assert result.code == 0, result.err
    assert json.loads(result.out)["base"] == str(prepared / "prepared" / "base")
    assert [file.stat().st_mtime_ns for file in files] == before


def test_a_changed_stage_is_refused_by_field_and_redone_alone(
    root: Path, prepared: Path, tmp_path: Path, merit: Callable[..., Result]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared, run)
    other = write_recipe(tmp_path, absolute(change(root, 2, learning_rate=2e-2), root))
    for command in ("prepare", "run"):
        result = merit(command, other, "--output", run, "--quiet")
        assert result.code == 2
        for word in ("instruct", "train.learning_rate: 0.01 -> 0.02", "--redo", "Nothing was changed"):
            assert word in result.err, result.err
    untouched = record(run / "preparation" / "knowledge" / "branches" / "0")
    result = merit("prepare", other, "--output", run, "--redo", "--quiet")
    assert result.code == 0, result.err
    assert record(run / "preparation" / "knowledge" / "branches" / "0") == untouched
    assert changed_roles(prepared / "prepared" / "base", run / "prepared" / "base") == {"language"}
    assert record(run / "prepared")["model_fingerprint"] == checkpoint.fingerprint(run / "prepared" / "base")


def absolute(values: dict[str, Any], root: Path) -> dict[str, Any]:
    """The recipe as it reads from another folder."""
    for stage in values["prepare"]["stages"]:
        for dataset in stage["mixture"]["datasets"]:
            dataset |= {key: str(root / dataset[key]) for key in ("path", "images")}
    values["mixture"]["folder"] = str(root / "mixture")
    return values


def test_the_run_starts_every_branch_from_the_prepared_base(
    root: Path, prepared: Path, tmp_path: Path, merit: Callable[..., Result]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared, run)
    shutil.rmtree(run / "preparation")  # a finished preparation's stages may be removed
    early = merit("split", root / "recipe.yaml", "--output", tmp_path / "early", "--quiet")
    assert early.code == 2
    assert "merit prepare" in early.err
    values = absolute(settings(root), root)
    for stage in values["prepare"]["stages"]:  # and so may the data that they were trained on
        stage["mixture"]["datasets"][0] |= {"path": str(tmp_path / "gone.json"), "images": str(tmp_path / "gone")}
    result = merit("run", write_recipe(tmp_path, values), "--output", run, "--quiet")
    assert result.code == 0, result.err
    base = checkpoint.fingerprint(prepared / "prepared" / "base")
    for k in (0, 1):
        assert record(run / "branches" / str(k))["inputs"]["base"] == base
        assert changed_roles(run / "prepared" / "base", run / "branches" / str(k) / "model") == {"language"}
    assert changed_roles(run / "prepared" / "base", run / "merged" / "model") == {"language"}
    again = yaml.safe_load((run / "recipe.yaml").read_text())
    assert again["model"]["base"] == str(root / "lm"), "the recipe is kept as it was given"
    assert merit("train", run, "--branch", 0, "--quiet").code == 0


def test_another_base_makes_everything_after_it_anew(
    root: Path, prepared: Path, tmp_path: Path, merit: Callable[..., Result]
) -> None:
    run, words = tmp_path / "run", ("--until", "gradients", "--quiet", "--output")
    shutil.copytree(prepared, run)
    assert merit("run", root / "recipe.yaml", *words, run).code == 0
    other = write_recipe(tmp_path, absolute(change(root, 2, learning_rate=2e-2), root))
    result = merit("run", other, *words, run, "--redo")
    assert result.code == 0, result.err
    new = checkpoint.fingerprint(run / "prepared" / "base")
    assert new != checkpoint.fingerprint(prepared / "prepared" / "base")
    assert record(run / "conflict")["inputs"]["base"] == new


def test_killed_and_stopped_preparations_end_in_the_same_bits(root: Path, prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for stage, sent, code in (("align", signal.SIGKILL, -9), ("instruct", signal.SIGTERM, 75), ("", None, 0)):
        process = start("prepare", root / "recipe.yaml", "--output", run, log=tmp_path / "log", linger=stage)
        if sent is not None:
            assert until(process, run, f"preparation/{stage}/branches/0/checkpoints/*/complete.json")
        ended(process, tmp_path / "log", sent, code)
        assert (run / "prepared" / "record.json").exists() == (sent is None)
    assert record(run / "preparation" / "align" / "branches" / "0")["resumed_from"]
    for name in ("assemble", *STAGES):
        assert changed_roles(stage_model(prepared, name), stage_model(run, name)) == set(), name
    assert changed_roles(prepared / "prepared" / "base", run / "prepared" / "base") == set()


def test_what_is_wrong_is_told_before_anything_is_made(
    root: Path, tmp_path: Path, merit: Callable[..., Result]
) -> None:
    def refused(values: dict[str, Any], *words: str) -> None:
        file = write_recipe(tmp_path, values)
        for command in ("prepare", "check"):
            result = merit(command, file, "--output", tmp_path / "run", "--quiet")
            assert result.code == 2, (command, result.out)
            for word in words:
                assert word in result.err, result.err
            assert not (tmp_path / "run").exists()

    values = absolute(settings(root), root)
    values["prepare"]["stages"][1]["mixture"]["datasets"][0]["path"] = str(root / "nowhere.json")
    refused(values, "prepare.stages: knowledge", "nowhere.json")
    values = absolute(settings(root), root)
    values["prepare"]["stages"][0]["trainable"] = ["model.visual.nothing.*"]
    refused(values, "prepare.stages: align", "model.visual.nothing.*")
    values = absolute(settings(root), root)
    values["prepare"]["stages"][0]["train"]["max_length"] = 4096
    refused(values, "prepare.stages: align", "4096", "1024")
    values = absolute(settings(root), root)
    values["prepare"]["assemble"]["projector"] = "copy"
    refused(values, "prepare.assemble.projector", "(32, 128)")
    values = absolute(settings(root), root)
    values["prepare"]["assemble"]["vision_from"] = str(root / "no-such-folder")
    refused(values, "prepare.assemble.vision_from", "no-such-folder")


def test_a_recipe_without_a_preparation_has_none(root: Path, tmp_path: Path, merit: Callable[..., Result]) -> None:
    values = absolute(settings(root), root)
    del values["prepare"]
    result = merit("prepare", write_recipe(tmp_path, values), "--output", tmp_path / "run")
    assert result.code == 2
    assert "no prepare block" in result.err
    assert not (tmp_path / "run" / "prepared").exists()


def test_the_plan_counts_the_preparation(root: Path, prepared: Path, merit: Callable[..., Result]) -> None:
    plan = json.loads(merit("check", root / "recipe.yaml", "--output", root / "unused", "--json").out)
    assert [step["name"] for step in plan["preparation"]] == ["assemble", *STAGES]
    joined = sum(tensor.size for tensor in tensors(prepared / "prepared" / "base").values())
    assert plan["base"]["parameters"] == joined
    language = sum(t.size for name, t in tensors(root / "lm").items())
    assert plan["base"]["trainable"] == language
    shown = merit("check", root / "recipe.yaml", "--output", root / "unused").out
    for word in ("assemble", "align", "knowledge", "instruct"):
        assert word in shown


@pytest.mark.parametrize(
    ("family", "kind"), [pytest.param("llava", "Llama", marks=pytest.mark.exhaustive), ("idefics3", "Qwen2")]
)
def test_other_families_are_prepared_in_the_same_way(
    root: Path, tmp_path: Path, merit: Callable[..., Result], family: str, kind: str
) -> None:
    make_base(family, tmp_path / "vlm")
    make_language_model(tmp_path / "lm", kind, image_tokens=False, hidden_size=48, num_attention_heads=2)
    values = absolute(settings(root), root)
    values["model"]["base"] = str(tmp_path / "lm")
    values["prepare"]["assemble"]["vision_from"] = str(tmp_path / "vlm")
    values["prepare"]["stages"] = values["prepare"]["stages"][:1]
    result = merit("prepare", write_recipe(tmp_path, values), "--output", tmp_path / "run", "--quiet")
    assert result.code == 0, result.err
    before, after = stage_model(tmp_path / "run", "assemble"), tmp_path / "run" / "prepared" / "base"
    old, new = tensors(before), tensors(after)
    moved = {name for name in old if not np.array_equal(old[name], new[name])}
    assert {FAMILIES[family].role(name) for name in moved} == {"projector"}
    assert record(tmp_path / "run" / "preparation" / "assemble")["tokens_added"]


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "kind"), [("CLIP", "Llama"), ("Siglip", "Qwen2")])
def test_a_bare_encoder_and_a_language_model_with_its_own_class_of_tokenizer(
    root: Path, tmp_path: Path, merit: Callable[..., Result], encoder: str, kind: str
) -> None:
    """Folders as they are published: a CLIP or SigLIP with its text tower, and tokenizers that name their class.

    The library may read the joined folder's tokenizer.json by its general class; ids must be the same.
    """
    from transformers import AutoTokenizer

    make_encoder(tmp_path / "encoder", encoder, whole=True)
    tokenizer = llama_tokenizer() if kind == "Llama" else None
    make_language_model(tmp_path / "lm", kind, image_tokens=False, hidden_size=48, tokenizer=tokenizer)
    values = absolute(settings(root), root)
    values["model"]["base"] = str(tmp_path / "lm")
    values["prepare"]["assemble"]["vision_from"] = str(tmp_path / "encoder")
    values["prepare"]["stages"] = values["prepare"]["stages"][:2]
    result = merit("prepare", write_recipe(tmp_path, values), "--output", tmp_path / "run", "--quiet")
    assert result.code == 0, result.err
    assembled, prepared = stage_model(tmp_path / "run", "assemble"), tmp_path / "run" / "prepared" / "base"
    old, new = tensors(assembled), tensors(prepared)
    moved = {name for name in old if not np.array_equal(old[name], new[name])}
    assert {FAMILIES["llava"].role(name) for name in moved} == {"projector", "language"}
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "lm", prepared))
    assert type(before).__name__ == f"{kind}Tokenizer"
    for text in ("Which colour?  It is red.", "naïve 漢字 🙂\n\n\tx=1"):
        assert after(text, add_special_tokens=False)["input_ids"] == before(text, add_special_tokens=False)["input_ids"]
    assert after("<image>", add_special_tokens=False)["input_ids"] == [len(before)]


def test_a_text_base_is_prepared_without_an_assembly(tmp_path: Path, base: Path, merit: Callable[..., Result]) -> None:
    case = make_case(tmp_path, base)
    stages = [
        {"name": "first", "mixture": {"folder": "mixture", "include": ["upper", "first"]}, "trainable": "all"},
        {"name": "second", "mixture": {"folder": "mixture", "include": ["last"]}, "trainable": ["model.layers.1.*"]},
    ]
    case.write(prepare={"stages": stages}, train={**case.settings["train"], "epochs": 0.5})
    checked = merit("check", case.recipe, "--output", case.run, "--json")
    assert checked.code == 0, checked.err
    assert [step["name"] for step in json.loads(checked.out)["preparation"]] == ["first", "second"]
    result = merit("run", case.recipe, "--output", case.run, "--until", "gradients", "--quiet")
    assert result.code == 0, result.err
    first, second = (stage_model(case.run, name) for name in ("first", "second"))
    old, new = tensors(first), tensors(case.run / "prepared" / "base")
    moved = {name for name in old if not np.array_equal(old[name], new[name])}
    assert moved == {name for name in old if name.startswith("model.layers.1.")}
    assert any(not np.array_equal(value, old[name]) for name, value in tensors(base).items())
    assert record(case.run / "conflict")["inputs"]["base"] == checkpoint.fingerprint(second)


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merit: Callable[..., Result]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "preparation.md").read_text(encoding="utf-8").partition("## Try it")[2]
    python, recipe = (text.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("python", "yaml"))
    monkeypatch.chdir(tmp_path)
    exec(python, {})
    Path("ready/recipe.yaml").write_text(recipe)
    words = ["--set", "prepare.stages.align.mixture.samples=8", "--set", "prepare.stages.instruct.mixture.samples=8"]
    result = merit("prepare", "ready/recipe.yaml", *words, "--output", "run", "--quiet")
    assert result.code == 0, result.err
    facts = record(Path("run/preparation/assemble"))
    assert (facts["family"], facts["projector"]) == ("llava", "new")
    kept = Path("ready/words/base/chat_template.jinja").read_text()
    assert Path("run/prepared/base/chat_template.jinja").read_text() == kept
