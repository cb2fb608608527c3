import json
import os
import subprocess
import sys

import pytest

from merit.errors import MixtureError
from merit.mixture import find_datasets
from merit.mixture.sources import find_kept
from mixture.mixture_cases import check_sources, discover

ROW = {"prompt": "q", "completion": "a"}


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(part):
    return [row for _, row in part.read()]


def one(recipe, path, **more):
    return discover(recipe({"datasets": [{"name": "d", "path": str(path), **more}]}).mixture)[0]


TRAPS = ["2020-01-01", "None", "NA", "007", "1e5", "true", "", " é日 ", 'a "quoted", cell', "two\nlines", "null"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_text_comes_back_as_it_was_written(recipe, tmp_path, suffix):
    rows = [{"prompt": text, "completion": text} for text in TRAPS]
    path = tmp_path / f"with [brackets] {suffix}" / f"x.{suffix}"
    path.parent.mkdir()
    if suffix == "jsonl":
        lines(path, rows)
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif suffix == "csv":
        import csv

        with path.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    assert read(one(recipe, path).train) == rows


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("prompt,completion\nSay hi, bob,Hello\nSay ho, tim,Hallo\n", 2, ["expected 2 fields", "found 3"]),
        ("prompt,completion\nhi,ho\nSay hi\n", 3, ["expected 2 fields", "found 1"]),
        ('prompt,completion\n"two\nlines",ho\n\na,b,c\n', 5, ["expected 2 fields", "found 3"]),
        ('prompt,completion\nhi,ho\nSay,"bob" or tim\n', 3, ["malformed CSV"]),
        ('prompt,completion\nhi,ho\nSay,"never closed\nx,y\n', 3, ["malformed CSV"]),
    ],
)
def test_csv_rows_that_do_not_fit_the_header_are_refused(recipe, tmp_path, text, line, words):
    path = tmp_path / "x.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MixtureError) as caught:
        read(one(recipe, path).train)
    for word in [f"x.csv, line {line}:", *words]:
        assert word in str(caught.value)


