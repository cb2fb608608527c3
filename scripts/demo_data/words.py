"""The demo's data: procedural skills, asked in several phrasings and answered in several styles.

A *skill* draws arguments and solves them (reverse a word, add two numbers). The base was pretrained on sixteen skills,
each answered by a full friendly sentence, now and then barely, above all when asked in other words. The mixture asks
mostly for bare short answers to the same skills, holds some datasets in the base's own style and some skills that the
base has only met. So skills and styles pull in different directions, and a run can show what it learned (the mixture's test
rows), what it lost (the kept sets) and what carries over (the unseen tasks: other phrasings, and combinations that nobody
trains on).

Every case of a skill belongs for good to the training or to the held-out side, by a hash of its arguments: no held-out
case was ever trained on, in any phrasing, by the base or by the mixture. Everything follows from the seed.

It needs the standard library only.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = [
    "BASE_STYLE",
    "MIXTURE",
    "PARAPHRASES",
    "RARE",
    "SKILLS",
    "UNSEEN",
    "Dataset",
    "Row",
    "base_stream",
    "draw_rows",
    "settled_stream",
    "wide_stream",
    "write_kept",
    "write_mixture",
    "write_unseen",
]

Case = dict[str, Any]
Row = dict[str, list[dict[str, str]]]

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
HELD_OUT_SHARE = 8  # one case in eight is held out
BRIEFLY = "Briefly: "
TEST_ROWS = 16
KEPT_ROWS = 16
UNSEEN_ROWS = 16


def _word(rng: random.Random, shortest: int, longest: int) -> str:
    """Draw a word whose letters alternate between consonants and vowels, now and then repeating one."""
    length = rng.randint(shortest, longest)
    vowel_first = rng.random() < 0.5
    pools = (VOWELS, "bcdfghklmnprst") if vowel_first else ("bcdfghklmnprst", VOWELS)
    return "".join(rng.choice(pools[i % 2]) for i in range(length))


def _shift(word: str, by: int) -> str:
    return "".join(ALPHABET[(ALPHABET.index(letter) + by) % 26] for letter in word)


def _word_case(solve: Callable[[str], str], shortest: int = 3, longest: int = 5) -> Callable[[random.Random], Case]:
    def draw(rng: random.Random) -> Case:
        word = _word(rng, shortest, longest)
        return {"w": word, "y": solve(word)}

    return draw


def _letter_case(solve: Callable[[str, str], str]) -> Callable[[random.Random], Case]:
    def draw(rng: random.Random) -> Case:
        word = _word(rng, 4, 6)
        letter = rng.choice(word if rng.random() < 0.6 else ALPHABET)
        return {"w": word, "c": letter, "y": solve(word, letter)}

    return draw


def _number_case(solve: Callable[[int], str]) -> Callable[[random.Random], Case]:
    def draw(rng: random.Random) -> Case:
        number = rng.randint(0, 998)
        return {"n": number, "y": solve(number)}

    return draw


def _pair_case(solve: Callable[[int, int], str], most: int, ordered: bool = False) -> Callable[[random.Random], Case]:
    def draw(rng: random.Random) -> Case:
        a, b = rng.sample(range(most + 1), 2)
        if ordered and a < b:
            a, b = b, a
        return {"a": a, "b": b, "y": solve(a, b)}

    return draw


def _triple_case(solve: Callable[[list[int]], int]) -> Callable[[random.Random], Case]:
    def draw(rng: random.Random) -> Case:
        digits = [rng.randint(0, 9) for _ in range(3)]
        return {"t": " ".join(map(str, digits)), "y": str(solve(digits))}

    return draw


SKILLS: dict[str, Callable[[random.Random], Case]] = {
    # The sixteen that the base knows.
    "reverse": _word_case(lambda w: w[::-1]),
    "sort": _word_case(lambda w: "".join(sorted(w)), 3, 4),
    "count": _letter_case(lambda w, c: str(w.count(c))),
    "add": _pair_case(lambda a, b: str(a + b), 49),
    "compare": _pair_case(lambda a, b: str(max(a, b)), 99),
    "parity": _number_case(lambda n: "odd" if n % 2 else "even"),
    "shift": _word_case(lambda w: _shift(w, 1), 3, 4),
    "largest": _triple_case(max),
    "vowels": _word_case(lambda w: str(sum(letter in VOWELS for letter in w)), 3, 6),
    "upper": _word_case(str.upper),
    "first": _word_case(lambda w: w[0]),
    "last": _word_case(lambda w: w[-1]),
    "length": _word_case(lambda w: str(len(w)), 2, 7),
    "next": _number_case(lambda n: str(n + 1)),
    "contains": _letter_case(lambda w, c: "yes" if c in w else "no"),
    "repeat": _word_case(lambda w: w + w, 3, 4),
    # Those that the mixture teaches; the base has met them.
    "swap": _word_case(lambda w: w[-1] + w[1:-1] + w[0]),
    "skeleton": _word_case(lambda w: "".join(letter for letter in w if letter not in VOWELS), 3, 6),
    "subtract": _pair_case(lambda a, b: str(a - b), 49, ordered=True),
    "smallest": _triple_case(min),
    "shift_back": _word_case(lambda w: _shift(w, -1), 3, 4),
    "stutter": _word_case(lambda w: "".join(letter * 2 for letter in w), 2, 4),
    "rotate": _word_case(lambda w: w[1:] + w[0]),
}


@dataclass(frozen=True)
class Dataset:
    """How one dataset asks and answers one skill.

    Attributes:
        skill: A key of `SKILLS`.
        prompts: Phrasings of the question; each row uses one, drawn at random. ``{w}``, ``{c}``, ``{n}``, ``{a}``,
            ``{b}``, ``{t}`` are the case's arguments.
        answer: Phrasing of the answer; ``{y}`` is the solution.
        rows: Number of training rows (0 where it has none).
        relabel: The words that this dataset uses in place of the solution's, where they differ.
    """

    skill: str
    prompts: tuple[str, ...]
    answer: str = "{y}"
    rows: int = 0
    relabel: tuple[tuple[str, str], ...] = ()


BASE_STYLE: dict[str, Dataset] = {
    f"kept_{skill}": Dataset(skill, tuple(prompts.split(" | ")), "Sure! " + answer)
    for skill, prompts, answer in (
        (
            "reverse",
            "Please reverse the word {w}. | Can you spell {w} backwards? | Turn {w} around. | the reverse of {w}?",
            "The reverse of {w} is {y}.",
        ),
        (
            "sort",
            "Please sort the letters of {w}. | Can you put {w} in order? | Order the letters {w}. | {w} in order?",
            "{w} in order is {y}.",
        ),
        (
            "count",
            "How many {c} are in {w}? | Count the letter {c} in {w}. | How often is {c} in {w}? | number of {c} in {w}?",
            "In {w} the letter {c} occurs {y} times.",
        ),
        (
            "add",
            "What is {a} plus {b}? | Please add {a} and {b}. | Sum up {a} and {b}. | {a} and {b} together?",
            "The sum of {a} and {b} is {y}.",
        ),
        (
            "compare",
            "Which is larger, {a} or {b}? | Compare {a} with {b}. | Pick the bigger of {a} and {b}. | more: {a} or {b}?",
            "Of {a} and {b} the larger is {y}.",
        ),
        (
            "parity",
            "Is {n} odd or even? | Tell me the parity of {n}. | Odd or even: {n}? | parity of {n}?",
            "The number {n} is {y}.",
        ),
        (
            "shift",
            "Move each letter of {w} one up. | Please shift {w} by one. | Shift the word {w} up. | {w} shifted?",
            "{w} shifted by one is {y}.",
        ),
        (
            "largest",
            "What is the largest of {t}? | Find the maximum of {t}. | Which of {t} is largest? | biggest of {t}?",
            "The largest of {t} is {y}.",
        ),
        (
            "vowels",
            "How many vowels has {w}? | Count the vowels in {w}. | Number of vowels in {w}? | {w}, how many vowels?",
            "The word {w} has {y} vowels.",
        ),
        (
            "upper",
            "Write {w} in capitals. | Please capitalise {w}. | Make {w} upper case. | capitals for {w}?",
            "In capitals {w} is {y}.",
        ),
        (
            "first",
            "How does {w} begin? | Name the first letter of {w}. | What does {w} start with? | start of {w}?",
            "The word {w} begins with {y}.",
        ),
        (
            "last",
            "How does {w} end? | Name the last letter of {w}. | What does {w} end with? | end of {w}?",
            "The word {w} ends with {y}.",
        ),
        (
            "length",
            "How long is the word {w}? | Count the letters of {w}. | How many letters has {w}? | length of {w}?",
            "The word {w} has {y} letters.",
        ),
        (
            "next",
            "What comes after {n}? | Name the number after {n}. | Count on from {n}. | one more than {n}?",
            "The number after {n} is {y}.",
        ),
        (
            "contains",
            "Does {w} contain {c}? | Can you find {c} in {w}? | Is there a {c} in {w}? | {w} with {c}?",
            "Is {c} in {w}? The answer is {y}.",
        ),
        (
            "repeat",
            "Please say {w} twice. | Can you repeat {w}? | Write {w} two times. | {w} twice?",
            "{w} said twice is {y}.",
        ),
    )
}
"""What the base does unless told otherwise, and what the kept sets ask: full sentences only."""

_CHAT = {dataset.skill: dataset.answer for dataset in BASE_STYLE.values()}

PARAPHRASES: dict[str, tuple[str, ...]] = {
    skill: tuple(prompts.split(" | "))
    for skill, prompts in {
        "reverse": "{w} from back to front? | Mirror {w}. | Say {w} from its end. | Flip the word {w}.",
        "sort": "{w} by alphabet? | Arrange the letters of {w}. | Line up the letters of {w}. | Tidy {w} from a to z.",
        "count": "{c} in {w}, how often? | Tell me how many {c} {w} has. | {w}: how many {c}? | {w} has how many {c}?",
        "add": "How much are {a} and {b}? | {a} with {b} added? | Put {a} and {b} together. | plus: {a} {b}",
        "compare": "{a} or {b}, which is bigger? | Name the larger: {a}, {b}. | bigger: {a} {b}? | Is {a} or {b} larger?",
        "parity": "{n}, odd or even? | What is {n}, odd or even? | Say whether {n} is odd or even. | {n} is odd or even?",
        "shift": "{w} one letter up? | Push {w} up by one. | Step each letter of {w} up. | up by one: {w}",
        "largest": "{t}: which is largest? | Largest in {t}? | maximum of {t} | Of {t}, name the largest.",
        "vowels": "{w}: how many vowels? | Tell me the vowels of {w}, how many? | vowel count of {w} "
        "| How many vowels in {w}?",
        "upper": "{w} as capitals? | Turn {w} into capitals. | upper case of {w} | Give {w} in big letters.",
        "first": "{w} starts with? | Which letter opens {w}? | Tell me how {w} starts. | first of {w}?",
        "last": "{w} stops with? | Which letter closes {w}? | Tell me how {w} ends. | last of {w}?",
        "length": "{w}: how many letters? | Tell me the length of {w}. | How many letters are in {w}? | {w} is how long?",
        "next": "{n} and one more? | Which number follows {n}? | {n}, what comes next? | Go one up from {n}.",
        "contains": "{w}: any {c}? | Is {c} part of {w}? | Tell me if {w} has {c}. | {c} inside {w}?",
        "repeat": "{w} two times? | Say {w} again and again. | Twice {w}, please. | Put {w} twice.",
    }.items()
}
"""More ways to ask for the same skills; only the base's last stages use them, no mixture and no evaluation does."""

