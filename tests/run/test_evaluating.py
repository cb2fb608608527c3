"""`merit evaluate` on a run: who takes part is said, and what it reads again is compared by content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.builders import Case


def copied(finished: Case, folder: Path) -> Path:
    return Path(shutil.copytree(finished.run, folder / "run"))


def test_a_merged_model_without_its_record_is_named(finished: Case, merit, tmp_path: Path) -> None:
    """Fails on commit f5727a1 (A9): the merged model was left out, exit 0, without a word."""
    run = copied(finished, tmp_path)
    (run / "merged" / "record.json").unlink()
    shown = merit("evaluate", run)
    assert shown.code == 0, shown.err
    said = " ".join((shown.out + shown.err).split())
    assert "merged is not measured: unfinished" in said
    summary = json.loads((run / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    assert "merged" not in summary["models"]
    assert list(summary["missing"]) == ["merged"]
    assert any("Not measured: merged (unfinished" in sentence for sentence in summary["verdict"])


def test_a_changed_answer_of_a_held_out_row_is_noticed(finished: Case, merit, tmp_path: Path) -> None:
    """Fails on commit f5727a1 (A8): an answer that was flipped in mixture/test was evaluated."""
    run = copied(finished, tmp_path)
    shutil.rmtree(run / "evaluation")
    file = sorted((run / "mixture" / "test").glob("*.parquet"))[0]
    table = pq.read_table(file)
    place = table.column_names.index("answer")
    answers = pa.array(["another"] * len(table), table.field(place).type)
    pq.write_table(table.set_column(place, table.field(place), answers), file, compression="zstd")
    result = merit("evaluate", run)
    assert result.code == 2
    assert f"mixture/test/{file.name}" in result.err
    assert not (run / "evaluation" / "results.json").exists()


@pytest.mark.parametrize("name", ["results.json", "kept.json", "drift.json", "summary.json"])
def test_a_finished_evaluation_is_read_by_content(finished: Case, merit, tmp_path: Path, name: str) -> None:
    """Fails on commit f5727a1 (A8): a flipped bit of a finished evaluation was accepted, size and time kept."""
    run = copied(finished, tmp_path)
    file = run / "evaluation" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    result = merit("evaluate", run)
    assert result.code == 2
    assert f"evaluation/{name}" in result.err
