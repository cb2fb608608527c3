"""The run folder: done, stale, busy, damaged; and what a record says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merit.errors import RunFolderError
from merit.files import canonical, content_hash, differences, fingerprint, write_json
from merit.run.record import StaleStageError
from merit.run.store import Stage, is_locked, lock

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def make(folder: Path, rate: float = 0.1, base: str = "a" * 64) -> Stage:
    return Stage("branch", folder / "branches" / "0", {"train": {"learning_rate": rate}}, {"base": base})


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
    assert record.facts == {"steps": 3}
    assert record.seed == 7
    assert record.settings == {"train": {"learning_rate": 0.1}}
    facts = {name: output.model_dump() for name, output in record.outputs.items()}
    assert facts == {"model/w.txt": {"bytes": 7, "xxh3": content_hash(stage.path / "model" / "w.txt")}}
    assert record.versions["torch"]
    assert record.seconds >= 0


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


def flip(file: Path, bit: int) -> None:
    """Change one bit and keep size and modification time."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_damaged_outputs_are_found_by_content(tmp_path: Path) -> None:
    """On commit f5727a1 the flipped bit goes unnoticed: only sizes were compared."""
    stage = make(tmp_path)
    finish(stage)
    stage.verify()
    file = stage.path / "model" / "w.txt"
    flip(file, 11)
    with pytest.raises(RunFolderError, match=re.escape(f"{file} is damaged: its content is not what was written")):
        stage.verify()
    file.write_text("wei")
    with pytest.raises(RunFolderError, match="it has 3 bytes, but 7 were written"):
        stage.verify()
    file.unlink()
    with pytest.raises(RunFolderError, match="it is missing"):
        stage.verify()


def test_every_flipped_bit_of_a_record_is_noticed(tmp_path: Path) -> None:
    """On commit f5727a1 a flip in settings that nothing compares, or in what was recorded, goes unnoticed."""
    stage = make(tmp_path)
    finish(stage)
    size = stage.record_file.stat().st_size
    for bit in range(0, 8 * size, 7):
        flip(stage.record_file, bit)
        with pytest.raises(RunFolderError):
            stage.is_done()
        flip(stage.record_file, bit)
    assert stage.is_done()


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"format": 2}', "[" * 100_000, ""])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    stage = make(tmp_path)
    finish(stage)
    stage.record_file.write_text(text)
    with pytest.raises(RunFolderError, match="damaged"):
        stage.is_done()


def test_a_record_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    stage = make(tmp_path)
    finish(stage)
    write_json(stage.record_file, {**json.loads(stage.record_file.read_text()), "format": 1})
    with pytest.raises(RunFolderError, match=r"another version of MERIT \(record format 1"):
        stage.is_done()


def test_hashes_that_begin_alike_are_shown_apart(tmp_path: Path) -> None:
    """On commit f5727a1 the message reads ``37b2… -> 37b2…``."""
    assert differences("a" * 64, "a" * 40 + "b" * 24, "base") == [f"base: {'a' * 44}… -> {'a' * 40}bbbb…"]


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
