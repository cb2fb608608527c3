"""The card of a merged checkpoint: what people publish."""

from __future__ import annotations

import json

import pytest
import yaml
from merge_cases import make_plan, near, random_tensors, write_checkpoint

from merit.merge import Branch, run_merge


@pytest.fixture
def made(tmp_path):
    def merge(front: str | None, folder: str = "base"):
        start = random_tensors(0)
        base = write_checkpoint(tmp_path / folder, start)
        if front is not None:
            (base / "README.md").write_text(f"---\n{front}---\n# Base\n")
        (base / "NOTICE").write_text("of the base")
        (base / "LICENSE").write_text("terms")
        paths = [write_checkpoint(tmp_path / f"b{k}", near(start, k)) for k in range(2)]
        branches = [Branch(path, k + 1, str(path)) for k, path in enumerate(paths)]
        config = json.loads((paths[0] / "config.json").read_text())
        (paths[0] / "config.json").write_text(json.dumps(config | {"summary_type": f"{tmp_path}/x"}))
        run_merge(make_plan(base, branches, output=tmp_path / "out"))
        text = (tmp_path / "out" / "README.md").read_text()
        return text, yaml.safe_load(text.split("---\n")[1])

    return merge


def test_the_licence_s_name_link_and_notice_are_kept(made, tmp_path):
    """Fails on commit f5727a1: license_name and license_link were lost, and NOTICE was not copied."""
    text, front = made("license: other\nlicense_name: gemma\nlicense_link: https://example.org/terms\n")
    assert front["license"] == "other"
    assert front["license_name"] == "gemma"
    assert front["license_link"] == "https://example.org/terms"
    assert "https://example.org/terms" in text.split("---\n")[2]
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
    assert (tmp_path / "out" / "NOTICE").read_text() == "of the base"


@pytest.mark.parametrize("front", [None, "license: [\n", "- a\n", "license: 3\n"])
def test_an_unknown_licence_is_called_unknown(made, front):
    assert made(front)[1]["license"] == "unknown"


def test_the_card_names_the_base(made):
    """Fails on commit f5727a1: the card had no base_model."""
    _, front = made(None, "hub/models--Org--A-1.5B/snapshots/0a1b")
    assert front["base_model"] == "Org/A-1.5B"
    assert front["base_model_relation"] == "merge"


def test_a_local_base_is_named_by_its_folder(made):
    assert made(None)[1]["base_model"] == "base"


def test_the_card_holds_no_folder_of_this_machine(made, tmp_path):
    """Fails on commit f5727a1: branches outside a run are called by their folders, absolute ones in full."""
    text, _ = made(None)
    assert str(tmp_path) not in text
    assert str(tmp_path.parent) not in text
    assert f"{tmp_path.name}/b1" in text


def test_the_card_tells_the_base_s_own_origin_and_merged_hub_models(tmp_path):
    start = random_tensors(0)
    base = write_checkpoint(tmp_path / "base", start)
    (base / "README.md").write_text("---\nbase_model: [Org/Older-1B, /home/me/secret]\n---\n")
    hub = write_checkpoint(tmp_path / "hub" / "models--Org--Code" / "snapshots" / "0a1b", near(start, 1))
    local = write_checkpoint(tmp_path / "local", near(start, 2))
    run_merge(make_plan(base, [Branch(hub, 1, "a"), Branch(local, 1, "b")], output=tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == ["base", "Org/Code"]
    assert "made from `Org/Older-1B`" in text
    assert "secret" not in text
