"""Hub ids are asked for over real HTTP, of a server on this machine; all that is wrong comes in one message."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from merit.errors import RecipeError
from merit.hf.hub import hub_ids, resolve_ids
from merit.recipe.load import load_recipe, parse_recipe
from merit.recipe.schema import Recipe

PAPER = sorted((Path(__file__).parents[2] / "recipes" / "paper").glob("*.yaml"))
KNOWN = {
    "/api/models/some/model": {"id": "some/model"},
    "/api/datasets/some/data": {
        "id": "some/data",
        "cardData": {"configs": [{"config_name": "a"}, {"config_name": "b"}]},
    },
    "/api/datasets/shy/data": {"id": "shy/data", "gated": "auto"},
}


class Hub(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        Hub.asked.append(path)
        body = json.dumps(KNOWN.get(path, {"error": "Repository not found"})).encode()
        self.send_response(200 if path in KNOWN else 404)
        if path not in KNOWN:
            self.send_header("X-Error-Code", "RevisionNotFound" if "/revision/" in path else "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    Hub.asked.clear()
    yield constants.ENDPOINT
    server.shutdown()
    server.server_close()
    thread.join()


def recipe(base: str, *datasets: dict[str, Any], **model: Any) -> Recipe:
    listed = [{"name": f"d{place}", **item} for place, item in enumerate(datasets)]
    return parse_recipe({"name": "x", "model": {"base": base, **model}, "mixture": {"datasets": listed}})


def test_ids_that_exist_pass_and_are_asked_once(hub: str) -> None:
    data = {"path": "some/data"}
    assert resolve_ids(recipe("some/model", {**data, "subset": "a"}, {**data, "subset": "b"})) == []
    assert Hub.asked == ["/api/models/some/model", "/api/datasets/some/data"]


def test_everything_wrong_is_in_one_message(hub: str) -> None:
    wrong = recipe("no/model", {"path": "some/data", "subset": "c"}, {"path": "no/data"}, {"path": "some/data"})
    with pytest.raises(RecipeError) as caught:
        resolve_ids(wrong)
    for words in ("3 hub ids", "model.base: the hub has no model no/model", "mixture: d0: some/data has no subset 'c'",
                  "mixture: d1: the hub has no dataset no/data", "Nothing was downloaded"):  # fmt: skip
        assert words in str(caught.value)


def test_a_revision_that_is_not_there(hub: str) -> None:
    with pytest.raises(RecipeError, match="no revision 'v9'"):
        resolve_ids(recipe("some/model", {"path": "some/data"}, revision="v9"))


def test_consent_is_told(hub: str) -> None:
    assert "shy/data is gated" in resolve_ids(recipe("some/model", {"path": "shy/data"}))[0]


def test_a_hub_out_of_reach_refuses_nothing(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    notes = resolve_ids(recipe("some/model", {"path": "some/data"}))
    assert "could not be reached" in notes[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "switched off" in resolve_ids(recipe("some/model", {"path": "some/data"}))[0]


def test_paths_are_no_ids(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    found = hub_ids(recipe(str(tmp_path / "base"), {"path": str(tmp_path / "data")}, {"path": "rows.jsonl"}))
    assert found == []


def test_the_papers_recipes_name_these_ids() -> None:
    found = {item.id for path in PAPER for item in hub_ids(load_recipe(path))}
    assert found == {
        "HuggingFaceM4/the_cauldron",
        "Qwen/Qwen2.5-3B",
        "Qwen/Qwen2.5-7B-Instruct",
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "lmms-lab/LLaVA-NeXT-Data",
        "lmms-lab/LLaVA-OneVision-Data",
        "lmms-lab/LLaVA-ReCap-118K",
        "lmms-lab/LLaVA-ReCap-558K",
        "lmms-lab/LLaVA-ReCap-CC3M",
    }
