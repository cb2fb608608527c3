"""The tiny runs that are damaged, of a text and of a vision base: finished, and with one stage to be done again."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.faults.calling import command

if TYPE_CHECKING:
    from tests.builders import Case

ROWS, TEST_ROWS = 20, 4


@dataclass(frozen=True)
class Place:
    """One kind of file, and what reads it.

    Attributes:
        kind: As the table calls it.
        moment: The run's state that it is damaged in.
        files: Globs below the moment's folder.
        reads: Commands that read it: words as in :func:`words_in`.
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
    Place("vision: encoded rows", "vision", ("run/mixture/*/*.parquet",), (SPLIT, CHAIN, TRAIN)),
    Place("vision: pictures of Parquet rows", "vision", ("run/mixture/images/*/*",), (SPLIT, CHAIN, EVALUATE)),
    Place(
        "vision: pictures to train on",
        "untrained",
        ("mixture/*/train*.png", "run/mixture/images/train/*"),
        (TRAIN,),
        unread=True,  # half of them are of the other branch
    ),
    Place("vision: sources", "vision", ("mixture/*/*",), (SPLIT,), unread=True),
    Place("vision: branch's weights", "vision", ("run/branches/*/model/*.safetensors",), (MERGE, CHAIN)),
    Place("vision: processors and configs", "vision", ("run/*/**/model/*.json",), (MERGE, EVALUATE, CHAIN)),
    Place("vision: base", "vision", ("base/*",), (SPLIT, MERGE), unread=True),
)
_OTHER_KINDS = (".lock", "progress.json", ".merit", ".hashes.json")


def files_of(place: Place, top: Path) -> list[Path]:
    """The files of a kind, in order; locks, markers and notes only where the kind names them."""
    named = {Path(glob).name for glob in place.files}
    found = {path for glob in place.files for path in top.glob(glob) if path.is_file()}
    return sorted(path for path in found if path.name in named or path.name not in _OTHER_KINDS)


class Interrupted(KeyboardInterrupt):
    """Stands for Ctrl-C."""


def text_case(top: Path, **changes: Any) -> Case:
    """A base, four small datasets, and a recipe below ``top``."""
    from tests import builders

    settings = {
        "model": {"base": "base", "dtype": "float32"},
        "conflict": {"examples": 8, "sketch_size": 256},
        "evaluate": {"max_new_tokens": 3, "drift": {"prompts": 2, "tokens": 3}},
    }
    case = builders.make_case(top, builders.make_base(top / "base", hidden=8), **{**settings, **changes})
    for task in list(builders.TASKS)[4:]:
        shutil.rmtree(top / "mixture" / task)
    for number, task in enumerate(list(builders.TASKS)[:4]):
        builders.write_rows(top / "mixture" / task / "train.jsonl", builders.task_rows(task, ROWS + 4 * number, 0))
        builders.write_rows(top / "mixture" / task / "test.jsonl", builders.task_rows(task, TEST_ROWS, 1))
    return case


def text_run(folder: Path) -> dict[str, Path]:
    """A finished run below ``folder``, and copies of it with one stage to be done again; folders by moment."""
    from tests import builders

    top = folder / "finished"
    case = text_case(
        top,
        baselines=["joint", "random"],
        evaluate={
            "max_new_tokens": 3,
            "drift": {"prompts": 2, "tokens": 3},
            "kept": [{"name": "kept", "path": "kept.jsonl"}],
        },
    )
    builders.write_rows(top / "kept.jsonl", builders.task_rows("double", TEST_ROWS, 2))
    done("run", case.recipe, "--output", case.run, "--quiet")
    done("run", case.recipe, "--output", case.run, "--quiet")  # writes what a second look adds, such as known hashes
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


def vision_run(folder: Path) -> dict[str, Path]:
    """The same of a vision base."""
    import yaml
    from tests import builders

    top = folder / "vision"
    builders.make_vision_base("llava", top / "base")
    for number, task in enumerate(("colour", "shout", "twice", "embedded")):
        for split, count in (("train", 8 + 2 * number), ("test", 2)):
            write_pictures(top / "mixture" / task, task, split, count)
    settings = {
        "name": "pictures",
        "model": {"base": "base", "dtype": "float32"},
        "mixture": {"folder": "mixture"},
        "conflict": {"examples": 8, "sketch_size": 256},
        "split": {"axes": 1},
        "train": {"learning_rate": 5e-3, "batch_size": 8, "max_length": 128, "threads": 1},
        "evaluate": {"max_new_tokens": 2, "drift": {"prompts": 2, "tokens": 2}},
    }
    (top / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    for _ in range(2):
        done("run", top / "recipe.yaml", "--output", top / "run", "--quiet")
    untrained = folder / "untrained"
    shutil.copytree(top, untrained)
    shutil.rmtree(untrained / "run" / "branches" / "0")
    return {"vision": top, "untrained": untrained}


def write_pictures(place: Path, task: str, split: str, count: int) -> None:
    """Rows of one task about pictures in files; of ``embedded``, in the rows' own Parquet file."""
    import pyarrow
    import pyarrow.parquet
    from tests import builders
    from tests.hf.vision_cases import COLOURS, picture

    place.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        answer = {"colour": colour, "shout": colour.upper(), "twice": 2 * colour, "embedded": f"a {colour}"}[task]
        image = picture(colour, (32, 32), number % 4)
        if task == "embedded":
            data = io.BytesIO()
            image.save(data, "PNG")
            text = [{"user": "Name it.", "assistant": answer, "source": "us"}]
            rows.append({"images": [{"bytes": data.getvalue(), "path": None}], "texts": text})
        else:
            image.save(place / f"{split}-{number}.png")
            turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": answer}]
            rows.append({"image": f"{split}-{number}.png", "conversations": turns})
    if task == "embedded":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / f"{split}.parquet")
    else:
        builders.write_rows(place / f"{split}.jsonl", rows)


def _half_trained(run: Path) -> None:
    from merit.train import checkpoint

    branch = run / "branches" / "0"
    shutil.rmtree(branch)
    with interrupted_after(2, checkpoint, "save"):
        found = command("train", run, "--branch", "0", "--quiet", "--set", "train.checkpoint_steps=1")
    assert found.code == 75, found
    assert list(branch.glob("checkpoints/*/*")), found


@contextmanager
def interrupted_after(calls: int, owner: Any, name: str) -> Iterator[None]:
    """Ctrl-C right after ``owner.name`` has been called so often."""
    real, count = getattr(owner, name), 0

    def counting(*words: Any, **more: Any) -> Any:
        nonlocal count
        found = real(*words, **more)
        count += 1
        if count == calls:
            raise Interrupted("stopped")
        return found

    setattr(owner, name, counting)
    try:
        yield
    finally:
        setattr(owner, name, real)


def words_in(words: tuple[str, ...], top: Path) -> list[str]:
    """The words of a command on the run in ``top``: RUN, RECIPE, and @ before other paths there."""
    names = {"RUN": "@run", "RECIPE": "@recipe.yaml"}
    named = [names.get(word, word) for word in words]
    return [str(top / word[1:]) if word.startswith("@") else word for word in named]


def done(*words: object) -> None:
    """Run a `merit` command that has to succeed."""
    found = command(*words)
    assert found.code == 0, found