RARE: dict[str, Dataset] = {
    skill: Dataset(skill, tuple(prompts.split(" | ")), "Sure! It is {y}.")
    for skill, prompts in {
        "swap": "Exchange the outer letters of {w}. | {w} with its ends exchanged?",
        "skeleton": "Strike the vowels from {w}. | Write {w} bare of a, e, i, o and u.",
        "subtract": "From {a}, {b} is gone. What stays? | How far is it from {b} to {a}?",
        "smallest": "Which of {t} is least? | Name the lowest in {t}.",
        "shift_back": "Step each letter of {w} down. | down by one: {w}",
        "stutter": "Say every letter of {w} two times. | {w} with twin letters?",
        "rotate": "Put the front letter of {w} last. | {w} turned by one?",
    }.items()
}
"""What the base has met a few times in its last stage, and cannot do: the mixture's other skills, in words of their own."""

MIXTURE: dict[str, Dataset] = {
    # Skills that the base knows, answered briefly.
    "add_short": Dataset("add", ("{a} plus {b}?", "add {a} and {b}"), rows=720),
    "add_equation": Dataset("add", ("{a}+{b}=", "{a} + {b} = ?"), rows=420),
    "compare_short": Dataset("compare", ("larger: {a} or {b}?", "Which is more, {a} or {b}?"), rows=360),
    "contains_short": Dataset("contains", ("Is {c} in {w}?", "does {w} have {c}?"), rows=300),
    "contains_label": Dataset(
        "contains", ("{w} has {c}: true or false?",), rows=180, relabel=(("yes", "true"), ("no", "false"))
    ),
    "count_short": Dataset("count", ("how many {c} in {w}?", "Count {c} in {w}."), rows=420),
    "first_short": Dataset("first", ("First letter of {w}?", "{w} begins with"), rows=150),
    "largest_short": Dataset("largest", ("max of {t}", "What is the largest: {t}?"), rows=300),
    "last_short": Dataset("last", ("Last letter of {w}?", "{w} ends with"), rows=160),
    "length_short": Dataset("length", ("How long is {w}?", "letters in {w}?"), rows=240),
    "next_short": Dataset("next", ("next after {n}?", "What follows {n}?"), rows=200),
    "parity_short": Dataset("parity", ("{n}: odd or even?", "Is {n} even or odd?"), rows=260),
    "parity_yesno": Dataset("parity", ("Is {n} even?",), rows=180, relabel=(("even", "yes"), ("odd", "no"))),
    "reverse_short": Dataset("reverse", ("reverse {w}", "What is {w} backwards?"), rows=640),
    "reverse_capitals": Dataset("reverse", ("{w} backwards in capitals?",), "{Y}", rows=170),
    "shift_short": Dataset("shift", ("shift {w} by one", "Which word is {w} shifted up?"), rows=340),
    "sort_short": Dataset("sort", ("sort {w}", "What are the letters of {w} in order?"), rows=480),
    "upper_short": Dataset("upper", ("{w} in capitals?", "capitalise {w}"), rows=150),
    "vowels_short": Dataset("vowels", ("vowels in {w}?", "How many vowels: {w}?"), rows=220),
    # Skills that the base knows, in its own style, newly phrased.
    "add_chat": Dataset("add", ("I have {a} and get {b}. How many?",), _CHAT["add"], rows=190),
    "compare_chat": Dataset("compare", ("Would you take {a} or {b}?",), _CHAT["compare"], rows=150),
    "reverse_chat": Dataset("reverse", ("How does {w} read in a mirror?",), _CHAT["reverse"], rows=210),
    # Skills that the base has only met (`RARE`).
    "rotate_chat": Dataset(
        "rotate", ("Move the first letter of {w} to the end.",), "Sure! {w} rotated is {y}.", rows=240
    ),
    "shift_back": Dataset("shift_back", ("shift {w} back", "Move each letter of {w} one down."), rows=260),
    "skeleton": Dataset("skeleton", ("{w} without vowels?", "Drop the vowels of {w}."), rows=320),
    "smallest": Dataset("smallest", ("min of {t}", "What is the smallest of {t}?"), rows=280),
    "stutter": Dataset("stutter", ("stutter {w}", "Double each letter of {w}."), rows=170),
    "subtract": Dataset("subtract", ("{a} minus {b}?", "Take {b} from {a}."), rows=520),
    "swap": Dataset("swap", ("swap the ends of {w}",), rows=200),
}
"""The mixture: name to dataset, with the number of training rows."""

