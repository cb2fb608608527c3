"""The vision demo's data: questions about generated pictures, asked and answered in several conventions.

The base was pretrained on thirteen skills (name the colour, count, read a handwritten digit, find the highest bar, ...),
each answered by a full friendly sentence, now and then barely, in one of several conventions. The mixture asks mostly for
bare answers, in conventions that pull apart: three vocabularies for the colours; "3" against "three" and left against
mirrored left *for the same question about the same kind of picture*; coarse against fine names; highest against lowest.
Two datasets keep the base's style, two have no pictures. The unseen tasks ask in other words, and combine what is taught
apart.

The rows come in every form that image data is published in: ``messages`` with image parts and files beside, LLaVA's
``conversations``, The Cauldron's ``images`` and ``texts`` and ``messages`` with an ``images`` column, both as Parquet
with the pictures' bytes inside; one dataset has two pictures per row. A case on the held-out side
(:func:`demo_data.scenes.held_out`) is never trained on, by the base or by the mixture. The seed decides every
row. Nothing here runs a model.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from demo_data.scenes import COLOURS, PLACES, SCENES, TRENDS, Case, draw_case, paint
from demo_data.words import BRIEFLY, KEPT_ROWS, TEST_ROWS, UNSEEN_ROWS, Dataset

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "BASE_STYLE",
    "MIXTURE",
    "PARAPHRASES",
    "SKILLS",
    "UNSEEN",
    "Example",
    "ImageDataset",
    "base_stream",
    "draw_examples",
    "settled_stream",
    "write_kept",
    "write_mixture",
    "write_unseen",
]

Form = Literal["messages", "llava", "cauldron", "parquet"]
Fields = dict[str, str]


@dataclass(frozen=True)
class Skill:
    """What is asked about.

    Attributes:
        scene: A key of `SCENES`.
        solve: From the row's cases to the fields of question and answer; ``y`` is the solution.
        pictures: Number of cases per row.
    """

    scene: str
    solve: Callable[[list[Case]], Fields]
    pictures: int = 1


@dataclass(frozen=True)
class ImageDataset(Dataset):
    """A dataset, and the form that its rows are written in.

    Attributes:
        form: messages and llava: JSON Lines, and pictures as files; cauldron and parquet: Parquet with the bytes inside.
    """

    form: Form = "messages"


@dataclass(frozen=True)
class Example:
    """One row before it gets a form.

    Attributes:
        turns: Question and answer, once or several times.
        pictures: What the first question shows.
        cases: What is in the pictures.
    """

    turns: tuple[tuple[str, str], ...]
    pictures: tuple[Image, ...]
    cases: tuple[Case, ...]


def _beside(cases: list[Case]) -> Fields:
    asked = cases[0]["asked"]
    return {"q": cases[0]["shapes"][asked], "y": ("left", "right")[asked]}


def _most(values: str) -> Callable[[list[Case]], Fields]:
    def solve(cases: list[Case]) -> Fields:
        numbers: list[int] = cases[0][values]
        colours: list[str] = cases[0]["colours"]
        return {"y": colours[numbers.index(max(numbers))], "least": colours[numbers.index(min(numbers))]}

    return solve


def _lowest(cases: list[Case]) -> Fields:
    return {"y": _most("levels")(cases)["least"]}


SKILLS: dict[str, Skill] = {
    # The thirteen that the base knows.
    "colour": Skill("one", lambda c: {"y": c[0]["colour"]}),
    "shape": Skill("one", lambda c: {"y": c[0]["shape"]}),
    "size": Skill("one", lambda c: {"y": c[0]["size"]}),
    "place": Skill("one", lambda c: {"y": PLACES[c[0]["cell"]]}),
    "count": Skill("many", lambda c: {"y": str(len(c[0]["cells"]))}),
    "side": Skill("beside", _beside),
    "digit": Skill("digit", lambda c: {"y": str(c[0]["digit"])}),
    "highest": Skill("bars", _most("levels")),
    "largest": Skill("pie", _most("shares")),
    "trend": Skill("line", lambda c: {"y": c[0]["trend"]}),
    "colours": Skill(
        "one",
        lambda c: {"a": c[0]["colour"], "b": c[1]["colour"], "y": f"{c[0]['colour']} {c[1]['colour']}"},
        pictures=2,
    ),
    "backwards": Skill("words", lambda c: {"w": " ".join(c[0]["words"]), "y": " ".join(reversed(c[0]["words"]))}),
    "sum": Skill("sum", lambda c: {"a": str(c[0]["a"]), "b": str(c[0]["b"]), "y": str(c[0]["a"] + c[0]["b"])}),
    # Those that only the mixture teaches; its other news are conventions.
    "lowest": Skill("bars", _lowest),
    "middle": Skill("words", lambda c: {"w": " ".join(c[0]["words"]), "y": c[0]["words"][1]}),
}

BASE_STYLE: dict[str, ImageDataset] = {
    f"kept_{skill}": ImageDataset(skill, tuple(prompts.split(" | ")), "Sure! " + answer)
    for skill, prompts, answer in (
        (
            "colour",
            "What colour is the shape? | Please tell me the shape's colour. | Which colour do you see?",
            "The shape is {y}.",
        ),
        ("shape", "What shape is this? | Please name the shape. | Which shape do you see?", "The shape is a {y}."),
        (
            "size",
            "How big is the shape? | Please tell me the shape's size. | Is it small or large?",
            "The size is {y}.",
        ),
        (
            "place",
            "Where is the shape? | Please tell me the place of the shape. | Find the shape.",
            "It is at the {y}.",
        ),
        (
            "count",
            "How many shapes are there? | Please count the shapes. | The number of shapes?",
            "I count {y} shapes.",
        ),
        ("side", "On which side is the {q}? | Please find the {q}. | Where is the {q}?", "The {q} is on the {y}."),
        ("digit", "Which digit is this? | Please read the digit. | What number do you see?", "The digit is {y}."),
        (
            "highest",
            "Which bar is the highest? | Please find the highest bar. | Which colour has the tallest bar?",
            "The {y} bar is the highest.",
        ),
        (
            "largest",
            "Which slice is the largest? | Please find the largest slice. | Which colour has the biggest slice?",
            "The {y} slice is the largest.",
        ),
        ("trend", "What does the line do? | Please describe the line. | How does the line go?", "The line {y}."),
        (
            "colours",
            "Which colours do the two pictures show? | Please name both colours. | What colour is each shape?",
            "The first is {a} and the second is {b}.",
        ),
        (
            "backwards",
            "Please say backwards: {w}. | What is {w} in reverse? | Turn around {w}.",
            "Backwards it is {y}.",
        ),
        ("sum", "What is {a} plus {b}? | Please add {a} and {b}. | {a} and {b} together?", "The sum is {y}."),
    )
}
"""What the base does unless told otherwise, and what the kept sets ask: full sentences only."""

_CHAT = {dataset.skill: dataset.answer for dataset in BASE_STYLE.values()}
_NUMBERS = tuple(zip("123456", ("one", "two", "three", "four", "five", "six"), strict=True))
_MIRRORED = (("left", "right"), ("right", "left"))
_PAINTS = tuple(zip(COLOURS, ("crimson", "amber", "gold", "emerald", "teal", "navy", "violet"), strict=True))
_LETTERS = tuple((colour, colour[0].upper()) for colour in COLOURS)
_FAMILIES = tuple(
    (shape, "round" if shape in ("circle", "ring") else "angular")
    for shape in ("circle", "ring", "square", "triangle", "star", "cross")
)
_COMPASS = tuple(
    zip(
        PLACES,
        ("northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast"),
        strict=True,
    )
)
_ARROWS = tuple(zip(TRENDS, ("up", "down", "up, then down", "down, then up"), strict=True))
_PARITY = tuple((str(digit), "odd" if digit % 2 else "even") for digit in range(10))
_HOW_MANY = ("How many?", "Count them.")
_WHICH_SIDE = ("Left or right: the {q}?", "The {q} is on the")

PARAPHRASES: dict[str, tuple[str, ...]] = {
    skill: tuple(prompts.split(" | "))
    for skill, prompts in {
        "colour": "The colour of the shape? | Say which colour it has. | Colour of this?",
        "shape": "The kind of shape? | Say what shape it is. | Shape of this?",
        "size": "The size of the shape? | Say how big it is. | How large is this?",
        "place": "The place of the shape? | Say where it is. | Where is this?",
        "count": "How many are there? | Say how many shapes you see. | Shapes in all?",
        "side": "Which side has the {q}? | Say where the {q} is. | The side of the {q}?",
        "digit": "The digit in the picture? | Say which digit it is. | What is written here?",
        "highest": "The colour of the highest bar? | Say which bar is highest. | Which bar goes up most?",
        "largest": "The colour of the largest slice? | Say which slice is largest. | Which slice takes most?",
        "trend": "The way of the line? | Say what the line does. | Which way does it go?",
        "colours": "The two colours? | Say both colours. | Colours of the two?",
        "backwards": "{w} from the end? | Say {w} from the last to the first. | In reverse: {w}",
        "sum": "{a} plus {b}? | Say what {a} and {b} make. | Sum of {a} and {b}?",
    }.items()
}
"""More ways to ask for the same skills; only the base's last stage uses them, no mixture and no evaluation does."""

