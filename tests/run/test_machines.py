"""Which machines fit a branch, and how the machines of a run's branches may differ."""

from __future__ import annotations

from typing import Any

import pytest

from merit.errors import MergeError
from merit.recipe.load import parse_recipe
from merit.run.machines import fits, trained_on, unlike
from merit.run.needs import Weights
from merit.run.record import Record


def record(**facts: Any) -> Record:
    value = {
        **{
            "format": 2,
            "stage": "branch",
            "fingerprint": "",
            "settings": {},
            "inputs": {},
            "seed": 0,
            "host": {"name": "m"},
        },
        **{"started": "", "finished": "", "seconds": 1.0, "outputs": {}, "checksum": "", "versions": {"torch": "2.13"}},
        **{"device": "cpu", "threads": 1, "processes": 1, "merit": "0.2.0"},
    }
    return Record.model_validate(value | facts)


def test_what_may_differ_is_told_and_what_may_not_is_refused() -> None:
    assert unlike({0: record(), 1: record()}) == []
    notes = unlike({0: record(), 1: record(threads=4, device="H200", versions={"torch": "2.14"})})
    assert [note.split(" differs")[0] for note in notes] == [
        "the branches' device",
        "the branches' threads",
        "the branches' torch",
    ]
    assert "0: cpu, 1: H200" in notes[0]
    assert unlike({0: record(merit="0.2.1"), 1: record(merit="0.2.9")}) == []
    with pytest.raises(MergeError, match=r"branch 0: 0.2, branch 1: 0.3"):
        unlike({0: record(), 1: record(merit="0.3.0")})
    assert trained_on(record()) == {"device": "cpu", "threads": 1, "processes": 1, "torch": "2.13", "machine": "m"}
    assert "trained by differs (0: merit, 1: trl)" in unlike({0: record(), 1: record(trained_by="trl")})[0]


def test_seven_billion_weights_on_the_usual_machines() -> None:
    """16 bytes per trained weight (float32 weight, gradient, two moments), 4 per frozen one."""
    recipe = parse_recipe({"name": "x", "model": {"base": "b"}, "mixture": {"folder": "m"}})
    one, two, eight = fits(recipe, Weights(8_000_000_000, 7_000_000_000, 2))
    total = 16 * 7 + 4 * 1
    assert (one.needed, two.needed, eight.needed) == pytest.approx((total, total / 2, total / 8))
    assert one.settings == ""
    assert two.settings == "train.processes: 2, sharding: fsdp2"
    assert all(fit.fits for fit in (one, two, eight))
    smaller, *_ = fits(recipe, Weights(9_000_000_000, 9_000_000_000, 2))
    assert smaller.settings == "train.optimizer: adamw_8bit"
    assert smaller.needed == pytest.approx(90)
    assert "too small" in str(fits(recipe, Weights(40_000_000_000, 40_000_000_000, 2))[2])
