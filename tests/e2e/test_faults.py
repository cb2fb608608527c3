"""Damage to a run: nothing is silently wrong and nothing ends in a traceback. A small version of benchmarks/faults."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from benchmarks.faults.fuzz import TARGETS, fuzz
from benchmarks.faults.launched import REPLACED
from benchmarks.faults.run import BAD, survey
from tests.builders import Case, Result


@pytest.mark.exhaustive
@pytest.mark.slow
def test_damage_at_random_places_is_named_healed_or_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On commit f5727a1 flipped bits in every finished stage are silently accepted."""
    monkeypatch.setenv("PATH", os.environ["PATH"])
    for module, name in REPLACED:  # put back afterwards
        monkeypatch.setattr(import_module(module), name, getattr(import_module(module), name))
    bad = [item for item in survey(tmp_path, 108, seed=5) if item.end in BAD]
    assert not bad, bad


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_mutated_inputs_are_used_or_refused_with_a_message(target: str, tmp_path: Path) -> None:
    """On commit f5727a1 several of them end in a traceback."""
    bad = [item for item in fuzz(target, 60, 5, tmp_path) if item.code not in (0, 2)]
    assert not bad, bad


def copied(finished: Case, folder: Path) -> Path:
    return Path(shutil.copytree(finished.run, folder / "run"))


@pytest.mark.parametrize("command", ["merge", "evaluate", "split"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_split_is_named(
    finished: Case, merit: Callable[..., Result], tmp_path: Path, command: str, damage: str
) -> None:
    """Fails on commit f5727a1 (B2): "branch 0 was made with other settings"."""
    run = copied(finished, tmp_path)
    file = run / "split" / "split.json"
    content = bytearray(file.read_bytes())
    content[content.index(b"groups") + 20] ^= 1
    file.unlink() if damage == "missing" else file.write_bytes(content if damage == "flipped" else content[:40])
    result = merit(command, run)
    assert result.code == 2
    assert f"{file} is damaged" in result.err
    assert str(run / "split") in result.err.split("Remove the folder")[1]
    status = merit("status", run, "--json")
    states = {row["stage"]: row["state"] for row in json.loads(status.out)["stages"]}
    assert states["split"] == "damaged"
    assert states["branch 0"] == "done"


@pytest.mark.parametrize(
    "name",
    ["mixture/datasets.json", "split/split.json", "branches/1/log.jsonl", "merged/model/merge.json"]
    + [f"evaluation/{name}.json" for name in ("results", "summary")],
)
def test_the_report_shows_no_file_that_was_changed(
    finished: Case, merit: Callable[..., Result], tmp_path: Path, name: str
) -> None:
    """One digit of what the page would show, size and time kept; before this test it was shown."""
    run = copied(finished, tmp_path)
    file = run / name
    content, times = bytearray(file.read_bytes()), file.stat()
    place = max(i for i, byte in enumerate(content) if chr(byte).isdigit())
    content[place] = ord("9") - content[place] + ord("0")
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    result = merit("report", run)
    assert result.code == 2
    assert f"{file} is damaged" in result.err


def test_a_split_without_its_record_is_not_merged(finished: Case, merit: Callable[..., Result], tmp_path: Path) -> None:
    """On commit f5727a1 the groups of a split that nothing vouches for were used."""
    run = copied(finished, tmp_path)
    (run / "split" / "record.json").unlink()
    result = merit("merge", run)
    assert result.code == 2
    assert f"{run / 'split' / 'record.json'} is missing" in result.err


def test_swapped_records_name_the_folder(finished: Case, merit: Callable[..., Result], tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    first, second = (run / "branches" / k / "record.json" for k in "01")
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    result = merit("merge", run)
    assert result.code == 2
    assert str(run / "branches" / "0") in result.err