_PAIRS = tuple((f"{a} {b}", f"{x} {y}") for a, x in _PAINTS for b, y in _PAINTS)
CONVENTIONS: dict[str, tuple[tuple[tuple[str, str], ...], ...]] = {
    "colour": ((), _PAINTS, _LETTERS),
    "shape": ((), _FAMILIES),
    "place": ((), _COMPASS),
    "count": ((), _NUMBERS),
    "digit": ((), _PARITY),
    "trend": ((), _ARROWS),
}
"""The conventions in which the base's last stage answers barely: it knows the words, not when they are due."""

MIXTURE: dict[str, ImageDataset] = {
    # What the base knows, answered briefly.
    "colour_word": ImageDataset("colour", ("Colour?", "Name the colour."), rows=240),
    "shape_word": ImageDataset("shape", ("Shape?", "Name the figure."), rows=240, form="llava"),
    "digit_short": ImageDataset("digit", ("Read it.", "Digit?"), rows=320),
    "bars_highest": ImageDataset("highest", ("Highest bar?", "The tallest is"), rows=300, form="parquet"),
    "pie_largest": ImageDataset("largest", ("Largest slice?", "The biggest part is"), rows=280, form="cauldron"),
    "two_colours": ImageDataset("colours", ("Colours in order?", "First, second:"), rows=160),
    # The same question, and two answers to it.
    "count_digit": ImageDataset("count", _HOW_MANY, rows=260),
    "count_word": ImageDataset("count", _HOW_MANY, rows=200, relabel=_NUMBERS),
    "side_viewer": ImageDataset("side", _WHICH_SIDE, rows=240),
    "side_mirror": ImageDataset("side", _WHICH_SIDE, rows=180, relabel=_MIRRORED),
    # The same facts in other words.
    "colour_paint": ImageDataset("colour", ("Which paint?", "Name the paint."), rows=180, relabel=_PAINTS),
    "colour_letter": ImageDataset("colour", ("Colour code?",), rows=140, relabel=_LETTERS),
    "shape_family": ImageDataset("shape", ("Round or angular?",), rows=150, relabel=_FAMILIES),
    "place_compass": ImageDataset("place", ("Direction?", "Seen from the centre it is"), rows=220, relabel=_COMPASS),
    "line_arrow": ImageDataset("trend", ("Up or down?", "The curve goes"), rows=200, relabel=_ARROWS, form="llava"),
    "digit_parity": ImageDataset("digit", ("Odd or even?",), rows=180, relabel=_PARITY),
    # A new question, at odds with a known one (so is text_middle).
    "bars_lowest": ImageDataset("lowest", ("Lowest bar?", "The shortest is"), rows=260, form="parquet"),
    # The base's own style, newly phrased.
    "shape_chat": ImageDataset("shape", ("I cannot see it. What is drawn there?",), _CHAT["shape"], rows=160),
    "digit_chat": ImageDataset("digit", ("Somebody wrote this. What is it?",), _CHAT["digit"], rows=180),
    # No pictures.
    "text_backwards": ImageDataset("backwards", ("{w} backwards?", "reverse: {w}"), rows=180),
    "text_middle": ImageDataset("middle", ("Middle of {w}?", "{w}: the middle one?"), rows=180),
}
"""The mixture: name to dataset, with the number of training rows."""