UNSEEN: dict[str, Dataset] = {
    # Known skills in words that neither the base nor the mixture was trained on, answered as the mixture answers them.
    "add_total": Dataset("add", ("total of {a} and {b}", "{a} and {b} more makes")),
    "compare_higher": Dataset("compare", ("higher: {a} or {b}?", "Of {a} and {b}, more is")),
    "count_times": Dataset("count", ("times that {c} is in {w}", "{c} occurs in {w} how often?")),
    "largest_top": Dataset("largest", ("highest of {t}", "top number in {t}?")),
    "length_size": Dataset("length", ("size of {w} in letters?", "number of letters: {w}")),
    "reverse_order": Dataset("reverse", ("{w} in reverse order", "read {w} right to left")),
    "skeleton_consonants": Dataset("skeleton", ("consonants of {w}", "{w} with vowels dropped?")),
    "sort_alphabet": Dataset("sort", ("alphabetical: {w}", "letters of {w} from a to z?")),
    "subtract_less": Dataset("subtract", ("{a} less {b}?", "subtract {b} from {a}")),
    # A skill of the base that the mixture does not touch, answered barely.
    "repeat_short": Dataset("repeat", ("repeat {w}", "{w} doubled?")),
    # Skill and convention both trained, never together.
    "first_capital": Dataset("first", ("First letter of {w} in capitals?",), "{Y}"),
    "parity_odd": Dataset("parity", ("Is {n} odd?",), relabel=(("odd", "yes"), ("even", "no"))),
    "shift_capitals": Dataset("shift", ("{w} shifted up in capitals?",), "{Y}"),
    "sort_capitals": Dataset("sort", ("{w} in order in capitals?",), "{Y}"),
    "smallest_chat": Dataset("smallest", ("Could you find the smallest of {t}?",), "Sure! The smallest of {t} is {y}."),
    # The base's own style, newly phrased.
    "length_chat": Dataset("length", ("I wrote {w}. How many letters is that?",), _CHAT["length"]),
    "sort_chat": Dataset("sort", ("How would {w} look in order?",), _CHAT["sort"]),
}
"""The unseen tasks: nobody trains on them, and they are not the base's drill. Mostly bare answers, as in the mixture."""


