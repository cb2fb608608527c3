"""What one command opens once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests import builders

from merit.errors import MixtureError, RunFolderError
from merit.recipe.load import parse_recipe
from merit.report.terminal import Terminal
from merit.run.scope import Scope, recipe_of, scopes_of
from merit.run.session import HASHES, Session
from merit.run.store import Stage, claim


def session(tmp_path: Path, **more: object) -> Session:
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True, exist_ok=True)
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    data = {"name": "x", "model": {"base": str(tmp_path)}, "mixture": {"folder": str(tmp_path / "data")}, **more}
    return Session(parse_recipe(data), tmp_path / "run", Terminal(quiet=True))


def test_datasets_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On commit f5727a1 they are found five times per run."""
    from merit.run import session as module

    calls: list[object] = []
    find = module.find_datasets
    monkeypatch.setattr(module, "find_datasets", lambda *words: (calls.append(words), find(*words))[1])
    opened = session(tmp_path)
    assert opened.sources_here
    assert set(opened.sources) == {"a"}
    assert opened.found.check()
    assert len(calls) == 1


def test_missing_sources_are_an_error_until_the_rows_stand(tmp_path: Path) -> None:
    opened = session(tmp_path)
    (tmp_path / "data" / "a" / "train.jsonl").unlink()
    with pytest.raises(MixtureError):
        _ = opened.sources_here


def test_a_base_to_be_prepared_is_asked_for(tmp_path: Path) -> None:
    opened = session(tmp_path, prepare={"assemble": {"vision_from": str(tmp_path)}})
    assert not opened.base_stands
    with pytest.raises(RunFolderError, match="not prepared yet"):
        _ = opened.base


def test_a_prepared_base_that_was_changed_is_named(tmp_path: Path) -> None:
    """Before this test it was taken for another base: "gradients was made with settings other than the current ones"."""
    opened = session(tmp_path, prepare={"assemble": {"vision_from": str(tmp_path)}})
    with Stage("prepared", opened.run / "prepared").writing(seed=0):
        builders.make_base(opened.run / "prepared" / "base", hidden=8)
    assert opened.base.parameters
    file = opened.run / "prepared" / "base" / "generation_config.json"
    file.write_text(file.read_text().replace('"bos_token_id": 1', '"bos_token_id": 2'))
    with pytest.raises(RunFolderError, match=r"generation_config\.json is damaged"):
        _ = opened.reopened().base


@pytest.mark.parametrize("text", ["{", "[]", "[1]", "null", '{"a": 1}'])
def test_damaged_known_hashes_are_made_anew(tmp_path: Path, text: str) -> None:
    opened = session(tmp_path)
    claim(opened.run)
    (opened.run / HASHES).write_text(text)
    with opened.hashes() as known:
        known["new"] = "hash"
    assert json.loads((opened.run / HASHES).read_text())["new"] == "hash"


def test_scopes_are_the_runs_and_its_baselines(tmp_path: Path) -> None:
    recipe = session(tmp_path, baselines=["joint", "random"]).recipe
    scopes = scopes_of(recipe, tmp_path)
    assert scopes == [Scope(tmp_path), Scope(tmp_path, "joint"), Scope(tmp_path, "random")]
    assert [recipe_of(recipe, scope).split.method for scope in scopes] == ["pca", "joint", "random"]
    assert recipe_of(recipe, scopes[1]).baselines == []