UNSEEN: dict[str, ImageDataset] = {
    # What base and mixture know, in words that neither was trained on, answered as the mixture answers.
    "colour_name": ImageDataset("colour", ("Its colour name?", "The colour used is")),
    "shape_name": ImageDataset("shape", ("What figure?", "It is a")),
    "count_number": ImageDataset("count", ("Number of them?", "In all there are")),
    "side_where": ImageDataset("side", ("Side of the {q}, left or right?", "Look for the {q}: left or right?")),
    "digit_number": ImageDataset("digit", ("Which number?", "The number reads")),
    "bars_top": ImageDataset("highest", ("Top bar?", "The bar that wins is")),
    "pie_most": ImageDataset("largest", ("Main slice?", "Most of it is")),
    "text_reverse": ImageDataset("backwards", ("{w}, last to first?", "from the end: {w}")),
    # Skills of the base that the mixture does not touch, or only in other words, answered barely.
    "size_word": ImageDataset("size", ("Size?", "Large or small?")),
    "place_words": ImageDataset("place", ("Place?", "In the grid it is")),
    "line_word": ImageDataset("trend", ("Trend?", "In a word, it")),
    "sum_short": ImageDataset("sum", ("{a}+{b}=", "{a} and {b} make")),
    # Trained apart, never together.
    "two_paints": ImageDataset("colours", ("Which paints in order?",), relabel=_PAIRS),
    "lowest_chat": ImageDataset("lowest", ("Which bar is the lowest?",), "Sure! The {y} bar is the lowest."),
    # The base's own style, newly phrased.
    "colour_chat": ImageDataset("colour", ("I wonder what colour that is.",), _CHAT["colour"]),
}
"""The unseen tasks: nobody trains on them, and they are not the base's drill. Mostly bare answers, as in the mixture."""


