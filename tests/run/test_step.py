"""One way to run a stage: made once, loaded afterwards, refused when stale, made again on request."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from merit.errors import RunFolderError
from merit.progress import silent
from merit.run.record import StaleStageError
from merit.run.session import Session
from merit.run.step import Step, Work, run_step
from merit.run.store import Stage


@dataclass
class Listener:
    """Keeps what was said."""

    lines: list[str] = field(default_factory=list)

    def say(self, text: str, /) -> None:
        self.lines.append(text)

    def stage(self, name: str, detail: str = "", /) -> None:
        self.lines.append(f"{name}: {detail}")

    def note(self, text: str, /) -> None:
        self.lines.append(f"note {text}")

    def progress(self, unit: str = "", /) -> Any:
        return nullcontext(silent)


@dataclass
class Bench:
    """A stage that writes a number, and how often it was made."""

    run: Path
    redo: bool = False
    made: int = 0
    said: Listener = field(default_factory=Listener)

    def step(self, value: int, *, inputs: str = "a", follows_inputs: bool = False, fail: bool = False) -> Step[int]:
        def make(work: Work) -> int:
            self.made += 1
            (work.folder / "half").write_text("x")
            if fail:
                raise RuntimeError("killed")
            (work.folder / "value").write_text(str(value))
            (work.folder / "half").unlink()
            work.facts["value"] = value
            return value

        stage = Stage("split", self.run / "split", {"value": value}, {"rows": inputs})
        return Step(
            "split", stage, make, lambda folder: int((folder / "value").read_text()), seed=3,
            describe=lambda result: f"value {result}", notes=lambda result: [f"is {result}"],
            follows_inputs=follows_inputs,
        )  # fmt: skip

    def __call__(self, step: Step[int]) -> int:
        session = Session(None, self.run, self.said, redo=self.redo)  # type: ignore[arg-type]  # no recipe is read
        return run_step(step, session)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_stage_is_made_once_and_loaded_afterwards(bench: Bench) -> None:
    assert bench(bench.step(5)) == 5
    assert bench(bench.step(5)) == 5
    assert bench.made == 1
    assert bench.said.lines[-2:] == ["split: value 5 (done before)", "note is 5"]
    assert bench.step(5).stage.record().facts == {"value": 5}


def test_a_stale_stage_is_refused_and_left_alone(bench: Bench) -> None:
    bench(bench.step(5))
    with pytest.raises(StaleStageError, match="value: 5 -> 6"):
        bench(bench.step(6))
    assert bench(bench.step(5)) == 5
    assert bench.made == 1


def test_redo_makes_it_again(bench: Bench) -> None:
    bench(bench.step(5))
    bench.redo = True
    assert bench(bench.step(6)) == 6
    assert bench.made == 2


def test_a_stage_may_follow_its_inputs_but_never_its_settings(bench: Bench) -> None:
    bench(bench.step(5, follows_inputs=True))
    assert bench(bench.step(5, inputs="b", follows_inputs=True)) == 5
    assert bench.made == 2
    with pytest.raises(StaleStageError):
        bench(bench.step(6, inputs="b", follows_inputs=True))


def test_an_attempt_that_failed_leaves_nothing_that_counts(bench: Bench) -> None:
    with pytest.raises(RuntimeError):
        bench(bench.step(5, fail=True))
    assert not bench.step(5).stage.begun
    assert bench(bench.step(5)) == 5
    assert not (bench.run / "split" / "half").exists()


def test_damage_is_found_before_anything_is_loaded(bench: Bench) -> None:
    """On commit f5727a1 the other digit is taken as it stands: the size is the same."""
    bench(bench.step(5))
    (bench.run / "split" / "value").write_text("7")
    with pytest.raises(RunFolderError, match="value is damaged"):
        bench(bench.step(5))
