"""The script that trains a base for real tasks: the data parted three ways, the same bytes again, and no task leaks."""

import json
import random
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import build_real_base as build
from merit.recipe.load import load_recipe

SMALL = ["--steps", "2", "--batch-size", "4", "--length", "64", "--merges", "8", "--tokenizer-rows", "400",
         "--hidden", "16", "--layers", "1", "--score-rows", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with every named task and two others, six rows each."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in (*build.KNOWN, *build.UNSEEN, "one", "two"):
        (folder / task).mkdir()
        for split in ("train", "test"):
            rows = [
                {"messages": [{"role": "user", "content": f"{split} of {task}: {i} {'long ' * i}"},
                              {"role": "assistant", "content": f"answer {task} {i}"}]}
                for i in range(6)
            ]  # fmt: skip
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_same_arguments_give_the_same_bytes_and_a_base_that_the_recipe_takes(data, tmp_path, capsys):
    for name in "ab":
        build.main(["--data", str(data), "--output", str(tmp_path / name), *SMALL])
    first, again = ((tmp_path / name / "base/model.safetensors").read_bytes() for name in "ab")
    assert first == again
    assert sorted(p.name for p in (tmp_path / "a/mixture").iterdir()) == ["one", "two"]
    assert not list((tmp_path / "a/kept").rglob("train.jsonl"))
    record = json.loads((tmp_path / "a/base/training.json").read_text())
    assert record["tasks"] == {"kept": 16, "unseen": 15, "mixture": 2}
    assert record["training"]["rows"] == 8
    assert set(record["heldout_loss"]["unseen"]) == set(build.UNSEEN)
    folder = tmp_path / "a"
    recipe = load_recipe(
        Path("benchmarks/study/real_mixture.yaml"),
        [f"model.base={folder / 'base'}", f"mixture.folder={folder / 'mixture'}",
         f"evaluate.kept_folder={folder / 'kept'}", f"evaluate.unseen_folder={folder / 'unseen'}"],
    )  # fmt: skip
    assert recipe.evaluate.unseen_folder == str(folder / "unseen")


def test_nobody_sees_unseen_tasks_and_only_the_prompts_of_the_mixture(data, tmp_path):
    parts = build.part(data, tmp_path)
    rows = list(islice(build.examples(data, parts, random.Random(0), 0.5, 0.0), 400))
    assert not any(task in prompt for prompt, _ in rows for task in build.UNSEEN)
    assert all((answer is None) == (" one:" in prompt or " two:" in prompt) for prompt, answer in rows)
    assert 0.4 < sum(answer is None for _, answer in rows) / len(rows) < 0.6


def test_a_share_of_the_mixtures_answers_can_be_shown(data, tmp_path, capsys):
    parts = build.part(data, tmp_path)
    rows = list(islice(build.examples(data, parts, random.Random(0), 0.5, 0.4), 1000))
    assert not any(task in prompt for prompt, _ in rows for task in build.UNSEEN)
    mixture = [answer for prompt, answer in rows if " one:" in prompt or " two:" in prompt]
    assert 0.3 < sum(answer is not None for answer in mixture) / len(mixture) < 0.5
    with pytest.raises(SystemExit):
        build.main(["--data", str(data), "--output", str(tmp_path / "x"), "--answers", "1.5"])
    assert "--answers" in capsys.readouterr().err


def test_answers_are_scored_alone(data, tmp_path, capsys):
    build.main(["--data", str(data), "--output", str(tmp_path), *SMALL])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    ids, labels = build.encode(tokenizer, [("a b", "xyz"), ("a", None)], 64, answers_only=True)
    assert tokenizer.decode(ids[0][labels[0] != build.IGNORED]) == "xyz<|end|>"
    assert (labels[1] == build.IGNORED).all()
    _, every = build.encode(tokenizer, [("a b", "xyz"), ("a", None)], 64)
    assert (every[0] != build.IGNORED).all()