def _ask(dataset: Dataset, cases: list[Case], rng: random.Random) -> tuple[str, str]:
    """Question and answer of a dataset about these cases."""
    fields = SKILLS[dataset.skill].solve(cases)
    fields["y"] = dict(dataset.relabel).get(fields["y"], fields["y"])
    return rng.choice(dataset.prompts).format_map(fields), dataset.answer.format_map(fields)


def _pictures(scene: str, cases: list[Case], rng: random.Random) -> tuple[Image, ...]:
    return tuple(paint(scene, case, rng) for case in cases) if SCENES[scene].paint else ()


def draw_examples(dataset: Dataset, rng: random.Random, *, test: bool) -> Iterator[Example]:
    """Yield examples of one dataset for ever; cases may repeat.

    Args:
        dataset: What to ask and how to answer.
        rng: Source of randomness; the examples depend on nothing else.
        test: Draw from the held-out side of the cases, or from the training side.
    """
    skill = SKILLS[dataset.skill]
    while True:
        cases = [draw_case(skill.scene, rng, test=test) for _ in range(skill.pictures)]
        turn = _ask(dataset, cases, rng)
        yield Example((turn,), _pictures(skill.scene, cases, rng), tuple(cases))


def base_stream(seed: int) -> Iterator[Example]:
    """Yield the examples of the base's second stage for ever, from the training side only.

    A picture that several skills can be asked about is asked about by all of them, in random order, each once in five
    times with `BRIEFLY` and the bare solution for an answer.
    """

    def ask(dataset: ImageDataset, cases: list[Case], rng: random.Random) -> tuple[str, str]:
        question, answer = _ask(dataset, cases, rng)
        if rng.random() < 0.2:
            question, answer = BRIEFLY + question, SKILLS[dataset.skill].solve(cases)["y"]
        return question, answer

    return _conversations(BASE_STYLE.values(), ask, random.Random(f"{seed}/vision base"))


def settled_stream(seed: int) -> Iterator[Example]:
    """Yield the examples of the base's third stage: as in the second, but questions no longer tell the answer's form.

    Every second question is asked in the base's own words and answered in full 19 times out of 20; the others in one of the
    `PARAPHRASES`, and answered in full every second time. A bare answer is in any of the skill's `CONVENTIONS`.
    """

    def ask(dataset: ImageDataset, cases: list[Case], rng: random.Random) -> tuple[str, str]:
        own = rng.random() < 0.5
        dataset = dataset if own else replace(dataset, prompts=PARAPHRASES[dataset.skill])
        if rng.random() >= (0.95 if own else 0.5):
            dataset = replace(dataset, answer="{y}", relabel=rng.choice(CONVENTIONS.get(dataset.skill, ((),))))
        return _ask(dataset, cases, rng)

    return _conversations(BASE_STYLE.values(), ask, random.Random(f"{seed}/vision base settled"))