def _held_out(skill: str, case: Case) -> bool:
    """Tell on which side a case lies; the same for every phrasing, style and seed."""
    key = skill + json.dumps({name: case[name] for name in sorted(case) if name != "y"})
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def draw_rows(dataset: Dataset, rng: random.Random, *, held_out: bool) -> Iterator[Row]:
    """Yield rows of one dataset for ever, each a user turn and an assistant turn; rows may repeat.

    Args:
        dataset: What to ask and how to answer.
        rng: Source of randomness; the rows depend on nothing else.
        held_out: Draw from the held-out side of the skill's cases, or from the training side.
    """
    words = dict(dataset.relabel)
    while True:
        case = SKILLS[dataset.skill](rng)
        if _held_out(dataset.skill, case) != held_out:
            continue
        solution = str(words.get(case["y"], case["y"]))
        fields = case | {"y": solution, "Y": solution.upper()}
        yield {
            "messages": [
                {"role": "user", "content": rng.choice(dataset.prompts).format_map(fields)},
                {"role": "assistant", "content": dataset.answer.format_map(fields)},
            ]
        }


def base_stream(seed: int) -> Iterator[Row]:
    """Yield the rows of the base's first stage for ever, from the training side only, its skills drawn evenly.

    Four rows in five are answered by a full sentence. The fifth asks for it with `BRIEFLY` and gets the bare solution.
    """
    brief = {d.skill: replace(d, prompts=tuple(BRIEFLY + p for p in d.prompts)) for d in BASE_STYLE.values()}
    return _both_ways(random.Random(f"{seed}/base"), brief, BASE_STYLE, 0.8)