def test_csv_as_pandas_and_spreadsheets_write_it(recipe, tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes('\ufeff,prompt,completion\r\n0,"a\r\nb, ""c""",007\r\n\r\n1,null,\r\n'.encode())
    assert list(one(recipe, path).train.read()) == [
        (f"{path}, line 2", {"prompt": 'a\r\nb, "c"', "completion": "007"}),
        (f"{path}, line 5", {"prompt": "null", "completion": ""}),
    ]
    path.write_text("prompt,completion,\nq,a,\n", encoding="utf-8")
    with pytest.raises(MixtureError, match="column 3 of 3 has no name"):
        read(one(recipe, path).train)


def test_a_long_csv_cell_is_read(recipe, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(f"prompt,completion\nq,{'a' * 200_000}\n", encoding="utf-8")
    assert len(read(one(recipe, path).train)[0]["completion"]) == 200_000


@pytest.mark.parametrize(("suffix", "text"), [("parquet", "no parquet"), ("csv", "prompt,completion\na,b,c\n")])
def test_a_file_that_cannot_be_read_gives_one_message(recipe, tmp_path, suffix, text):
    import logging

    class Said(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    said, handler, logger = [], Said(), logging.getLogger("datasets")
    path = tmp_path / f"x.{suffix}"
    path.write_text(text, encoding="utf-8")
    logger.addHandler(handler)
    try:
        with pytest.raises(MixtureError, match=f"x.{suffix}"):
            read(one(recipe, path).train)
    finally:
        logger.removeHandler(handler)
    assert said == []


def test_columns_of_dates_stay_text(recipe, tmp_path):
    rows = [{"prompt": "when?", "completion": f"2020-01-0{day}"} for day in range(1, 4)]
    assert read(one(recipe, lines(tmp_path / "x.jsonl", rows)).train) == rows


def test_json_lines_in_a_json_file_and_blank_lines(recipe, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(f"\ufeff{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n", encoding="utf-8")
    places = [place for place, _ in one(recipe, path).train.read()]
    assert [place.rsplit(", ")[-1] for place in places] == ["line 1", "line 3"]


def test_reading_local_files_leaves_no_cache_behind(tmp_path):
    path = lines(tmp_path / "x.jsonl", [ROW] * 3)
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "from merit.recipe.load import parse_recipe; from merit.mixture import find_datasets\n"
        f"r = parse_recipe({{'name': 'r', 'model': {{'base': 'b'}}, 'mixture': "
        f"{{'datasets': [{{'name': 'd', 'path': {path!r}}}]}}}})\n"
        "import sys; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "print(find_datasets(r.mixture).check(None)[0].format)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))} | {"HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "prompt_completion"
    assert list(home.rglob("*")) == []


def test_a_folder_gives_its_sub_folders_by_name(recipe, tmp_path):
    for name in ("zeta", "alpha", "mid.2"):
        lines(tmp_path / "m" / name / "train.jsonl", [ROW])
    lines(tmp_path / "m" / "alpha" / "test.jsonl", [ROW])
    (tmp_path / "m" / "README.md").write_text("x")
    (tmp_path / "m" / ".hidden").mkdir()
    sources = discover(recipe({"folder": str(tmp_path / "m")}).mixture)
    assert [source.name for source in sources] == ["alpha", "mid.2", "zeta"]
    assert [source.test is not None for source in sources] == [True, False, False]


def test_shards_and_folders_of_files_are_read_in_name_order(recipe, tmp_path):
    for index in (2, 0, 1):
        lines(tmp_path / "d" / f"part-{index}.jsonl", [{"prompt": str(index), "completion": "a"}])
    assert [row["prompt"] for row in read(one(recipe, tmp_path / "d").train)] == ["0", "1", "2"]


def test_a_folder_with_train_and_test_is_not_read_as_one_heap(recipe, tmp_path):
    lines(tmp_path / "d" / "train.jsonl", [{"prompt": "train", "completion": "a"}])
    lines(tmp_path / "d" / "test.jsonl", [{"prompt": "test", "completion": "a"}])
    source = one(recipe, tmp_path / "d")
    assert [row["prompt"] for row in read(source.train)] == ["train"]
    assert [row["prompt"] for row in read(source.test)] == ["test"]


def test_include_and_exclude(recipe, tmp_path):
    for name in ("tweet_a", "tweet_b", "gsm8k"):
        lines(tmp_path / "m" / name / "train.jsonl", [ROW])
    (tmp_path / "m" / "broken one").mkdir()  # never looked at when left out
    chosen = recipe({"folder": str(tmp_path / "m"), "include": ["tweet_*"], "exclude": ["*_b"]}).mixture
    assert [source.name for source in discover(chosen)] == ["tweet_a"]


def test_one_file_is_cut_by_a_column(recipe, tmp_path):
    rows = [{"task": task, **ROW} for task in ("b", "a b", "b", 3)]
    path = lines(tmp_path / "all.jsonl", rows)
    test = lines(tmp_path / "test.jsonl", rows[:1])
    sources = discover(recipe({"path": path, "test": test, "split_by": "task"}).mixture)
    assert [(s.name, len(read(s.train)), s.test is not None) for s in sources] == [
        ("3", 1, False),
        ("a_b", 1, False),
        ("b", 2, True),
    ]


def test_a_listed_dataset_is_cut_by_a_column(recipe, tmp_path):
    whole = {"name": "all", "path": lines(tmp_path / "all.jsonl", [{"task": t, **ROW} for t in ("b", "a b", "b")])}
    whole |= {"test": lines(tmp_path / "test.jsonl", [{"task": "b", **ROW}]), "split_by": "task", "samples": 7}
    other = {"name": "other", "path": lines(tmp_path / "other.jsonl", [ROW])}
    sources = discover(recipe({"datasets": [whole, other], "samples": 5}).mixture)
    assert [(s.name, len(read(s.train)), s.test is not None, s.samples) for s in sources] == [
        ("all.a_b", 1, False, 7),
        ("all.b", 2, True, 7),
        ("other", 1, False, 5),
    ]


def test_kept_sets_use_their_test_rows(recipe, tmp_path):
    lines(tmp_path / "k" / "x" / "test.jsonl", [ROW])
    path = lines(tmp_path / "y.jsonl", [ROW, ROW])
    lines(tmp_path / "d" / "train.jsonl", [ROW])
    settings = recipe(
        {"datasets": [{"name": "d", "path": str(tmp_path / "d")}]},
        evaluate={"kept_folder": str(tmp_path / "k"), "kept": [{"name": "y", "path": path}]},
    )
    assert [(s.name, s.train, len(read(s.test))) for s in find_kept(settings.evaluate, {})] == [
        ("y", None, 2),
        ("x", None, 1),
    ]
    assert [s.name for s in check_sources(settings) if s.role == "kept"] == ["y", "x"]


def broken(tmp_path, name):
    """Recipe settings with one fault each."""
    good = lines(tmp_path / "good.jsonl", [ROW])
    listed = lambda path, **more: {"datasets": [{"name": "d", "path": str(path), **more}]}  # noqa: E731
    folder = tmp_path / "m"
    lines(folder / "alpha" / "train.jsonl", [ROW])

    def file(text, suffix="jsonl"):
        path = tmp_path / f"bad.{suffix}"
        path.write_text(text, encoding="utf-8")
        return listed(path)

    if name == "two_suffixes":
        lines(folder / "alpha" / "train.json", [ROW])
    if name == "bad_folder_name":
        lines(folder / "be ta" / "train.jsonl", [ROW])
    if name == "letters_of_other_scripts":
        lines(folder / "데이터" / "train.jsonl", [ROW])
    if name == "no_train":
        lines(folder / "beta" / "trian.jsonl", [ROW])
    if name == "case_twins":
        lines(folder / "ALPHA" / "train.jsonl", [ROW])
    if name == "link_out":
        lines(tmp_path / "elsewhere" / "train.jsonl", [ROW])
        (folder / "beta").symlink_to(tmp_path / "elsewhere")
    if name == "not_utf8":
        (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    tasks = lines(tmp_path / "tasks.jsonl", [{"task": "a", **ROW}, {"task": None, **ROW}])
    clash = lines(tmp_path / "clash.jsonl", [{"task": "a b", **ROW}, {"task": "a_b", **ROW}])
    return {
        "missing": lambda: listed(tmp_path / "godo.jsonl"),
        "missing_folder": lambda: {"folder": str(tmp_path / "mm")},
        "empty": lambda: file("\n\n"),
        "zero_bytes": lambda: file(""),
        "malformed": lambda: file(json.dumps(ROW) + '\n{"prompt": "q" "completion": "a"}\n'),
        "malformed_json": lambda: file('[\n{"prompt": "q"},\n{"prompt" "q"}]', "json"),
        "not_a_list": lambda: file('{"a": 1}', "json"),
        "ragged_csv": lambda: file("prompt,completion\na,b\na,b,c\n", "csv"),
        "bad_parquet": lambda: file("no parquet", "parquet"),
        "other_suffix": lambda: file("x", "txt"),
        "not_utf8": lambda: listed(tmp_path / "latin.jsonl"),
        "unknown_columns": lambda: file(json.dumps({"promt": "q", "completion": "a"})),
        "wrong_format": lambda: listed(good, format="messages"),
        "not_an_object": lambda: file("[1, 2]\n"),
        "no_assistant": lambda: file(json.dumps(ROW) + "\n" + json.dumps({"prompt": "q", "completion": None})),
        "half_a_pair": lambda: file(json.dumps(ROW) + '\n{"prompt": "q", "completion": "\\ud83d"}\n'),
        "half_a_pair_in_a_name": lambda: {
            "path": lines(tmp_path / "pair.jsonl", [{"task": "\ud83d", **ROW}]),
            "split_by": "task",
        },
        "null_name": lambda: {"path": tasks, "split_by": "task"},
        "no_column": lambda: {"path": tasks, "split_by": "tusk"},
        "colliding_names": lambda: {"path": clash, "split_by": "task"},
        "pattern": lambda: {"folder": str(folder), "include": ["alhpa"]},
        "pattern_exclude": lambda: {"folder": str(folder), "exclude": ["beta*"]},
        "nothing_left": lambda: {"folder": str(folder), "exclude": ["alpha"]},
        "offline_hub": lambda: listed("someone/something"),
    }.get(name, lambda: {"folder": str(folder)})()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", ["godo.jsonl", "does not exist", "Did you mean 'good.jsonl'"]),
        ("missing_folder", ["mm", "is not a folder"]),
        ("empty", ["Dataset d is empty", "bad.jsonl"]),
        ("zero_bytes", ["Dataset d is empty"]),
        ("malformed", ["bad.jsonl", "malformed JSON at line 2", '"q" "completion"']),
        ("malformed_json", ["malformed JSON at line 3"]),
        ("not_a_list", ["expected a list", "dict"]),
        ("ragged_csv", ["bad.csv", "line 3"]),
        ("bad_parquet", ["bad.parquet", "parquet"]),
        ("other_suffix", ["bad.txt", ".jsonl"]),
        ("not_utf8", ["latin.jsonl", "UTF-8"]),
        ("unknown_columns", ["promt", "Did you mean 'prompt'", "alpaca"]),
        ("wrong_format", ["line 1", "messages"]),
        ("not_an_object", ["line 1", "object"]),
        ("no_assistant", ["line 2", "completion must be text", "bad_rows: drop"]),
        ("null_name", ["line 2", "task", "null"]),
        ("no_column", ["'tusk'", "Did you mean 'task'"]),
        ("colliding_names", ["'a b'", "'a_b'"]),
        ("pattern", ["'alhpa'", "Did you mean 'alpha'"]),
        ("pattern_exclude", ["exclude", "'beta*'"]),
        ("nothing_left", ["no dataset"]),
        ("two_suffixes", ["train", ".json", ".jsonl"]),
        ("bad_folder_name", ["'be ta'", "letters A-Z and a-z"]),
        ("letters_of_other_scripts", ["'데이터'", "mixture.datasets", "path:"]),
        ("half_a_pair", ["line 2", "completion", "surrogate", "bad_rows: drop"]),
        ("half_a_pair_in_a_name", ["line 1", "task", "surrogate"]),
        ("no_train", ["beta", "no train.jsonl", "trian.jsonl"]),
        ("case_twins", ["ALPHA", "alpha"]),
        ("link_out", ["beta", "leads out"]),
        ("offline_hub", ["someone/something", "HF_HUB_OFFLINE"]),
    ],
)
def test_bad_input_is_named_with_its_place(recipe, tmp_path, monkeypatch, name, words):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    settings = recipe(broken(tmp_path, name))
    with pytest.raises(MixtureError) as caught:
        check_sources(settings)
    for word in words:
        assert word in str(caught.value)


def test_unseen_tasks_are_apart_from_the_mixture_and_from_kept_sets(recipe, tmp_path):
    path = lines(tmp_path / "d.jsonl", [ROW])
    lines(tmp_path / "u" / "x" / "test.jsonl", [ROW])
    lines(tmp_path / "k" / "z" / "test.jsonl", [ROW])
    mixture = {"datasets": [{"name": "d", "path": path}]}
    folders = {"unseen_folder": str(tmp_path / "u"), "kept_folder": str(tmp_path / "k")}
    assert [(s.name, s.role) for s in check_sources(recipe(mixture, evaluate=folders))] == [
        ("d", "mixture"),
        ("z", "kept"),
        ("x", "unseen"),
    ]
    found = [find_datasets(settings.mixture, settings.evaluate).fingerprints()["x"] for settings in (
        recipe(mixture, evaluate={"unseen_folder": str(tmp_path / "u")}),
        recipe(mixture, evaluate={"kept_folder": str(tmp_path / "u")}),
    )]  # fmt: skip
    assert found[0] != found[1], "the same rows in another role are another mixture stage"
    with pytest.raises(MixtureError, match=r"unseen_folder and evaluate\.kept both have a dataset named x"):
        check_sources(recipe(mixture, evaluate={**folders, "kept_folder": str(tmp_path / "u")}))


def test_a_kept_set_must_not_be_named_like_a_dataset(recipe, tmp_path):
    path = lines(tmp_path / "x.jsonl", [ROW])
    entry = {"name": "d", "path": path}
    with pytest.raises(MixtureError, match="named d"):
        check_sources(recipe({"datasets": [entry]}, evaluate={"kept": [entry]}))


def test_the_rows_of_an_epoch_are_counted_before_they_are_read(recipe, tmp_path):
    for name, count in (("a", 5), ("b", 9)):
        lines(tmp_path / "folder" / name / "train.jsonl", [ROW] * count)
    whole = recipe({"folder": str(tmp_path / "folder"), "samples": 7})
    assert find_datasets(whole.mixture, whole.evaluate).most_rows() == {"a": 5, "b": 7}
    item = {"name": "d", "path": str(tmp_path / "folder" / "b" / "train.jsonl"), "repeat": 1.5}
    listed = recipe({"datasets": [item]})
    assert find_datasets(listed.mixture, listed.evaluate).most_rows() == {"d": 14}
