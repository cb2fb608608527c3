"""The note of a dataset that is being added or removed: damage to it is named, and no command goes on from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from merit.errors import RunFolderError
from merit.run.change import Change, load_change
from merit.run.store import CHANGE, refuse_unfinished

NOTE = Change("add", "new", branch=1, rows="ab12", recipe="name: x\nseed: 0\n", scores=[0.25], excluded=[3])


def test_it_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert load_change(tmp_path) is None
    NOTE.save(tmp_path)
    assert load_change(tmp_path) == NOTE
    with pytest.raises(RunFolderError, match="`merit add` of new is not finished"):
        refuse_unfinished(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("seed: 0", "seed: 1"),
        lambda text: text.replace('"branch": 1', '"branch": 0'),
        lambda text: text[:50],
        lambda text: "",
        lambda text: "[1]",
        lambda text: "{}",
        lambda text: "[" * 100_000,
    ],
)
def test_damage_is_named_and_nothing_goes_on_from_it(tmp_path: Path, damage) -> None:
    NOTE.save(tmp_path)
    file = tmp_path / CHANGE
    before = file.read_text()
    file.write_text(damage(before))
    assert file.read_text() != before
    for reads in (load_change, refuse_unfinished):
        with pytest.raises(RunFolderError, match=r"change\.json is damaged") as caught:
            reads(tmp_path)
        assert "restore this file" in str(caught.value.ways_out)
