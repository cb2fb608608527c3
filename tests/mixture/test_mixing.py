"""Repeats, temperature, renamed columns, compressed files."""

import gzip
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from merit.errors import MixtureError, RecipeError
from mixture.mixture_cases import check_sources, discover, encode, find


def rows(count, prefix="q"):
    return [{"prompt": f"{prefix} {i}", "completion": f"answer {i}"} for i in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts(dataset, tokenizer):
    return Counter(tokenizer.decode(dataset[i].input_ids[: dataset[i].prompt_length]) for i in range(len(dataset)))


def mix(recipe, tokenizer, folder, sizes, mixture=None, **each):
    datasets = [
        {"name": name, "path": write(folder / f"{name}.jsonl", rows(n, name)), **each} for name, n in sizes.items()
    ]
    return encode(recipe({"datasets": datasets, **(mixture or {})}, seed=3), tokenizer, folder / "out")


@pytest.mark.parametrize(("repeat", "expected"), [(1.0, {1: 10}), (2.0, {2: 10}), (2.5, {2: 5, 3: 5}), (0.3, {1: 3})])
def test_rows_are_repeated_whole_and_the_rest_is_drawn(recipe, byte_level, tmp_path, repeat, expected):
    made = mix(recipe, byte_level, tmp_path, {"d": 10}, repeat=repeat)
    assert Counter(prompts(made.train["d"], byte_level).values()) == expected
    [counts] = made.counts
    dataset = made.train["d"]
    assert counts.rows == len(dataset) == round(10 * repeat)
    assert counts.rows_distinct == sum(expected.values())
    assert counts.tokens == dataset.lengths.sum()
    assert counts.target_tokens == dataset.target_counts.sum()
    assert counts.fingerprint == dataset.fingerprint


def test_a_repeat_comes_after_the_budget(recipe, byte_level, tmp_path):
    made = mix(recipe, byte_level, tmp_path, {"d": 10}, samples=4, repeat=3)
    assert list(prompts(made.train["d"], byte_level).values()) == [3] * 4


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1000.0, 0.5])
def test_temperature_shares_the_same_total_out_again(recipe, byte_level, tmp_path, temperature):
    sizes = {"a": 64, "b": 16, "c": 4}
    made = mix(recipe, byte_level, tmp_path, sizes, {"temperature": temperature})
    weights = np.array(list(sizes.values())) ** (1 / temperature)
    assert list(made.rows.values()) == np.maximum(np.rint(84 * weights / weights.sum()), 1).astype(int).tolist()
    for name, dataset in made.train.items():
        often = prompts(dataset, byte_level).values()
        assert max(often) - min(often) <= 1
        assert len(often) == min(sizes[name], made.rows[name])


def test_columns_of_another_name_are_read(recipe, byte_level, tmp_path):
    given = [{"question": f"q {i}", "answer": "a", "task": "xy"[i % 2], "id": i} for i in range(6)]
    path = write(tmp_path / "x.jsonl", given)
    columns = {"prompt": "question", "response": "answer"}
    listed = {"datasets": [{"name": "d", "path": path, "columns": columns}]}
    plain = encode(recipe(listed), byte_level, tmp_path / "out")
    assert plain.counts[0].format == "prompt_completion"
    assert plain.counts[0].keys_ignored == {"id": 6, "task": 6}
    cut = encode(recipe({"path": path, "split_by": "task", "columns": columns}), byte_level, tmp_path / "cut")
    assert cut.rows == {"x": 3, "y": 3}
    wrong = {"datasets": [{"name": "d", "path": path, "columns": {**columns, "prompt": "qestion"}}]}
    with pytest.raises(MixtureError, match=r"no column 'qestion'.*'question'"):
        check_sources(recipe(wrong))
    folder = tmp_path / "folder"
    (folder / "asked").mkdir(parents=True)
    (folder / "told").mkdir()
    write(folder / "asked" / "train.jsonl", given)
    write(folder / "told" / "train.jsonl", [{"prompt": f"p {i}", "completion": "b"} for i in range(4)])
    whole = encode(recipe({"folder": str(folder), "columns": columns}), byte_level, tmp_path / "whole")
    assert whole.rows == {"asked": 6, "told": 4}
    write(folder / "told" / "train.jsonl", [{"ask": "q", "say": "a"}])
    with pytest.raises(MixtureError, match="no column 'question'"):
        check_sources(recipe({"folder": str(folder), "columns": columns}))
    with pytest.raises(RecipeError, match="promt"):
        recipe({"datasets": [{"name": "d", "path": path, "columns": {"promt": "question"}}]})


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".tsv"])
def test_compressed_lines_and_tabs(recipe, tmp_path, suffix, cut):
    given = [{**row, "task": "ab"[i % 2]} for i, row in enumerate(rows(20))]
    path = tmp_path / f"train{suffix}"
    if suffix == ".tsv":
        path.write_text("prompt\tcompletion\ttask\n" + "".join("\t".join(row.values()) + "\n" for row in given))
    else:
        data = "".join(json.dumps(row) + "\n" for row in given).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else pa.compress(data, "zstd", asbytes=True))
    mixture = {"path": str(path), "split_by": "task"} if cut else {"datasets": [{"name": "d", "path": str(path)}]}
    read = [row for source in discover(recipe(mixture).mixture) for _, row in source.train.read()]
    assert read == ([*given[::2], *given[1::2]] if cut else given)


def test_a_mixed_parquet_file_is_cut_as_lines_are(recipe, byte_level, tmp_path):
    import pyarrow.parquet as pq

    given = [{**row, "task": f"t{i * 7 % 5}"} for i, row in enumerate(rows(400))]
    lines = write(tmp_path / "x.jsonl", given)
    pq.write_table(pa.Table.from_pylist(given), tmp_path / "x.parquet", row_group_size=50)
    made = [
        encode(recipe({"path": str(path), "split_by": "task"}), byte_level, tmp_path / f"out{number}")
        for number, path in enumerate((lines, tmp_path / "x.parquet"))
    ]
    assert [item.fingerprint for item in made[0].counts] == [item.fingerprint for item in made[1].counts]


def test_a_cut_file_is_parsed_once_for_finding_checking_and_fingerprints(recipe, tmp_path, monkeypatch):
    """Fails on commit f5727a1: every caller found the datasets anew, five times per run, and held their rows in memory."""
    from merit.mixture import part

    parsed = []
    real = part.parse_line
    monkeypatch.setattr(part, "parse_line", lambda *given: parsed.append(given[1]) or real(*given))
    path = write(tmp_path / "x.jsonl", [{**row, "task": f"t{i % 5}"} for i, row in enumerate(rows(500))])
    found = find(recipe({"path": path, "split_by": "task"}))
    found.fingerprints()
    assert len(parsed) == 500
    found.check()
    assert len(parsed) == 500 + 5 * (1 + 8)  # the first row tells the format, eight are looked at
    assert [number for source in found.sources[:1] for number, _ in source.train.read()] == [
        f"{path}, line {n}" for n in range(1, 501, 5)
    ]
