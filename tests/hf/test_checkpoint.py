import json
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merit.errors import CheckpointError
from merit.hf import checkpoint, dtypes, side_files

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
]


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "model.embed.weight": torch.randn(300, 16, generator=g).bfloat16(),
        "model.norm.weight": torch.randn(16, generator=g),
        "model.scalar": torch.tensor(3.5),
        "model.empty": torch.zeros(0, 4),
        "model.buffer": torch.arange(5),
    }


@pytest.fixture
def folder(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def shard(folder, tensors, count=2, index=True):
    names, weight_map = list(tensors), {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::count]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def rewrite(path, change):
    """Change the header of a safetensors file, keeping its data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=6),
    st.integers(0, 9),
)
def test_reads_what_the_safetensors_library_wrote(tmp_path_factory, kinds, seed):
    folder = tmp_path_factory.mktemp("c")
    g = torch.Generator().manual_seed(seed)
    tensors = {f"t{i}": (torch.randn(shape, generator=g) * 3).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    save_file(tensors, folder / "model.safetensors")
    head = checkpoint.read_headers(folder)
    assert set(head.tensors) == set(tensors)
    for name, info in head.tensors.items():
        raw, want = checkpoint.read_tensor(head, name), tensors[name]
        assert info.shape == tuple(want.shape) == raw.shape
        assert raw.tobytes() == want.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        if info.dtype.kind == "float":
            assert np.array_equal(dtypes.to_float(raw, info.dtype), want.double().numpy())
    shutil.rmtree(folder)


def test_sharded_reads_like_one_file(tmp_path, tensors, folder):
    other = tmp_path / "sharded"
    other.mkdir()
    shard(other, tensors)
    one, two = checkpoint.read_headers(folder), checkpoint.read_headers(other)
    assert one.tensors.keys() == two.tensors.keys() == tensors.keys()
    assert len(two.files) == 2
    assert checkpoint.weights_digest(one) == checkpoint.weights_digest(two)


def test_truncation_is_found_without_reading_data(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.read_headers(folder)


@pytest.mark.parametrize("size", [0, 5, 8, 60])
def test_files_cut_inside_the_header_are_refused(folder, size):
    os.truncate(folder / "model.safetensors", size)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read_headers(folder)


def test_trailing_bytes_are_refused(folder):
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match="header describes"):
        checkpoint.read_headers(folder)


def _move(header):
    header["model.norm.weight"]["data_offsets"] = [o - 4 for o in header["model.norm.weight"]["data_offsets"]]


def _shape(header):
    header["model.norm.weight"]["shape"] = [17]


def _dtype(header):
    header["model.norm.weight"]["dtype"] = "F4"


def _negative(header):
    header["model.norm.weight"]["shape"] = [-1, -16]


def _lacks(header):
    del header["model.norm.weight"]["shape"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_move, "overlaps|hole"),
        (_shape, "offsets span"),
        (_dtype, "unknown dtype 'F4'"),
        (_negative, "impossible"),
        (_lacks, "lacks"),
    ],
)
def test_wrong_headers_are_refused_by_tensor(folder, change, message):
    rewrite(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_headers(folder)


DEEP = "[" * 200_000
ENTRY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    "header",
    [
        *("[]", "null", '{"a": 3}', '{"a": []}', f'{{"__metadata__": [1], "a": {ENTRY}}}'),
        pytest.param(DEEP, id="deep"),
        '{"a": {"dtype": ["U8"], "shape": [0], "data_offsets": [0, 0]}}',
        '{"a": {"dtype": "U8", "shape": "ab", "data_offsets": [0, 0]}}',
        '{"a": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}}',
        pytest.param(f'{{"a": {{"dtype": "U8", "shape": {[10**4000] * 3}, "data_offsets": [0, 0]}}}}', id="huge"),
        pytest.param(f'{{"a": {{"dtype": "U8", "shape": {[9 * 10**18] * 400}, "data_offsets": [0, 0]}}}}', id="many"),
    ],
)
def test_a_header_of_the_wrong_form_is_refused_by_file(tmp_path, header):
    """Fails on commit f5727a1 with a traceback for several of these (finding B3)."""
    text = header.encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        checkpoint.read_headers(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        DEEP,
        '{"weight_map": []}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"a": {}}}',
        '{"weight_map": {}}',
    ],
)
def test_an_index_of_the_wrong_form_is_refused_by_file(tmp_path, text):
    """Fails on commit f5727a1 with a traceback for several of these (finding B3)."""
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        checkpoint.read_headers(tmp_path)


@pytest.mark.parametrize("name", ["README.md", "merge.json", "config.json"])
def test_a_shard_is_a_safetensors_file(tmp_path, tensors, name):
    """Fails on commit f5727a1, where such a shard was overwritten by the model card or the record (finding B4)."""
    save_file(tensors, tmp_path / name)
    index = {"weight_map": dict.fromkeys(tensors, name)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"expected \*\.safetensors"):
        checkpoint.read_headers(tmp_path)


def test_a_tensor_named_twice_in_one_header_is_refused(folder):
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = f'{{"a":{entry},"a":{entry}}}'.encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="'a' occurs twice"):
        checkpoint.read_headers(folder)


def test_swapped_shards_are_refused(tmp_path, tensors):
    shard(tmp_path, tensors)
    one, two = sorted(tmp_path.glob("model-*.safetensors"))
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    with pytest.raises(CheckpointError, match=r"places .* in .*but it is in"):
        checkpoint.read_headers(tmp_path)


def test_missing_shards_and_leftover_weights_are_refused(tmp_path, tensors):
    shard(tmp_path, tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="contains both"):
        checkpoint.read_headers(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors.*missing"):
        checkpoint.read_headers(tmp_path)


def test_an_index_cannot_reach_outside_the_folder(tmp_path, tensors):
    shard(tmp_path, tensors)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside the folder"):
        checkpoint.read_headers(tmp_path)


def test_shards_without_an_index_are_refused(tmp_path, tensors):
    shard(tmp_path, tensors, index=False)
    with pytest.raises(CheckpointError, match="neither"):
        checkpoint.read_headers(tmp_path)


def test_pickles_are_refused_with_the_way_to_convert(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        checkpoint.read_headers(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="not a folder"):
        checkpoint.read_headers(tmp_path / "nothing")


# ---- fingerprint


def test_fingerprint_covers_weights_config_and_tokenizer_only(folder, tensors):
    before = checkpoint.fingerprint(folder)
    (folder / "README.md").write_text("other")
    (folder / "record.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"x")
    assert checkpoint.fingerprint(folder) == before
    (folder / "model.safetensors").unlink()
    shard(folder, dict(reversed(tensors.items())), 3)
    assert checkpoint.fingerprint(folder) == before
    seen = {before}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_text('{"x": 1}')
        seen.add(checkpoint.fingerprint(folder))
    assert len(seen) == 5


@pytest.mark.parametrize("where", [0.1, 0.5, 0.99])
def test_one_flipped_bit_changes_the_fingerprint(folder, where):
    before = checkpoint.fingerprint(folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    data[start + int((len(data) - start) * where)] ^= 1
    path.write_bytes(data)
    assert checkpoint.fingerprint(folder) != before


def test_fingerprint_tells_names_shapes_and_dtypes_apart(tmp_path):
    seen = set()
    for i, tensors in enumerate(
        [
            {"a": torch.zeros(4)},
            {"b": torch.zeros(4)},
            {"a": torch.zeros(2, 2)},
            {"a": torch.zeros(4, dtype=torch.int32)},
        ]
    ):
        (tmp_path / str(i)).mkdir()
        save_file(tensors, tmp_path / str(i) / "model.safetensors")
        seen.add(checkpoint.fingerprint(tmp_path / str(i)))
    assert len(seen) == 4


def test_memo_saves_reading_until_a_file_changes(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "LARGE", 0)  # small ones are read every time
    memo: dict[str, str] = {}
    before = checkpoint.fingerprint(folder, memo)
    monkeypatch.setattr(checkpoint, "pread_into", None)  # reading now would fail
    assert checkpoint.fingerprint(folder, memo) == before
    monkeypatch.undo()
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert checkpoint.fingerprint(folder, memo) != before


def test_digest_of_tensors_larger_than_a_block(tmp_path):
    tensors = {"big": torch.arange(3 * checkpoint.BLOCK + 5, dtype=torch.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = checkpoint.fingerprint(tmp_path)
    tensors["big"][2 * checkpoint.BLOCK] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert checkpoint.fingerprint(tmp_path) != before


# ---- side files


def test_side_files_are_copied_config_last(folder, tmp_path):
    for name in (
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE",
        "modeling_x.py",
        "README.md",
        "trainer_state.json",
    ):
        (folder / name).write_text("{}")
    target = tmp_path / "target"
    target.mkdir()
    names = side_files.copy_side_files(folder, target)
    assert names[-1] == "config.json"
    assert set(names) == {
        *("config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE", "modeling_x.py")
    }
    assert {p.name for p in target.iterdir()} == set(names)


def test_chat_template_is_found_in_either_place(folder):
    assert side_files.chat_template(folder) is None
    (folder / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    assert side_files.chat_template(folder) == "old"
    (folder / "chat_template.jinja").write_text("new")
    assert side_files.chat_template(folder) == "new"


def test_load_file_agrees_on_values(folder):
    loaded, head = load_file(folder / "model.safetensors"), checkpoint.read_headers(folder)
    raw = checkpoint.read_tensor(head, "model.embed.weight")
    info = head.tensors["model.embed.weight"]
    assert np.array_equal(dtypes.to_float(raw, info.dtype, np.float32), loaded["model.embed.weight"].float().numpy())
    with pytest.raises(CheckpointError, match="no tensor"):
        checkpoint.read_tensor(head, "model.nothing")
