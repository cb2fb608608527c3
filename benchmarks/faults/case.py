"""The tiny run that is damaged, as it stands at four moments: finished, and with one stage to be done again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.calling import command

ROWS, TEST_ROWS = 20, 4


@dataclass(frozen=True)
class Place:
    """One kind of file, and what reads it.

    Attributes:
        kind: As the table calls it.
        moment: The run's state that it is damaged in.
        files: Globs below the moment's folder.
        reads: Commands that read it: words, where RUN and RECIPE stand for the paths.
        unread: The file is no result and may keep its damage where the results are right: a cache, a lock, a note of
            progress, or a figure's source that is checked when it is read again (another kind of this list does that).
    """

    kind: str
    moment: str
    files: tuple[str, ...]
    reads: tuple[tuple[str, ...], ...]
    unread: bool = False


RUN, MERGE, EVALUATE = ("run", "RECIPE", "--output", "RUN"), ("merge", "RUN"), ("evaluate", "RUN")
SPLIT, GRADIENTS, TRAIN = ("split", "RUN"), ("gradients", "RUN"), ("train", "RUN", "--branch", "0")
CHAIN = ("run", "RUN", "--quiet")

PLACES = (
    Place("recipe of the run", "finished", ("run/recipe.yaml",), (CHAIN, RUN, SPLIT), unread=True),
    Place("encoded rows", "finished", ("run/mixture/*/*.parquet",), (SPLIT, CHAIN, TRAIN)),
    Place("mixture's facts", "finished", ("run/mixture/*.json",), (SPLIT, CHAIN, EVALUATE)),
    Place("geometry", "finished", ("run/conflict/geometry.npz",), (SPLIT, GRADIENTS, CHAIN)),
    Place("sketches", "finished", ("run/conflict/sketches.safetensors",), (SPLIT, GRADIENTS)),
    Place("gradients' facts", "finished", ("run/conflict/*.json",), (SPLIT, GRADIENTS)),
    Place("measured gradients, stage done", "finished", ("run/conflict/partial/*",), (GRADIENTS,), unread=True),
    Place("measured gradients, read again", "gradients", ("run/conflict/partial/*",), (GRADIENTS,)),
    Place("split", "finished", ("run/split/*.json",), (SPLIT, MERGE, TRAIN)),
    Place("baseline's split", "finished", ("run/baselines/*/split/*.json",), (SPLIT, CHAIN)),
    Place("branch's record", "finished", ("run/branches/*/record.json",), (MERGE, CHAIN)),
    Place("branch's result and log", "finished", ("run/branches/*/result.json", "run/branches/*/log.jsonl"), (MERGE,)),
    Place("branch's weights", "finished", ("run/branches/*/model/*.safetensors",), (MERGE, CHAIN)),
    Place("branch's config and tokenizer", "finished", ("run/branches/*/model/*.json",), (MERGE, CHAIN)),
    Place("baseline's branch", "finished", ("run/baselines/*/branches/*/**/*",), (CHAIN,)),
    Place("checkpoint, gone on from", "half", ("run/branches/0/checkpoints/*/*",), (TRAIN,)),
    Place("merged weights", "finished", ("run/merged/model/*.safetensors",), (MERGE, EVALUATE)),
    Place("merged config, tokenizer, card", "finished", ("run/merged/model/*",), (MERGE, EVALUATE)),
    Place("merge's record", "finished", ("run/merged/record.json",), (MERGE, EVALUATE)),
    Place("baseline's merge", "finished", ("run/baselines/*/merged/**/*",), (CHAIN,)),
    Place("evaluation", "finished", ("run/evaluation/*",), (EVALUATE, CHAIN)),
    Place("model's figures, stage done", "finished", ("run/evaluation/models/*",), (EVALUATE,), unread=True),
    Place("model's figures, read again", "evaluation", ("run/evaluation/models/*",), (EVALUATE,)),
    Place("known hashes", "finished", ("run/.hashes.json",), (CHAIN, MERGE), unread=True),
    Place(
        "locks and markers", "finished", ("run/.merit", "run/**/.lock", "run/**/progress.json"), (CHAIN,), unread=True
    ),
    Place("base", "finished", ("base/*",), (SPLIT, MERGE), unread=True),
    Place("sources", "finished", ("mixture/*/*.jsonl",), (SPLIT,), unread=True),
)
_NO_RESULT = (".lock", "progress.json")


def files_of(place: Place, top: Path) -> list[Path]:
    """The files of a kind, in order; locks and notes of progress only where they are the kind."""
    found = {path for glob in place.files for path in top.glob(glob) if path.is_file()}
    return sorted(path for path in found if place.kind == "locks and markers" or path.name not in _NO_RESULT)


class Interrupted(KeyboardInterrupt):
    """Stands for Ctrl-C."""


def make_run(folder: Path) -> dict[str, Path]:
    """A finished run below ``folder``, and copies of it with one stage to be done again; folders by moment."""
    from tests import builders

    top = folder / "finished"
    base = builders.make_base(top / "base", hidden=8)
    case = builders.make_case(
        top,
        base,
        baselines=["joint", "random"],
        model={"base": "base", "dtype": "float32"},
        conflict={"examples": 8, "sketch_size": 256},
        evaluate={
            "max_new_tokens": 3,
            "drift": {"prompts": 2, "tokens": 3},
            "kept": [{"name": "kept", "path": "kept.jsonl"}],
        },
    )
    for task in list(builders.TASKS)[4:]:
        shutil.rmtree(top / "mixture" / task)
    for number, task in enumerate(list(builders.TASKS)[:4]):
        builders.write_rows(top / "mixture" / task / "train.jsonl", builders.task_rows(task, ROWS + 4 * number, 0))
        builders.write_rows(top / "mixture" / task / "test.jsonl", builders.task_rows(task, TEST_ROWS, 1))
    builders.write_rows(top / "kept.jsonl", builders.task_rows("double", TEST_ROWS, 2))
    _done("run", case.recipe, "--output", case.run, "--quiet")
    _done("run", case.recipe, "--output", case.run, "--quiet")  # writes what a second look adds, such as known hashes
    moments = {"finished": top}
    for moment in ("gradients", "evaluation", "half"):
        moments[moment] = folder / moment
        shutil.copytree(top, moments[moment])
    for path in (moments["gradients"] / "run" / "conflict").iterdir():
        if path.is_file() and path.name != ".lock":
            path.unlink()
    for path in (moments["evaluation"] / "run" / "evaluation").iterdir():
        if path.is_file() and path.name != ".lock":
            path.unlink()
    _half_trained(moments["half"] / "run")
    return moments


def _half_trained(run: Path) -> None:
    branch = run / "branches" / "0"
    shutil.rmtree(branch)
    with _interrupted_after(2):
        found = command("train", run, "--branch", "0", "--quiet", "--set", "train.checkpoint_steps=1")
    assert found.code == 75, found
    assert list(branch.glob("checkpoints/*/*")), found


@contextmanager
def _interrupted_after(saves: int) -> Iterator[None]:
    from merit.train import checkpoint

    real, done = checkpoint.save, 0

    def save(*words: object, **more: object) -> None:
        nonlocal done
        real(*words, **more)  # type: ignore[arg-type]
        done += 1
        if done == saves:
            raise Interrupted("stopped")

    checkpoint.save = save  # type: ignore[assignment]
    try:
        yield
    finally:
        checkpoint.save = real


def _done(*words: object) -> None:
    found = command(*words)
    assert found.code == 0, found