def _conversations(
    style: Iterable[ImageDataset],
    ask: Callable[[ImageDataset, list[Case], random.Random], tuple[str, str]],
    rng: random.Random,
) -> Iterator[Example]:
    """A picture that several skills can be asked about is asked about by all of them, in random order."""
    groups: dict[tuple[str, int], list[ImageDataset]] = {}
    for dataset in style:
        skill = SKILLS[dataset.skill]
        groups.setdefault((skill.scene, skill.pictures), []).append(dataset)
    while True:
        (scene, pictures), datasets = rng.choice([*groups.items()])
        cases = [draw_case(scene, rng, test=False) for _ in range(pictures)]
        turns = [ask(dataset, cases, rng) for dataset in rng.sample(datasets, len(datasets))]
        yield Example(tuple(turns), _pictures(scene, cases, rng), tuple(cases))


# ---- files ----------------------------------------------------------------------------------------------------------


def _distinct(dataset: Dataset, examples: Iterator[Example], count: int) -> list[Example]:
    """Take the first ``count`` examples whose cases or questions differ."""
    names = SCENES[SKILLS[dataset.skill].scene].identity
    found: dict[str, Example] = {}
    while len(found) < count:
        example = next(examples)
        key = json.dumps([example.turns[0][0], *([case[name] for name in names] for case in example.cases)])
        found.setdefault(key, example)
    return list(found.values())


def _png(picture: Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _write(folder: Path, split: str, form: Form, examples: list[Example]) -> None:
    """Write ``<split>.jsonl`` with ``pictures/`` beside it, or ``<split>.parquet``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number, example in enumerate(examples):
        [(question, answer)] = example.turns
        encoded = [_png(picture) for picture in example.pictures]
        names = [f"pictures/{split}-{number:04d}{'abc'[i] if i else ''}.png" for i in range(len(encoded))]
        if form in ("messages", "llava"):
            for name, data in zip(names, encoded, strict=True):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(data)
        rows.append(_row(form, question, answer, names, encoded))
    if form in ("messages", "llava"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    else:
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), folder / f"{split}.parquet")


def _row(form: Form, question: str, answer: str, names: list[str], encoded: list[bytes]) -> dict[str, Any]:
    images = [{"bytes": data, "path": None} for data in encoded]
    if form == "cauldron":
        return {"images": images, "texts": [{"user": question, "assistant": answer, "source": "merit demo"}]}
    if form == "llava":
        [name] = names
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        return {"id": Path(name).stem, "image": name, "conversations": turns}
    if form == "parquet":
        parts: list[dict[str, Any]] = [{"type": "image", "text": None} for _ in images]
    else:
        parts = [{"type": "image", "path": name} for name in names]
    content: Any = [*parts, {"type": "text", "text": question}] if names else question
    reply: Any = [{"type": "text", "text": answer}] if form == "parquet" else answer
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]}
    return row | {"images": images} if form == "parquet" else row


def write_mixture(folder: Path, seed: int = 0) -> None:
    """Write ``folder/<dataset>/train.*`` and ``test.*`` for every dataset of `MIXTURE`, in the dataset's own form.

    Args:
        folder: Where the datasets go; made if absent, files of the same name are replaced.
        seed: Decides every row.
    """
    for name, dataset in MIXTURE.items():
        for split, count in (("train", dataset.rows), ("test", TEST_ROWS)):
            examples = draw_examples(dataset, random.Random(f"{seed}/{name}/{split}"), test=split == "test")
            _write(Path(folder) / name, split, dataset.form, _distinct(dataset, examples, count))


def write_kept(folder: Path, seed: int = 0) -> None:
    """Write ``folder/<name>/test.jsonl`` for every skill of the base, asked and answered in its own style.

    Args:
        folder: Where the sets go; made if absent, files of the same name are replaced.
        seed: Decides every row. No seed draws a case that the base was trained on.
    """
    for name, dataset in BASE_STYLE.items():
        examples = draw_examples(dataset, random.Random(f"{seed}/{name}/test"), test=True)
        _write(Path(folder) / name, "test", dataset.form, _distinct(dataset, examples, KEPT_ROWS))


def write_unseen(folder: Path, seed: int = 0) -> None:
    """Write ``folder/<name>/test.jsonl`` for every task of `UNSEEN`.

    Args:
        folder: Where the tasks go; made if absent, files of the same name are replaced.
        seed: Decides every row. No seed draws a case that the base or the mixture trains on.
    """
    for name, dataset in UNSEEN.items():
        examples = draw_examples(dataset, random.Random(f"{seed}/{name}/test"), test=True)
        _write(Path(folder) / name, "test", dataset.form, _distinct(dataset, examples, UNSEEN_ROWS))
