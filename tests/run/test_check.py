"""The plan that `merit check` prints before anything is computed."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
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
