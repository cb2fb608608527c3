"""Files appear whole or not at all, and what killed processes left is swept, but nobody else's work."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from merit import files
from merit.errors import ResourceError, RunFolderError


def test_a_file_appears_only_when_its_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    files.write_text(target, "old")
    with pytest.raises(RuntimeError), files.writing(target) as file:
        file.write(b"new")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


KILLED = """
import os, signal, sys
from pathlib import Path
from merit import files
target = Path(sys.argv[1])
if sys.argv[2] == "file":
    with files.writing(target) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
with files.building(target) as folder:
    (folder / "half").write_text("x")
    print(folder, flush=True)
    if sys.argv[2] == "folder":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def start(target: Path, how: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", KILLED, str(target), how]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", ["file", "folder"])
def test_a_kill_leaves_nothing_under_the_final_name(tmp_path: Path, how: str) -> None:
    target = tmp_path / "out"
    with start(target, how) as process:
        assert process.wait() == -signal.SIGKILL
    assert not target.exists()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1, "the kill came in the middle"
    if how == "folder":
        with files.building(target) as folder:
            (folder / "whole").write_text("x")
        assert [path.name for path in tmp_path.iterdir()] == ["out"], "what the killed process left is swept"


def test_a_living_process_and_another_machine_are_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    elsewhere = tmp_path / f".out.other-host.1{files.PARTIAL}"
    forgotten = tmp_path / f".out.third-host.1{files.PARTIAL}"
    for folder in (elsewhere, forgotten):
        folder.mkdir()
    os.utime(forgotten, (time.time() - 3 * 24 * 3600,) * 2)
    with start(target, "wait") as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with files.scratch(target):
            pass
        assert theirs.is_dir()
        assert elsewhere.is_dir()
        assert not forgotten.exists(), "nothing in it has changed for three days"
        process.communicate("")
    assert (target / "half").is_file()


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="filled up"), files.building(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_space_is_asked_for_where_the_folder_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda folder: 10)
    files.require_space(tmp_path / "not" / "yet", 10, "3 branches")
    with pytest.raises(ResourceError, match="3 branches need about 11 B of disk space, but only 10 B are free"):
        files.require_space(tmp_path / "not" / "yet", 11, "3 branches")
    monkeypatch.undo()
    assert files.free_bytes(tmp_path / "not" / "yet") == files.free_bytes(tmp_path)


@dataclass(frozen=True)
class Facts:
    name: str
    counts: list[int]


def test_what_a_stage_wrote_comes_back_typed(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    files.write_json(file, [{"name": "a", "counts": [1, 2]}])
    assert files.read_as(file, list[Facts]) == [Facts("a", [1, 2])]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "null",
        '[{"name": "a"}]',
        '[{"name": 1, "counts": []}]',
        '[{"name": "a", "counts": [null]}]',
    ],
)
def test_what_it_did_not_write_is_one_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "facts.json"
    file.write_text(text)
    with pytest.raises(RunFolderError, match=r"facts\.json is damaged"):
        files.read_as(file, list[Facts])


def test_partial_names_tell_the_machine(tmp_path: Path) -> None:
    with files.scratch(tmp_path / "out") as folder:
        assert socket.gethostname() in folder.name
        assert folder.name.endswith(files.PARTIAL)