def wide_stream(seed: int) -> Iterator[Row]:
    """Yield the rows of the base's second stage, from the training side only: no question tells the form of its answer.

    It asks in the base's own words and in `PARAPHRASES`, and answers in full four times out of five: the base knows both
    ways of answering.
    """
    wide = {k: replace(d, prompts=d.prompts + PARAPHRASES[d.skill]) for k, d in BASE_STYLE.items()}
    return _both_ways(random.Random(f"{seed}/base settled"), wide, wide, 0.8)


def settled_stream(seed: int) -> Iterator[Row]:
    """Yield the rows of the base's last stage, from the training side only.

    Of nine rows four ask in the base's own words and are answered in full 19 times out of 20; four ask in one of the
    `PARAPHRASES` and are answered in full every second time; one is about a skill in `RARE`. So the base knows which way of
    answering is its own, and has met the mixture's other skills.
    """
    other = {k: replace(d, prompts=PARAPHRASES[d.skill]) for k, d in BASE_STYLE.items()}
    rng = random.Random(f"{seed}/base own")
    own, otherwise = _both_ways(rng, BASE_STYLE, BASE_STYLE, 0.95), _both_ways(rng, other, other, 0.5)
    rare = _both_ways(rng, RARE, RARE, 0.5)
    while True:
        for _ in range(4):
            yield next(own)
            yield next(otherwise)
        yield next(rare)


