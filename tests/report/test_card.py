"""A published model: what a hub receives is what lies here, with a card that says where it comes from and no local path."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from merit.errors import RecipeError, ResourceError
from merit.hf.publish import Licence, dataset_licences, model_files, publish, require_repo_id
from merit.recipe.schema import Recipe
from merit.report.card import eval_results, published_card, sources
from report.hub_stand_in import HubStandIn
from report.page_cases import make_run

NAMES = ["ag_news", "gsm8k", "mine", "tasks.one"]
EXISTING = "---\nlicense: apache-2.0\nbase_model: org/base\ntags:\n- merge\n---\n\n# merged/model\n\nMerged by MERIT.\n"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the stand-in takes plain uploads
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    found = HubStandIn()
    found.cards["openai/gsm8k"] = {"license": "mit"}
    found.cards["fancyzhx/ag_news"] = {
        "license": "other",
        "license_name": "custom",
        "license_link": "https://x.y/terms",
    }
    yield found
    found.close()


@pytest.fixture
def data(tmp_path):
    run = make_run(tmp_path, NAMES)
    datasets = [
        {"name": "ag_news", "path": "fancyzhx/ag_news"},
        {"name": "gsm8k", "path": "openai/gsm8k", "subset": "main"},
        {"name": "mine", "path": "data/mine.jsonl"},
        {"name": "tasks", "path": "org/tasks", "split_by": "task"},
    ]
    recipe = {"name": "case", "model": {"base": "org/base"}, "mixture": {"datasets": datasets}}
    return replace(run, recipe=Recipe.model_validate(recipe))


def front(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def test_lineage_datasets_and_figures(data):
    licences = {"openai/gsm8k": Licence("mit"), "fancyzhx/ag_news": Licence("custom", "https://x.y/terms")}
    card = published_card(EXISTING, "me/model", data, licences)
    found = front(card)
    assert found["license"] == "apache-2.0"
    assert found["base_model"] == "org/base"
    assert found["datasets"] == ["fancyzhx/ag_news", "openai/gsm8k", "org/tasks"]
    assert card.count("\n# ") == 1
    assert "[custom](https://x.y/terms)" in card
    assert "| mine | files of the author | ask the author |" in card
    assert "| tasks.one | [org/tasks]" in card
    results = found["model-index"][0]["results"]
    figures = data.evaluation.results["merged"]
    by_name = {item["dataset"]["name"]: item for item in results}
    assert set(by_name) == {*NAMES, "average of 4 datasets"}
    for name in NAMES:
        loss = next(m["value"] for m in by_name[name]["metrics"] if m["type"] == "loss")
        assert loss == pytest.approx(figures[name].loss, abs=1e-6)
    assert by_name["gsm8k"]["dataset"]["type"] == "openai/gsm8k"
    assert by_name["mine"]["dataset"]["type"] == "local"


def test_eval_results_are_those_on_datasets_of_the_hub(data):
    entries = yaml.safe_load(eval_results(data))
    figures = data.evaluation.results["merged"]
    found = {item["dataset"]["id"]: item for item in entries}
    assert set(found) == {"fancyzhx/ag_news", "openai/gsm8k", "org/tasks"}
    assert found["openai/gsm8k"]["value"] == pytest.approx(100 * figures["gsm8k"].exact_match, abs=0.01)
    assert found["openai/gsm8k"]["dataset"]["task_id"] == "main"
    assert eval_results(replace(data, evaluation=None)) is None


def test_a_card_without_evaluation_and_front_matter(data):
    card = published_card("text\n", "me/model", replace(data, evaluation=None), {})
    assert "model-index" not in front(card)
    assert card.rstrip().splitlines()[-1].startswith("|")


def test_sources_of_local_files_are_not_taken_for_ids(data):
    assert [item.hub_id for item in sources(data.recipe, NAMES)] == [
        "fancyzhx/ag_news", "openai/gsm8k", None, "org/tasks",
    ]  # fmt: skip


def test_what_the_hub_receives_is_what_lies_here(hub, tmp_path):
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / ".cache").mkdir()
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    (model / "config.json").write_text("{}")
    (model / "sub" / "a.txt").write_text("a")
    (model / ".lock").write_text("")
    (model / ".cache" / "x").write_text("x")
    files: dict[str, Path | bytes] = dict(model_files(model))
    assert set(files) == {"model.safetensors", "config.json", "sub/a.txt"}
    files["README.md"] = b"---\nlicense: mit\n---\n# x\n"
    address = publish("org/model", files, "Merged", private=True, endpoint=hub.address)
    assert address == f"{hub.address}/org/model"
    received = hub.files["org/model"]
    assert received == {n: c if isinstance(c, bytes) else c.read_bytes() for n, c in files.items()}
    assert hub.private == {"org/model": True}
    assert hub.messages == ["Merged"]


def test_a_refusal_is_one_message(hub, tmp_path):
    hub.refuse = 403
    with pytest.raises(ResourceError, match="org/model could not be uploaded") as caught:
        publish("org/model", {"README.md": b"# x\n"}, "m", private=False, endpoint=hub.address)
    assert "hf auth login" in str(caught.value)
    assert hub.files == {}


def test_an_unreachable_hub_is_one_message(hub):
    hub.close()
    with pytest.raises(ResourceError, match="could not be uploaded"):
        publish("org/model", {"README.md": b"# x\n"}, "m", private=False, endpoint=hub.address)


def test_licences_are_asked_and_unknown_ones_stay_unknown(hub):
    found = dataset_licences(["openai/gsm8k", "fancyzhx/ag_news", "org/none"], endpoint=hub.address)
    assert found == {
        "openai/gsm8k": Licence("mit"),
        "fancyzhx/ag_news": Licence("custom", "https://x.y/terms"),
        "org/none": Licence(None),
    }


@pytest.mark.parametrize("repo", ["model", "a/b/c", "me/mo del", "/x", "../x", "me/--x"])
def test_a_wrong_repository_is_refused_before_anything_is_read(repo):
    with pytest.raises(RecipeError, match="--to"):
        require_repo_id(repo)
