"""The run folder: done, stale, busy, damaged; and what a record says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merit.errors import RunFolderError
from merit.files import canonical, differences, file_hash, fingerprint, write_json
from merit.run.store import Stage, StaleStageError, is_locked, lock

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def make(folder: Path, rate: float = 0.1, base: str = "a" * 64) -> Stage:
    return Stage("branch 0", folder / "branches" / "0", {"train": {"learning_rate": rate}}, {"base": base})


def finish(stage: Stage, text: str = "weights") -> None:
    with stage.writing(seed=7) as record:
        (stage.path / "model").mkdir()
        (stage.path / "model" / "w.txt").write_text(text)
        record["steps"] = 3


def test_a_finished_stage_is_done_and_its_record_is_whole(tmp_path: Path) -> None:
    stage = make(tmp_path)
    assert not stage.is_done()
    finish(stage)
    assert stage.is_done()
    record = stage.record()
    assert record["steps"] == 3
    assert record["seed"] == 7
    assert record["settings"] == {"train": {"learning_rate": 0.1}}
    assert record["outputs"] == {"model/w.txt": {"bytes": 7, "sha256": file_hash(stage.path / "model" / "w.txt")}}
    assert record["versions"]["torch"]
    assert record["seconds"] >= 0


@pytest.mark.parametrize(
    ("rate", "base", "words"),
    [(0.2, "a" * 64, "train.learning_rate: 0.1 -> 0.2"), (0.1, "b" * 64, "input.base: aaaaaaaaaaaa… -> bbbbbbbbbbbb…")],
)
def test_a_stale_stage_names_the_change_and_the_ways_out(tmp_path: Path, rate: float, base: str, words: str) -> None:
    finish(make(tmp_path))
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(StaleStageError) as caught:
        make(tmp_path, rate, base).is_done()
    assert words in str(caught.value)
    for way in ("--output", "--redo"):
        assert way in str(caught.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_an_exception_leaves_the_stage_undone_and_the_next_attempt_clears_up(tmp_path: Path) -> None:
    stage = make(tmp_path)
    with pytest.raises(RuntimeError), stage.writing(seed=0, keep=("checkpoints",)):
        (stage.path / "half").write_text("x")
        (stage.path / "checkpoints").mkdir()
        raise RuntimeError
    assert not stage.is_done()
    with stage.writing(seed=0, keep=("checkpoints",)):
        assert not (stage.path / "half").exists()
        assert (stage.path / "checkpoints").is_dir()
    assert stage.is_done()


def test_a_truncated_output_is_found(tmp_path: Path) -> None:
    stage = make(tmp_path)
    finish(stage)
    (stage.path / "model" / "w.txt").write_text("wei")
    with pytest.raises(RunFolderError, match="expected 7 bytes as recorded, found 3"):
        stage.verify()
    (stage.path / "model" / "w.txt").unlink()
    with pytest.raises(RunFolderError, match="no file"):
        stage.verify()


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    stage = make(tmp_path)
    finish(stage)
    stage.record_file.write_text("{")
    with pytest.raises(RunFolderError, match="damaged"):
        stage.is_done()


HOLDER = """
import sys, time
from pathlib import Path
from merit.run.store import lock
with lock(Path(sys.argv[1]), "x"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_writers_at_once_are_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_locked(tmp_path)
        with pytest.raises(RunFolderError, match=f"process {holder.pid} on "), lock(tmp_path, "x"):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    for _ in range(50):
        if not is_locked(tmp_path):
            break
        time.sleep(0.02)
    with lock(tmp_path, "x"):
        pass


def test_json_is_never_half_written(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@given(JSON)
def test_fingerprints_follow_the_value_alone(value: object) -> None:
    assert fingerprint(json.loads(canonical(value))) == fingerprint(value)
    assert not differences(value, json.loads(canonical(value)))


@given(st.dictionaries(st.text(min_size=1), st.integers(), min_size=1), st.data())
def test_every_changed_field_is_named_once(old: dict[str, int], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(old)))
    found = differences(old, {**old, key: old[key] + 1})
    assert found == [f"{key}: {old[key]} -> {old[key] + 1}"]


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError):
        fingerprint({"a": object()})