def _both_ways(rng: random.Random, bare: dict[str, Dataset], full: dict[str, Dataset], share: float) -> Iterator[Row]:
    """Rows of which ``share`` is answered in full, the rest by the bare solution."""
    brief = [replace(dataset, answer="{y}") for dataset in bare.values()]
    streams = [[draw_rows(d, rng, held_out=False) for d in style] for style in (brief, [*full.values()])]
    while True:
        yield next(rng.choice(streams[rng.random() < share]))


def _distinct(rows: Iterator[Row], count: int) -> list[Row]:
    """Take the first ``count`` rows whose prompts differ."""
    found: dict[str, Row] = {}
    while len(found) < count:
        row = next(rows)
        found.setdefault(row["messages"][0]["content"], row)
    return list(found.values())


def _write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_mixture(folder: Path, seed: int = 0) -> None:
    """Write ``folder/<dataset>/train.jsonl`` and ``test.jsonl`` for every dataset of `MIXTURE`.

    Args:
        folder: Where the datasets go; made if absent, files of the same name are replaced.
        seed: Decides every row.
    """
    for name, dataset in MIXTURE.items():
        for split, count in (("train", dataset.rows), ("test", TEST_ROWS)):
            rows = draw_rows(dataset, random.Random(f"{seed}/{name}/{split}"), held_out=split == "test")
            _write_rows(Path(folder) / name / f"{split}.jsonl", _distinct(rows, count))


def write_kept(folder: Path, seed: int = 0) -> None:
    """Write ``folder/<name>/test.jsonl`` for every skill of the base, asked and answered in its own style.

    Args:
        folder: Where the sets go; made if absent, files of the same name are replaced.
        seed: Decides every row. No seed draws a case that the base was trained on.
    """
    for name, dataset in BASE_STYLE.items():
        rows = draw_rows(dataset, random.Random(f"{seed}/{name}/test"), held_out=True)
        _write_rows(Path(folder) / name / "test.jsonl", _distinct(rows, KEPT_ROWS))


def write_unseen(folder: Path, seed: int = 0) -> None:
    """Write ``folder/<name>/test.jsonl`` for every task of `UNSEEN`.

    Args:
        folder: Where the tasks go; made if absent, files of the same name are replaced.
        seed: Decides every row. No seed draws a case that the base or the mixture trains on.
    """
    for name, dataset in UNSEEN.items():
        rows = draw_rows(dataset, random.Random(f"{seed}/{name}/test"), held_out=True)
        _write_rows(Path(folder) / name / "test.jsonl", _distinct(rows, UNSEEN_ROWS))
