"""lm-eval really runs on a tiny model with local tasks, offline; its scores are those computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import builders
from tests.builders import Case

from merit.errors import RecipeError
from merit.evaluation.harness import check_harness, evaluate_suites, harness_facts
from merit.recipe.suites import HarnessSettings

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def loaded(base: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)


CHOICES = [
    {"question": f"pick {word}: ", "choices": ["abc", "xyz", word], "answer": number % 3}
    for number, word in enumerate(["cat", "dog", "emu", "fox", "gnu", "hen"])
]


@pytest.mark.slow
def test_choices_are_scored_by_their_likelihood(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    file = write(tmp_path / "pick.jsonl", CHOICES)
    found = evaluate_suites(model, tokenizer, [str(file)], HarnessSettings(batch_size=4), tmp_path / "tasks")

    def likelihood(prompt: str, choice: str) -> float:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + choice)["input_ids"]])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].log_softmax(-1)
        return float(scores[torch.arange(len(scores)), ids[0, 1:]][start - 1 :].sum())

    right = [
        max(range(3), key=lambda i: likelihood(row["question"], row["choices"][i])) == row["answer"] for row in CHOICES
    ]
    assert found["pick"]["acc"] == pytest.approx(sum(right) / len(right))


@pytest.mark.slow
def test_generated_answers_are_matched_exactly(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    prompts = ["say a", "say b", "say c"]

    def greedy(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=64, do_sample=False)
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).split("\n")[0].strip()

    rows = [{"question": prompt, "answer": greedy(prompt) if prompt != "say b" else "no"} for prompt in prompts]
    file = write(tmp_path / "say.jsonl", rows)
    found = evaluate_suites(model, tokenizer, [str(file)], HarnessSettings(batch_size=1), tmp_path / "tasks")
    assert found["say"]["exact_match/strip"] == pytest.approx(2 / 3)


def test_offline_a_task_without_its_dataset_is_refused_before_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(RecipeError) as raised:
        check_harness(["paper_text"], HarnessSettings())
    for part in (
        "gpqa_main_zeroshot needs Idavidrein/gpqa, a gated",
        "humaneval runs code",
        "Rowan/hellaswag, which is not",
    ):
        assert part in str(raised.value)
    check_harness([str(tmp_path / "own.jsonl")], HarnessSettings())


def test_facts_name_versions_and_batch_size() -> None:
    facts = harness_facts(HarnessSettings(batch_size=3, limit=5))
    assert facts.versions["lm_eval"].startswith("0.4")
    assert (facts.batch_size, facts.limit, facts.judge) == (3, 5, None)


@pytest.mark.slow
def test_a_run_scores_all_its_models_and_shows_them(tmp_path: Path, base: Path) -> None:
    tasks = {"upper": 0, "first": 0, "length": 0, "double": 0}
    case: Case = builders.make_case(
        tmp_path,
        base,
        mixture={"folder": "mixture", "include": list(tasks), "samples": 8},
        conflict={"examples": 4, "sketch_size": 256},
        evaluate={"heldout": False, "drift": {"prompts": 0}, "suites": ["pick.jsonl"], "harness": {"limit": 3}},
    )
    write(tmp_path / "pick.jsonl", CHOICES)
    result = builders.call("run", case.recipe, "--output", case.run, "--json", "--quiet")
    assert result.code == 0, result.err
    scores = json.loads(result.out)["suites"]
    assert set(scores) == {"base", "merged"}
    assert set(scores["merged"]["scores"]["pick"]) == {"acc"}
    assert scores["merged"]["facts"]["batch_size"] == 8
    before = builders.snapshot(case.run / "suites")
    again = builders.call("evaluate", case.run, "--quiet")
    assert again.code == 0, again.err
    assert "Benchmark suites" in again.out
    assert builders.snapshot(case.run / "suites") == before
    write(tmp_path / "pick.jsonl", CHOICES[:2])  # other rows: measured again
    assert builders.call("evaluate", case.run, "--quiet").code == 0
    assert builders.snapshot(case.run / "suites") != before
