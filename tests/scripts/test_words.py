"""The demo's data: determinism, disjoint sides, sizes, and answers that are right."""

import json
import random
import zlib
from itertools import islice

import pytest

from demo_data.words import BASE_STYLE, MIXTURE, SKILLS, base_stream, draw_rows, write_mixture
from merit.demo import write_demo


def read(path):
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jsonl"))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo")).parent


def test_the_seed_decides_every_row(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_mixture(tmp_path / name, seed=seed)
    first, same, other = (contents(tmp_path / name) for name in "abc")
    assert first == same
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_there_are_enough_datasets_of_unequal_size(folders):
    sizes = {path.parent.name: len(read(path)) for path in (folders / "mixture").glob("*/train.jsonl")}
    assert sizes == {name: dataset.rows for name, dataset in MIXTURE.items()}
    assert len(sizes) >= 24
    assert max(sizes.values()) >= 4 * min(sizes.values())
    assert len({path.parent.name for path in (folders / "kept").glob("*/test.jsonl")}) == len(BASE_STYLE) == 16


def test_skills_and_styles_differ_as_announced():
    base_skills = {dataset.skill for dataset in BASE_STYLE.values()}
    chatty = {name for name, dataset in MIXTURE.items() if dataset.answer.startswith("Sure!")}
    new = {name for name, dataset in MIXTURE.items() if dataset.skill not in base_skills}
    assert all(dataset.answer.startswith("Sure!") for dataset in BASE_STYLE.values())
    assert len(new) >= 5
    assert 2 <= len(chatty) < len(MIXTURE) / 4
    asked_before = {prompt for dataset in BASE_STYLE.values() for prompt in dataset.prompts}
    asked_now = [prompt for dataset in MIXTURE.values() for prompt in dataset.prompts]
    assert asked_before.isdisjoint(asked_now)
    assert len(set(asked_now)) == len(asked_now)


def test_no_test_prompt_is_a_training_prompt(folders):
    train = {
        messages[0]["content"] for path in (folders / "mixture").glob("*/train.jsonl") for messages in read(path)
    } | {row["messages"][0]["content"] for row in islice(base_stream(0), 20_000)}
    for path in folders.rglob("test.jsonl"):
        prompts = [messages[0]["content"] for messages in read(path)]
        assert len(prompts) == len(set(prompts)) >= 12
        assert train.isdisjoint(prompts), path


def test_no_held_out_case_is_trained_on_in_any_phrasing():
    """The side of a case must not depend on the dataset that asks for it, nor on its answer's wording."""
    for name, dataset in {**MIXTURE, **BASE_STYLE}.items():
        for held_out in (False, True):
            rng, twin = random.Random(name), random.Random(name)
            for row in islice(draw_rows(dataset, rng, held_out=held_out), 40):
                while True:  # follow the same stream by hand
                    case = SKILLS[dataset.skill](twin)
                    key = dataset.skill + json.dumps(dict(sorted((k, v) for k, v in case.items() if k != "y")))
                    if (zlib.crc32(key.encode()) % 8 == 0) == held_out:
                        break
                assert row["messages"][0]["content"] == twin.choice(dataset.prompts).format_map(case)


REFERENCE = {
    "add": lambda c: str(c["a"] + c["b"]),
    "subtract": lambda c: str(c["a"] - c["b"]),
    "compare": lambda c: str(c["a"] if c["a"] > c["b"] else c["b"]),
    "count": lambda c: str(len([x for x in c["w"] if x == c["c"]])),
    "contains": lambda c: "no" if c["w"].find(c["c"]) < 0 else "yes",
    "parity": lambda c: ["even", "odd"][int(str(c["n"])[-1]) % 2],
    "next": lambda c: str(1 + c["n"]),
    "largest": lambda c: sorted(c["t"].split())[-1],
    "smallest": lambda c: sorted(c["t"].split())[0],
    "reverse": lambda c: "".join(reversed(c["w"])),
    "swap": lambda c: "".join([c["w"][-1], *c["w"][1:-1], c["w"][0]]),
    "rotate": lambda c: c["w"].removeprefix(c["w"][0]) + c["w"][0],
    "shift": lambda c: "".join("a" if x == "z" else chr(ord(x) + 1) for x in c["w"]),
    "shift_back": lambda c: "".join("z" if x == "a" else chr(ord(x) - 1) for x in c["w"]),
    "sort": lambda c: "".join(x * c["w"].count(x) for x in map(chr, range(97, 123))),
    "vowels": lambda c: str(len(c["w"]) - len(c["w"].translate(str.maketrans("", "", "aeiou")))),
    "skeleton": lambda c: c["w"].translate(str.maketrans("", "", "aeiou")),
    "stutter": lambda c: "".join(x + x for x in c["w"]),
    "upper": lambda c: c["w"].swapcase(),
    "first": lambda c: c["w"][:1],
    "last": lambda c: c["w"][-1:],
    "length": lambda c: str(sum(1 for _ in c["w"])),
    "repeat": lambda c: c["w"] * 2,
}


@pytest.mark.parametrize("skill", sorted(SKILLS))
def test_solutions_are_right(skill):
    rng = random.Random(skill)
    for _ in range(200):
        case = SKILLS[skill](rng)
        assert case["y"] == REFERENCE[skill](case), case
