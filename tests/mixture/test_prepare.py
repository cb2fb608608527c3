import json
import random

import numpy as np
import pytest

from merit.errors import MixtureError, RunFolderError
from merit.mixture import EncodedDataset, Mixture, load_split, read_counts
from mixture.mixture_cases import encode, prepare_mixture


def messages(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def words(seed, count, prefix="q"):
    generator = random.Random(seed)
    return [
        messages(f"{prefix} {i} " + "a" * generator.randrange(1, 9), "b " * generator.randrange(1, 12) + ".")
        for i in range(count)
    ]


@pytest.fixture
def mixture(tmp_path):
    for index, name in enumerate(("one", "two", "three")):
        write(tmp_path / "m" / name / "train.jsonl", words(index, 20 + 10 * index))
    write(tmp_path / "m" / "two" / "test.jsonl", [*words(9, 5, "test"), *words(1, 1)])
    return tmp_path / "m"


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_counted_is_what_is_written(recipe, mixture, byte_level, tmp_path):
    ticks = []
    settings = recipe({"folder": str(mixture)})
    counts = prepare_mixture(settings, byte_level, tmp_path / "out", lambda *tick: ticks.append(tick))
    train, test = load_split(tmp_path / "out", "train"), load_split(tmp_path / "out", "test")
    assert [entry.name for entry in counts] == list(train) == ["one", "three", "two"]
    assert [entry.name for entry in read_counts(tmp_path / "out")] == list(train)
    assert list(test) == ["two"]
    assert load_split(tmp_path / "out", "kept") == {}
    for entry, written in zip(counts, train.values(), strict=True):
        rows = [written[i] for i in range(len(written))]
        assert entry.rows == len(rows) == entry.source_rows
        assert entry.tokens == sum(len(row.input_ids) for row in rows)
        assert entry.target_tokens == sum(int(row.targets.sum()) for row in rows) == int(written.target_counts.sum())
        assert entry.fingerprint == written.fingerprint
        assert (entry.format, entry.rows_dropped) == ("messages", {})
    two = counts[2]
    assert (two.test_rows, two.test_rows_in_train) == (6, 1)
    assert any("among the training rows" in warning for warning in two.warnings)
    assert ticks[0] == (0, 3, "one")
    assert ticks[-1][:2] == (3, 3)


def test_the_same_mixture_in_another_order_gives_the_same_rows(recipe, mixture, byte_level, tmp_path):
    listed = [{"name": name, "path": str(mixture / name), "samples": 7} for name in ("one", "two", "three")]
    first = prepare_mixture(recipe({"datasets": listed}), byte_level, tmp_path / "a")
    second = prepare_mixture(recipe({"datasets": listed[::-1]}), byte_level, tmp_path / "b")
    assert [entry.name for entry in second] == ["three", "two", "one"]
    assert {e.name: e.fingerprint for e in first} == {e.name: e.fingerprint for e in second}
    again = prepare_mixture(recipe({"datasets": listed}, seed=1), byte_level, tmp_path / "c")
    assert all(a.fingerprint != b.fingerprint for a, b in zip(first, again, strict=True))


def test_budgets(recipe, mixture, byte_level, tmp_path):
    whole = prepare_mixture(recipe({"folder": str(mixture)}), byte_level, tmp_path / "whole")
    few = prepare_mixture(recipe({"folder": str(mixture), "samples": 8}), byte_level, tmp_path / "few")
    prepare_mixture(recipe({"folder": str(mixture), "samples": 12}), byte_level, tmp_path / "more")
    assert [(e.rows, e.rows + e.rows_over_budget) for e in few] == [(8, e.source_rows) for e in whole]

    def rows(folder, name):
        dataset = EncodedDataset.load(tmp_path / folder / "train" / f"{name}.parquet")
        return [tuple(dataset[i].input_ids.tolist()) for i in range(len(dataset))]

    for entry in whole:
        small, large, every = (rows(folder, entry.name) for folder in ("few", "more", "whole"))
        assert set(small) < set(large) < set(every)
        assert small == [row for row in every if row in set(small)]  # source order is kept

    budgeted = prepare_mixture(recipe({"folder": str(mixture), "tokens": 100}), byte_level, tmp_path / "tokens")
    for entry in budgeted:
        counts = EncodedDataset.load(tmp_path / "tokens" / "train" / f"{entry.name}.parquet").target_counts
        assert entry.target_tokens >= 100 > entry.target_tokens - counts.max()


def test_a_datasets_own_budget_wins(recipe, mixture, byte_level, tmp_path):
    listed = [
        {"name": "one", "path": str(mixture / "one"), "samples": 3},
        {"name": "two", "path": str(mixture / "two")},
    ]
    counts = prepare_mixture(recipe({"datasets": listed, "samples": 5}), byte_level, tmp_path / "out")
    assert [entry.rows for entry in counts] == [3, 5]


def test_bad_rows_stop_or_are_counted(recipe, byte_level, tmp_path):
    rows = [
        messages("q", "a"),
        {"messages": [{"role": "user", "content": "q"}]},
        messages("q", ""),
        {"messages": [{"role": "robot", "content": "q"}]},
        messages("q", "smile \ud83d"),
    ]
    path = write(tmp_path / "x.jsonl", rows)
    mixture = {"datasets": [{"name": "d", "path": str(path)}]}
    with pytest.raises(MixtureError, match=r"x\.jsonl, line 2: no assistant turn"):
        prepare_mixture(recipe(mixture), byte_level, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.*"))
    [entry] = prepare_mixture(recipe({**mixture, "bad_rows": "drop"}), byte_level, tmp_path / "out")
    assert entry.rows_dropped == {"no_assistant_turn": 1, "empty_answer": 1, "unknown_role": 1, "not_text": 1}
    assert (entry.rows, entry.source_rows) == (1, 5)


def test_rows_without_target_are_dropped_and_counted(recipe, byte_level, tmp_path):
    rows = [messages("short", "yes"), messages("long " * 200, "yes"), messages("q", "long " * 200)]
    path = write(tmp_path / "x.jsonl", rows)
    settings = recipe({"datasets": [{"name": "d", "path": str(path)}]}, train={"max_length": 64})
    [entry] = prepare_mixture(settings, byte_level, tmp_path / "out")
    assert (entry.rows, entry.rows_dropped, entry.rows_truncated) == (2, {"no_target_after_truncation": 1}, 1)
    said = Mixture.load(tmp_path / "out").warnings
    assert any("train.max_length" in text and "1 row, most of them in d" in text for text in said)
    write(path, rows[1:2])
    with pytest.raises(MixtureError, match=r"Dataset d: no row .* has a target left") as caught:
        prepare_mixture(settings, byte_level, tmp_path / "again")
    assert "max_length" in str(caught.value)
    assert "answer_lost" not in str(caught.value)


def test_a_dataset_of_which_every_row_is_cut_is_used(recipe, byte_level, tmp_path):
    """On commit f5727a1 a traceback: there is no whole row whose answer could be read back."""
    write(tmp_path / "data" / "d" / "train.jsonl", [messages("q", "a long answer " * 40)] * 2)
    settings = recipe({"folder": str(tmp_path / "data")}, train={"max_length": 64})
    (entry,) = prepare_mixture(settings, byte_level, tmp_path / "out")
    assert (entry.rows, entry.rows_truncated) == (2, 2)


def test_a_failed_run_leaves_the_earlier_result_alone(recipe, mixture, byte_level, tmp_path):
    prepare_mixture(recipe({"folder": str(mixture)}), byte_level, tmp_path / "out")
    before = files(tmp_path / "out")
    with (mixture / "two" / "train.jsonl").open("a") as handle:
        handle.write("{broken\n")
    with pytest.raises(MixtureError, match="line 31"):
        prepare_mixture(recipe({"folder": str(mixture)}), byte_level, tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_a_second_run_replaces_all_of_the_first(recipe, mixture, byte_level, tmp_path):
    prepare_mixture(recipe({"folder": str(mixture)}), byte_level, tmp_path / "out")
    prepare_mixture(recipe({"folder": str(mixture), "include": ["one"]}), byte_level, tmp_path / "out")
    assert sorted(files(tmp_path / "out")) == ["datasets.json", "encoding.json", "kept.json", "train/one.parquet"]


def korean(tmp_path):
    rows = [messages("which is it", "that"), messages("왜 that", "한국 is"), messages("which", "한국어")]
    path = write(tmp_path / "mixed.jsonl", rows)
    plain = write(tmp_path / "plain.jsonl", [messages("which", "that")])
    datasets = [{"name": "mixed", "path": str(path), "test": str(path)}, {"name": "plain", "path": str(plain)}]
    return {"datasets": datasets}


def test_lost_characters_are_counted_apart_for_prompts_and_answers(recipe, dropping, tmp_path):
    made = encode(recipe(korean(tmp_path)), dropping, tmp_path / "out")
    mixed, plain = made.counts
    assert mixed.characters_lost == {"prompt": 1 / 22, "answer": 5 / 12, "all": 6 / 34}
    assert set(mixed.characters_lost_most) == set("왜한국어")
    assert (mixed.rows, mixed.rows_dropped, mixed.rows_answer_lost) == (2, {"answer_lost": 1}, 1)
    [warning] = [text for text in made.warnings if "cannot represent" in text]
    assert "1 dataset: up to 17.6%" in warning
    assert warning.endswith("answer: 1 row")
    assert (plain.characters_lost["all"], plain.warnings) == (0.0, [])
    test = load_split(tmp_path / "out", "test")["mixed"]
    assert test.answers == ["that", "한국 is"]


def test_whole_words_lose_the_words_they_do_not_know(recipe, whole_words, tmp_path):
    rows = [messages("which cat", "the cat"), messages("is it", "that dog"), messages("it is", "dogs bark")]
    path = write(tmp_path / "x.jsonl", rows)
    known = write(tmp_path / "known.jsonl", [messages("which cat is it", "that is the cat I")])
    datasets = [{"name": "some", "path": str(path)}, {"name": "known", "path": str(known)}]
    some, known = prepare_mixture(recipe({"datasets": datasets}), whole_words, tmp_path / "out")
    assert some.characters_lost == {"prompt": 0.0, "answer": (3 + 8) / (7 + 8 + 9), "all": 11 / (7 + 8 + 9 + 9 + 5 + 5)}
    assert (some.rows, some.rows_dropped) == (2, {"answer_lost": 1})
    assert known.characters_lost == {"prompt": 0.0, "answer": 0.0, "all": 0.0}
    assert known.warnings == []
    assert not any("read back" in warning for warning in some.warnings)


def test_byte_level_tokenizers_lose_nothing(recipe, byte_level, tmp_path):
    mixed, _ = prepare_mixture(recipe(korean(tmp_path)), byte_level, tmp_path / "out")
    assert mixed.characters_lost == {"prompt": 0.0, "answer": 0.0, "all": 0.0}
    assert (mixed.rows, mixed.warnings[:-1]) == (3, [])


def test_unrepresentable_datasets_are_left_out_or_refused(recipe, dropping, tmp_path):
    out = {"unrepresentable": {"action": "leave_out"}}
    counts = prepare_mixture(recipe({**korean(tmp_path), **out}), dropping, tmp_path / "out")
    assert [entry.name for entry in counts] == ["plain"]
    [left_out] = json.loads((tmp_path / "out" / "encoding.json").read_text())["left_out"]
    assert left_out["name"] == "mixed"
    assert "17.6%" in left_out["reason"]
    with pytest.raises(MixtureError, match=r"Dataset mixed: .*17\.6%.*limit 2\.0%"):
        prepare_mixture(recipe({**korean(tmp_path), "unrepresentable": {"action": "error"}}), dropping, tmp_path / "e")
    only = {"datasets": korean(tmp_path)["datasets"][:1], **out}
    with pytest.raises(MixtureError, match="All datasets are left out"):
        prepare_mixture(recipe(only), dropping, tmp_path / "n")


def test_a_dataset_whose_answers_are_all_lost_is_an_error(recipe, dropping, tmp_path):
    path = write(tmp_path / "x.jsonl", [messages("which", "한국"), messages("which", "어")])
    with pytest.raises(MixtureError, match=r"answer_lost 2") as caught:
        prepare_mixture(recipe({"datasets": [{"name": "d", "path": str(path)}]}), dropping, tmp_path / "out")
    assert "leave_out" in str(caught.value)


def test_a_template_that_refuses_a_row_names_it(recipe, byte_level, tmp_path):
    import copy

    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + byte_level.chat_template
    )
    system = {"messages": [{"role": "system", "content": "s"}, *messages("q", "a")["messages"]]}
    path = write(tmp_path / "x.jsonl", [messages("q", "a"), system])
    mixture = {"datasets": [{"name": "d", "path": str(path)}]}
    with pytest.raises(MixtureError, match=r"line 2: .*System role not supported"):
        prepare_mixture(recipe(mixture), tokenizer, tmp_path / "out")
    [entry] = prepare_mixture(recipe({**mixture, "bad_rows": "drop"}), tokenizer, tmp_path / "out")
    assert entry.rows_dropped == {"refused_by_template": 1}


def test_kept_sets_are_counted_apart(recipe, mixture, byte_level, tmp_path):
    write(tmp_path / "k" / "old" / "test.jsonl", words(5, 4))
    settings = recipe({"folder": str(mixture)}, evaluate={"kept_folder": str(tmp_path / "k")})
    counts = prepare_mixture(settings, byte_level, tmp_path / "out")
    assert "old" not in [entry.name for entry in counts]
    [entry] = read_counts(tmp_path / "out", "kept")
    assert (entry.name, entry.rows, entry.test_rows) == ("old", 0, 4)
    assert len(load_split(tmp_path / "out", "kept")["old"]) == 4
    assert not (tmp_path / "out" / "unseen.json").exists()
    assert load_split(tmp_path / "out", "unseen") == {}
    settings = recipe({"folder": str(mixture)}, evaluate={"unseen_folder": str(tmp_path / "k")})
    prepare_mixture(settings, byte_level, tmp_path / "out")
    assert [entry.name for entry in read_counts(tmp_path / "out", "unseen")] == ["old"]
    assert (load_split(tmp_path / "out", "kept"), len(load_split(tmp_path / "out", "unseen")["old"])) == ({}, 4)


def test_fingerprints_follow_what_the_model_sees(recipe, mixture, byte_level, tmp_path):
    import copy

    def prints(tokenizer=byte_level, **blocks):
        counts = prepare_mixture(recipe({"folder": str(mixture)}, **blocks), tokenizer, tmp_path / "out")
        return np.array([entry.fingerprint for entry in counts])

    base = prints()
    assert (prints() == base).all()
    assert (prints(train={"max_length": 24}) != base).all()
    other = copy.deepcopy(byte_level)
    other.chat_template = byte_level.chat_template.replace("User:", "Person:")
    assert (prints(other) != base).all()
    rows = (mixture / "one" / "train.jsonl").read_text().replace("q 3 ", "q 3. ")
    (mixture / "one" / "train.jsonl").write_text(rows)
    assert (prints() != base).tolist() == [True, False, False]


def test_a_missing_result_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"datasets\.json"):
        load_split(tmp_path, "train")


def test_datasets_with_too_few_rows_are_left_out_by_name(recipe, mixture, byte_level, tmp_path):
    write(mixture / "bad" / "train.jsonl", [*words(3, 28), *([{"messages": [{"role": "user", "content": "?"}]}] * 4)])
    settings = recipe({"folder": str(mixture), "min_rows": 30, "samples": 10, "bad_rows": "drop"})
    counts = prepare_mixture(settings, byte_level, tmp_path / "out")
    assert [(entry.name, entry.rows) for entry in counts] == [("three", 10), ("two", 10)], "a budget does not count"
    left = json.loads((tmp_path / "out" / "encoding.json").read_text())["left_out"]
    assert [item["name"] for item in left] == ["bad", "one"]
    assert "28 usable rows" in left[0]["reason"], "bad rows do not count"
    assert not (tmp_path / "out" / "train" / "one.parquet").exists()
    with pytest.raises(MixtureError, match=r"20 usable rows, fewer than mixture.min_rows \(99\)"):
        prepare_mixture(
            recipe({"folder": str(mixture), "min_rows": 99, "include": ["one", "two"]}), byte_level, tmp_path
        )
