"""The vision demo's generated data: determinism, disjoint sides, forms, and answers that the pixels confirm."""

import io
import json
import random
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from scipy import ndimage
from sklearn.datasets import load_digits

from demo_data.pictures import (
    BASE_STYLE,
    MIXTURE,
    PARAPHRASES,
    SKILLS,
    UNSEEN,
    base_stream,
    draw_examples,
    settled_stream,
    write_kept,
)
from demo_data.scenes import COLOURS, SCENES, SHAPES, SIZE, draw_case, held_out, paint
from merit.demo import write_demo

# ---- reading the files back -----------------------------------------------------------------------------------------


def rows_of(folder, split):
    """(pictures, question, answer) of one dataset, read without the package's own readers."""
    if (file := folder / f"{split}.jsonl").exists():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        rows = parquet.read_table(folder / f"{split}.parquet").to_pylist()
    for row in rows:
        if "texts" in row:
            [turn] = row["texts"]
            yield [image["bytes"] for image in row["images"]], turn["user"], turn["assistant"]
        elif "conversations" in row:
            human, gpt = (turn["value"] for turn in row["conversations"])
            assert human.startswith("<image>\n")
            yield [(folder / row["image"]).read_bytes()], human.removeprefix("<image>\n"), gpt
        else:
            question, answer = (turn["content"] for turn in row["messages"])
            parts = [{"type": "text", "text": question}] if isinstance(question, str) else question
            answer = answer if isinstance(answer, str) else answer[0]["text"]
            paths = [part["path"] for part in parts if "path" in part]
            images = [(folder / path).read_bytes() for path in paths] or [i["bytes"] for i in row.get("images", [])]
            assert [part["type"] for part in parts] == ["image"] * len(images) + ["text"]
            yield images, parts[-1]["text"], answer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("vision"), vision=True).parent


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_seed_decides_every_byte(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_kept(tmp_path / name, seed=seed)
    first, same, other = (everything(tmp_path / name) for name in "abc")
    assert first == same
    assert first.keys() == other.keys()
    questions = {name for name in first if name.endswith(".jsonl")}
    assert all(first[name] != other[name] for name in first.keys() - questions)


def test_there_are_enough_datasets_in_every_form(root):
    sizes = {name: len(list(rows_of(root / "mixture" / name, "train"))) for name in MIXTURE}
    assert sizes == {name: dataset.rows for name, dataset in MIXTURE.items()}
    assert {path.name for path in (root / "mixture").iterdir()} == set(MIXTURE)
    with_pictures = [d for d in MIXTURE.values() if SCENES[SKILLS[d.skill].scene].paint]
    assert len(with_pictures) >= 14
    assert 1 <= len(MIXTURE) - len(with_pictures) <= 3
    assert {d.form for d in with_pictures} == {"messages", "llava", "cauldron", "parquet"}
    assert any(SKILLS[d.skill].pictures == 2 for d in with_pictures)


def test_no_picture_and_no_case_stands_on_both_sides(root):
    train = Counter()
    for name in MIXTURE:
        for images, question, _ in rows_of(root / "mixture" / name, "train"):
            train.update(images or [question])
    tests = [
        (name, row)
        for kind in ("mixture", "kept", "unseen")
        for name in (root / kind).iterdir()
        for row in rows_of(name, "test")
    ]
    assert len(tests) == 16 * (len(MIXTURE) + len(BASE_STYLE) + len(UNSEEN))
    for name, (images, question, _) in tests:
        assert not any(train[key] for key in images or [question]), (name, question)
    for dataset in [*MIXTURE.values(), *BASE_STYLE.values(), *UNSEEN.values()]:
        scene = SKILLS[dataset.skill].scene
        for test in (False, True):
            for example in islice(draw_examples(dataset, random.Random(7), test=test), 20):
                assert all(held_out(scene, case) == test for case in example.cases)
    for example in islice(base_stream(0), 500):
        [scene] = {SKILLS[d.skill].scene for d in BASE_STYLE.values() if _asks(d, example)}
        assert not any(held_out(scene, case) for case in example.cases)
    for example in islice(settled_stream(0), 500):
        keys = set(example.cases[0])
        [scene] = [scene for scene in SCENES if keys == set(draw_case(scene, random.Random(0), test=False))]
        assert not any(held_out(scene, case) for case in example.cases)


def _asks(dataset, example):
    skill = SKILLS[dataset.skill]
    if len(example.cases) != skill.pictures or set(example.cases[0]) != set(
        draw_case(skill.scene, random.Random(0), test=False)
    ):
        return False
    fields = skill.solve(list(example.cases))
    asked = {prompt.format_map(fields) for prompt in dataset.prompts}
    return any(question.removeprefix("Briefly: ") in asked for question, _ in example.turns)


def test_a_share_of_one_eighth_is_held_out_and_identity_decides():
    for scene in SCENES:
        rng = random.Random(scene)
        cases = [SCENES[scene].draw(rng) for _ in range(1500)]
        share = sum(held_out(scene, case) for case in cases) / len(cases)
        assert 0.06 < share < 0.2, scene
        for case in cases[:20]:
            varied = {k: v if k in SCENES[scene].identity else "anything" for k, v in case.items()}
            assert held_out(scene, varied) == held_out(scene, case)


def test_conventions_pull_apart():
    """Some datasets ask the very same questions and want other answers; the base's own words are asked by none."""
    prompts = {name: set(dataset.prompts) for name, dataset in MIXTURE.items()}
    assert prompts["count_digit"] == prompts["count_word"]
    assert prompts["side_viewer"] == prompts["side_mirror"]
    rng, twin = random.Random(0), random.Random(0)
    for one, other in (("count_digit", "count_word"), ("side_viewer", "side_mirror")):
        a = next(draw_examples(MIXTURE[one], rng, test=False))
        b = next(draw_examples(MIXTURE[other], twin, test=False))
        assert (a.turns[0][0], a.pictures) == (b.turns[0][0], b.pictures)
        assert a.turns[0][1] != b.turns[0][1]
    asked_before = {prompt for dataset in BASE_STYLE.values() for prompt in dataset.prompts}
    asked_before |= {prompt for asked in PARAPHRASES.values() for prompt in asked}
    asked_now = {prompt for asked in prompts.values() for prompt in asked}
    unseen = {prompt for dataset in UNSEEN.values() for prompt in dataset.prompts}
    assert len(asked_before | asked_now | unseen) == len(asked_before) + len(asked_now) + len(unseen)
    assert len(UNSEEN) >= 12, "with fewer no difference is called"
    chatty = [name for name, dataset in MIXTURE.items() if dataset.answer.startswith("Sure! ")]
    assert 1 <= len(chatty) <= 3
    assert all(dataset.answer.startswith("Sure! ") for dataset in BASE_STYLE.values())


# ---- what the pixels say --------------------------------------------------------------------------------------------


def pixels_of(data):
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG"
    assert picture.mode == "RGB"
    assert picture.size == (SIZE, SIZE)
    return np.asarray(picture, dtype=np.int64)


def coloured(pixels):
    """Where something stands that is not grey."""
    return pixels.max(2) - pixels.min(2) > 45


def areas(pixels):
    """Colour name to the mask of its pure pixels, for the colours that are there."""
    masks = {name: np.abs(pixels - rgb).max(2) <= 12 for name, rgb in COLOURS.items()}
    return {name: mask for name, mask in masks.items() if mask.sum() >= 4}


def largest(values):
    return max(values, key=values.get)


def the_colour(pixels):
    return largest({name: mask.sum() for name, mask in areas(pixels).items()})


def shape_in(pixels):
    """The one shape in these pixels, from its moments: how it fills its frame, how far it spreads, how lopsided it is."""
    background = pixels[0, 0]
    pure = np.array(COLOURS[the_colour(pixels)])
    cover = np.clip(((pixels - background) @ (pure - background)) / ((pure - background) ** 2).sum(), 0, 1)
    area = cover.sum()
    y, x = np.mgrid[:SIZE, :SIZE]
    dy, dx = y - (cover * y).sum() / area, x - (cover * x).sum() / area
    spread = (cover * (dy**2 + dx**2)).sum() / area**2
    lopsided = (cover * dy**3).sum() / area / ((cover * dy**2).sum() / area) ** 1.5
    if spread > 0.25:
        return "ring"
    if lopsided < -0.3:
        return "triangle"
    if spread < 0.178:
        return "square" if area / (cover.max(0).sum() * cover.max(1).sum()) > 0.9 else "circle"
    return "cross" if spread < 0.201 else "star"


def pieces(pixels):
    labels, count = ndimage.label(coloured(pixels))
    return [labels == i + 1 for i in range(count) if (labels == i + 1).sum() >= 6]


def alone(pixels, piece):
    """The pixels with everything but one piece painted over."""
    left = pixels.copy()
    left[~ndimage.binary_dilation(piece, iterations=2)] = pixels[0, 0]
    return left


def cell_in(pixels):
    y, x = ndimage.center_of_mass(coloured(pixels))
    return 3 * int(y // 16) + int(x // 16)


def side_of(pixels, question):
    asked = [shape for shape in SHAPES if shape in question]
    found = {shape_in(alone(pixels, piece)): ndimage.center_of_mass(piece)[1] for piece in pieces(pixels)}
    assert len(asked) == 1
    assert len(found) == 2
    return "left" if found[asked[0]] == min(found.values()) else "right"


def bar_heights(pixels):
    return {name: np.ptp(np.nonzero(mask)[0]) + 1 for name, mask in areas(pixels).items()}


def line_in(pixels):
    mask = coloured(pixels)
    columns = np.nonzero(mask.any(0))[0]
    height = [SIZE - np.nonzero(mask[:, c])[0].mean() for c in columns]
    first, last, top, bottom = height[0], height[-1], max(height), min(height)
    if max(first, last) < top - 3:
        return "peaks"
    if min(first, last) > bottom + 3:
        return "dips"
    return "rises" if last > first else "falls"


PLACES = ["top left", "top middle", "top right", "middle left", "centre", "middle right", "bottom left", "bottom middle",
          "bottom right"]  # fmt: skip
COMPASS = ["northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast"]
PAINTS = {"red": "crimson", "orange": "amber", "yellow": "gold", "green": "emerald", "cyan": "teal", "blue": "navy",
          "purple": "violet"}  # fmt: skip
COUNTS = ["none", "one", "two", "three", "four", "five", "six"]
ARROWS = {"rises": "up", "falls": "down", "peaks": "up, then down", "dips": "down, then up"}
NAMES = "|".join([*COLOURS, *SHAPES])
MIRROR = {"left": "right", "right": "left"}

ANSWERS = {
    "colour_word": lambda p, q: the_colour(p[0]),
    "colour_paint": lambda p, q: PAINTS[the_colour(p[0])],
    "colour_letter": lambda p, q: the_colour(p[0])[0].upper(),
    "shape_word": lambda p, q: shape_in(p[0]),
    "shape_chat": lambda p, q: f"Sure! The shape is a {shape_in(p[0])}.",
    "shape_family": lambda p, q: "round" if shape_in(p[0]) in ("circle", "ring") else "angular",
    "place_compass": lambda p, q: COMPASS[cell_in(p[0])],
    "count_digit": lambda p, q: str(len(pieces(p[0]))),
    "count_word": lambda p, q: COUNTS[len(pieces(p[0]))],
    "side_viewer": lambda p, q: side_of(p[0], q),
    "side_mirror": lambda p, q: MIRROR[side_of(p[0], q)],
    "bars_highest": lambda p, q: largest(bar_heights(p[0])),
    "bars_lowest": lambda p, q: largest({name: -h for name, h in bar_heights(p[0]).items()}),
    "pie_largest": lambda p, q: largest({name: mask.sum() for name, mask in areas(p[0]).items()}),
    "line_arrow": lambda p, q: ARROWS[line_in(p[0])],
    "two_colours": lambda p, q: " ".join(map(the_colour, p)),
    "text_backwards": lambda p, q: " ".join(q.replace("reverse: ", "").replace(" backwards?", "").split()[::-1]),
    "text_middle": lambda p, q: q.replace("Middle of ", "").replace(": the middle one", "").rstrip("?").split()[1],
    "kept_colour": lambda p, q: f"Sure! The shape is {the_colour(p[0])}.",
    "kept_shape": lambda p, q: f"Sure! The shape is a {shape_in(p[0])}.",
    "kept_size": lambda p, q: (
        f"Sure! The size is {'large' if np.ptp(np.nonzero(coloured(p[0]))[1]) > 10 else 'small'}."
    ),
    "kept_place": lambda p, q: f"Sure! It is at the {PLACES[cell_in(p[0])]}.",
    "kept_count": lambda p, q: f"Sure! I count {len(pieces(p[0]))} shapes.",
    "kept_side": lambda p, q: f"Sure! The {next(s for s in SHAPES if s in q)} is on the {side_of(p[0], q)}.",
    "kept_highest": lambda p, q: f"Sure! The {largest(bar_heights(p[0]))} bar is the highest.",
    "kept_largest": lambda p, q: (
        f"Sure! The {largest({n: m.sum() for n, m in areas(p[0]).items()})} slice is the largest."
    ),
    "kept_trend": lambda p, q: f"Sure! The line {line_in(p[0])}.",
    "kept_backwards": lambda p, q: f"Sure! Backwards it is {' '.join(re.findall(NAMES, q)[::-1])}.",
    "kept_sum": lambda p, q: f"Sure! The sum is {sum(map(int, re.findall('[0-9]+', q)))}.",
    "kept_colours": lambda p, q: f"Sure! The first is {the_colour(p[0])} and the second is {the_colour(p[1])}.",
    "colour_name": lambda p, q: the_colour(p[0]),
    "shape_name": lambda p, q: shape_in(p[0]),
    "count_number": lambda p, q: str(len(pieces(p[0]))),
    "side_where": lambda p, q: side_of(p[0], q),
    "bars_top": lambda p, q: largest(bar_heights(p[0])),
    "pie_most": lambda p, q: largest({n: m.sum() for n, m in areas(p[0]).items()}),
    "text_reverse": lambda p, q: " ".join(re.findall(NAMES, q)[::-1]),
    "size_word": lambda p, q: "large" if np.ptp(np.nonzero(coloured(p[0]))[1]) > 10 else "small",
    "place_words": lambda p, q: PLACES[cell_in(p[0])],
    "line_word": lambda p, q: line_in(p[0]),
    "sum_short": lambda p, q: str(sum(map(int, re.findall("[0-9]+", q)))),
    "two_paints": lambda p, q: " ".join(PAINTS[the_colour(picture)] for picture in p),
    "lowest_chat": lambda p, q: (
        f"Sure! The {largest({n: -h for n, h in bar_heights(p[0]).items()})} bar is the lowest."
    ),
    "colour_chat": lambda p, q: f"Sure! The shape is {the_colour(p[0])}.",
}
DIGITS = {
    "digit_short": lambda digit: str(digit),
    "digit_parity": lambda digit: ["even", "odd"][digit & 1],
    "digit_chat": lambda digit: f"Sure! The digit is {digit}.",
    "kept_digit": lambda digit: f"Sure! The digit is {digit}.",
    "digit_number": lambda digit: str(digit),
}


def test_every_dataset_is_checked():
    assert set(ANSWERS) | set(DIGITS) == {*MIXTURE, *BASE_STYLE, *UNSEEN}


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_the_pixels_confirm_the_answers(root, name):
    kind = "kept" if name in BASE_STYLE else "unseen" if name in UNSEEN else "mixture"
    splits = ("train", "test") if kind == "mixture" else ("test",)
    for split in splits:
        for images, question, answer in islice(rows_of(root / kind / name, split), 80):
            found = ANSWERS[name]([pixels_of(image) for image in images], question)
            assert found == answer, (name, split, question)


def test_the_digits_are_the_real_ones():
    """A painted digit, scaled back, is nearest to a real one of the same class, and mostly to itself."""
    real = load_digits()
    rng = random.Random(0)
    right = []
    for _ in range(60):
        case = draw_case("digit", rng, test=rng.random() < 0.5)
        assert case["digit"] == real.target[case["index"]]
        pixels = np.asarray(paint("digit", case, rng), dtype=np.float64)
        ink, grey = np.array(COLOURS[case["colour"]]), pixels[0, 0]
        cover = np.clip(((pixels - grey) @ (ink - grey)) / ((ink - grey) ** 2).sum(), 0, 1)
        best = []
        for side in (40, 43, 45):  # its size and place vary a little
            room = SIZE - side
            for left in {room // 4, room // 2, room - room // 4}:
                for top in {room // 4, room // 2, room - room // 4}:
                    cut = Image.fromarray(np.uint8(255 * cover[top : top + side, left : left + side])).resize((8, 8))
                    gaps = ((np.asarray(cut) / 255 - np.minimum(real.images * 20 / 255, 1)) ** 2).sum((1, 2))
                    best.append((gaps.min(), int(gaps.argmin())))
        right.append(real.target[min(best)[1]] == case["digit"])
    assert np.mean(right) > 0.9


@pytest.mark.parametrize("name", sorted(DIGITS))
def test_the_digits_are_named_as_their_writers_meant_them(name):
    meant = load_digits().target
    for example in islice(draw_examples({**MIXTURE, **BASE_STYLE, **UNSEEN}[name], random.Random(5), test=False), 60):
        assert example.turns[0][1] == DIGITS[name](int(meant[example.cases[0]["index"]]))


def test_briefly_gets_the_bare_solution():
    brief = full = 0
    for example in islice(base_stream(4), 600):
        for question, answer in example.turns:
            brief += question.startswith("Briefly: ")
            full += answer.startswith("Sure! ")
            assert question.startswith("Briefly: ") != answer.startswith("Sure! ")
    assert 0.12 < brief / (brief + full) < 0.28


def test_the_base_knows_every_convention_and_which_answer_is_its_own():
    own = {prompt for dataset in BASE_STYLE.values() for prompt in dataset.prompts if "{" not in prompt}
    others = {prompt for asked in PARAPHRASES.values() for prompt in asked}
    full = {True: [], False: []}
    bare = {}
    questions = [turn for example in islice(settled_stream(4), 1500) for turn in example.turns]
    for question, answer in questions:
        assert not question.startswith("Briefly")
        if question in own or question in others:
            full[question in own].append(answer.startswith("Sure! "))
        if not answer.startswith("Sure! "):
            bare[answer] = bare.get(answer, 0) + 1
    assert 0.92 < sum(full[True]) / len(full[True]) < 0.98
    assert 0.44 < sum(full[False]) / len(full[False]) < 0.56
    for convention in ("red", "crimson", "R", "angular", "northwest", "three", "odd", "up, then down"):
        assert convention in bare
