"""The demo's data: determinism, disjoint sides, sizes, and answers that are right."""

import json
import random
import re
import zlib
from itertools import islice

import pytest

from demo_data.words import (
    BASE_STYLE,
    MIXTURE,
    PARAPHRASES,
    RARE,
    SKILLS,
    UNSEEN,
    base_stream,
    draw_rows,
    settled_stream,
    write_mixture,
)
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
    assert {path.parent.name for path in (folders / "unseen").glob("*/test.jsonl")} == set(UNSEEN)
    assert len(UNSEEN) >= 12, "with fewer no difference is called"


def test_skills_and_styles_differ_as_announced():
    base_skills = {dataset.skill for dataset in BASE_STYLE.values()}
    chatty = {name for name, dataset in MIXTURE.items() if dataset.answer.startswith("Sure!")}
    new = {name for name, dataset in MIXTURE.items() if dataset.skill not in base_skills}
    assert all(dataset.answer.startswith("Sure!") for dataset in BASE_STYLE.values())
    assert len(new) >= 5
    assert 2 <= len(chatty) < len(MIXTURE) / 4
    asked = (
        [d.prompts for d in (*BASE_STYLE.values(), *MIXTURE.values(), *UNSEEN.values())]
        + [*PARAPHRASES.values()]
        + [d.prompts for d in RARE.values()]
    )
    every = [prompt for prompts in asked for prompt in prompts]
    assert len(set(every)) == len(every), "base, mixture and unseen tasks share no phrasing"
    assert set(RARE) == {d.skill for d in MIXTURE.values()} - base_skills


def test_unseen_tasks_are_neither_the_mixture_nor_the_drill_of_the_base():
    trained = {(dataset.skill, dataset.answer, dataset.relabel) for dataset in MIXTURE.values()}
    skills = {dataset.skill for dataset in (*MIXTURE.values(), *BASE_STYLE.values())}
    new = {name for name, d in UNSEEN.items() if (d.skill, d.answer, d.relabel) not in trained}
    assert len(new) >= 5, "combinations that no dataset of the mixture has"
    assert all(dataset.skill in skills for dataset in UNSEEN.values()), "no task is out of reach"
    chatty = {name for name, dataset in UNSEEN.items() if dataset.answer.startswith("Sure!")}
    assert 2 <= len(chatty) <= len(UNSEEN) / 4


def test_the_base_knows_both_ways_of_answering_and_which_is_its_own():
    rows = [row["messages"] for row in islice(settled_stream(4), 3000)]
    full = [answer["content"].startswith("Sure! ") for _, answer in rows]
    assert not any(question["content"].startswith("Briefly") for question, _ in rows)
    own = [said for i, said in enumerate(full) if i % 9 in (0, 2, 4, 6)]
    others = [said for i, said in enumerate(full) if i % 9 in (1, 3, 5, 7)]
    assert 0.93 < sum(own) / len(own) < 0.97
    assert 0.45 < sum(others) / len(others) < 0.55
    patterns = [re.escape(p) for d in BASE_STYLE.values() for p in d.prompts]
    drill = re.compile("|".join(re.sub(r"\\{[a-z]\\}", r"[a-z0-9 ]+", pattern) for pattern in patterns))
    assert all(drill.fullmatch(question["content"]) for i, (question, _) in enumerate(rows) if i % 9 in (0, 2, 4, 6))


def test_no_test_prompt_is_a_training_prompt(folders):
    train = {
        messages[0]["content"] for path in (folders / "mixture").glob("*/train.jsonl") for messages in read(path)
    } | {row["messages"][0]["content"] for stream in (base_stream, settled_stream) for row in islice(stream(0), 10_000)}
    for path in folders.rglob("test.jsonl"):
        prompts = [messages[0]["content"] for messages in read(path)]
        assert len(prompts) == len(set(prompts)) >= 12
        assert train.isdisjoint(prompts), path


def test_no_held_out_case_is_trained_on_in_any_phrasing():
    """The side of a case must not depend on the dataset that asks for it, nor on its answer's wording."""
    for name, dataset in {**MIXTURE, **BASE_STYLE, **UNSEEN}.items():
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
