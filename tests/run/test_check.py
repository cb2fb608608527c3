"""The plan that `merit check` prints before anything is computed."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets.arrow_writer import ArrowWriter
from tests.builders import make_vision_base
from tests.hf.vision_cases import COLOURS, picture


def test_images_in_rows_are_in_the_disk_estimate(tmp_path: Path, merit: Any) -> None:
    """Fails on commit f5727a1 (B10): a mixture with embedded images needed no more disk than one of text."""
    make_vision_base("llava", tmp_path / "base")
    taken = 0
    for number, name in enumerate(("a", "b")):
        rows = []
        for i in range(6):
            data = io.BytesIO()
            picture(list(COLOURS)[i % len(COLOURS)], (32 + 8 * number, 24 + i), i % 4).save(data, "PNG")
            taken += len(data.getvalue())
            rows.append({"image": {"bytes": data.getvalue(), "path": None}, "prompt": "<image>?", "completion": f"{i}"})
        (tmp_path / "mixture" / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mixture" / name / "train.parquet")
    settings = {
        "name": "pictures",
        "model": {"base": str(tmp_path / "base"), "dtype": "float32"},
        "mixture": {"folder": str(tmp_path / "mixture")},
        "split": {"axes": 1},
        "train": {"max_length": 96},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")

    def plan() -> dict[str, Any]:
        result = merit("check", recipe, "--output", tmp_path / "run", "--json")
        assert result.code == 0, result.err
        return json.loads(result.out)

    found = plan()
    assert any("images that lie in rows are copied to the run folder" in note for note in found["notes"])
    for name in ("a", "b"):
        shutil.rmtree(tmp_path / "mixture" / name)
        (tmp_path / "mixture" / name).mkdir()
        row = json.dumps({"prompt": "?", "completion": "1"})
        (tmp_path / "mixture" / name / "train.jsonl").write_text(f"{row}\n" * 6)
    without = plan()
    assert taken <= found["disk_bytes"] - without["disk_bytes"] <= 2 * taken
    assert not any("images that lie in rows" in note for note in without["notes"])


def test_hub_datasets_count_where_they_are_in_the_cache_and_are_named_where_not(
    tmp_path: Path, merit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    place = tmp_path / "cache" / "org___some_pictures" / "default" / "0.0.0" / "1234"
    place.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "prompt": datasets.Value("string")})
    with ArrowWriter(features=features, path=str(place / "some_pictures-train.arrow")) as writer:
        for number in range(8):
            writer.write({"image": {"bytes": bytes([number]) * 50_000, "path": None}, "prompt": "?" * 9_000})
        writer.finalize()
    info = datasets.DatasetInfo(features=features, dataset_name="some_pictures", config_name="default")
    info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", 1, 8, dataset_name="some_pictures")})
    info.write_to_directory(str(place))
    assert len(datasets.load_dataset("org/SomePictures", split="train")) == 8  # the library's own layout

    def plan(base: str = "Qwen/Qwen2.5-VL-3B-Instruct", **more: object) -> dict[str, Any]:
        listed = [{"name": "there", "path": "org/SomePictures", **more}, {"name": "away", "path": "org/away"}]
        settings = {"name": "hub", "model": {"base": base}, "mixture": {"datasets": listed}, "split": {"axes": 1}}
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
        result = merit("check", recipe, "--output", tmp_path / "run", "--offline", "--json")
        assert result.code == 0, result.err
        found: dict[str, Any] = json.loads(result.out)
        [note] = [note for note in found["notes"] if "download" in note]
        assert "org/away" in note
        found["absent"] = "org/SomePictures" in note
        found["images"] = "images" in note
        return found

    whole, some, elsewhere = plan(), plan(samples=2), plan(subset="other")
    assert [item["absent"] for item in (whole, some, elsewhere)] == [False, False, True]
    assert whole["disk_bytes"] - elsewhere["disk_bytes"] == pytest.approx(400_000, rel=0.01)
    assert some["disk_bytes"] - elsewhere["disk_bytes"] == pytest.approx(100_000, rel=0.01)
    assert whole["images"]
    assert not plan("Qwen/Qwen2.5-3B")["images"]
