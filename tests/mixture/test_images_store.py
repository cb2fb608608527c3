"""Image mixtures from files to encoded rows: what is kept where, what is noticed, and what is in memory at a time."""

import base64
import copy
import gc
import gzip
import io
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from merit.errors import MixtureError
from merit.hf.images import digest, read_image
from merit.mixture import load_split, part
from merit.mixture.formats import to_chat
from merit.mixture.found import refuse_images
from merit.mixture.images import ImageFile, ImageFolder, image_threads, look_at_images
from merit.mixture.part import Part, cut_by_column
from merit.mixture.sources import Source
from merit.report import images as image_tables
from mixture.mixture_cases import as_base, check_images, check_sources, discover, prepare_mixture, source_fingerprints

IMAGE_COLUMN = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(seed, size=(24, 16), kind="PNG"):
    """The bytes of a small image of its own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def file(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def lines(path, rows):
    return file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def llava(image, answer="yes", question="<image>\nIs it?", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns, **more}


def parquet(path, datas, answers=None, column="image", rows_per_group=1024, **columns):
    """Rows with embedded images as the hub's files have them, the library's own metadata included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = answers or [f"answer {i}" for i in range(len(datas))]
    several = column == "images"
    embedded = [
        [{"bytes": d, "path": "x.png"} for d in data] if several else data and {"bytes": data, "path": "x.png"}
        for data in datas
    ]
    table = pa.table(
        {
            column: pa.array(embedded, pa.list_(IMAGE_COLUMN) if several else IMAGE_COLUMN),
            "prompt": [f"q {i}" for i in range(len(datas))],
            "completion": answers,
            **columns,
        }
    )
    feature = {"_type": "Image"}
    features = {column: [feature] if several else feature} | {
        name: {"dtype": "string", "_type": "Value"} for name in ("prompt", "completion", *columns)
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows_per_group)
    return path


def listed(path, name="d", **more):
    return {"datasets": [{"name": name, "path": str(path), **more}]}


def used(folder, split="train", name="d"):
    dataset = load_split(folder, split)[name]
    return [dataset[i] for i in range(len(dataset))]


# ---- paths ---------------------------------------------------------------------------------------------------------


def test_image_files_are_referred_to_where_they_lie(recipe, seeing, tmp_path):
    data = [picture(i, (10 + i, 12)) for i in range(3)]
    for i, content in enumerate(data):
        file(tmp_path / "d" / "pictures" / f"{i}.png", content)
    rows = [llava("pictures/0.png"), llava(["pictures/1.png", "pictures/2.png"], question="<image> or <image>?")]
    rows += [
        llava(None, question="Hi?"),
        {"conversations": rows[0]["conversations"][:0] + llava("", question="Ho?")["conversations"]},
    ]
    path = lines(tmp_path / "d" / "train.jsonl", rows)
    [counts] = prepare_mixture(recipe(listed(path)), seeing, tmp_path / "out")
    assert (counts.rows, counts.images, counts.image_bytes, counts.rows_dropped) == (4, 3, 0, {})
    assert not (tmp_path / "out" / "images").exists()
    refs = [row.images for row in used(tmp_path / "out")]
    assert [[ref.file for ref in row] for row in refs] == [
        [str(tmp_path / "d" / "pictures" / "0.png")],
        [str(tmp_path / "d" / "pictures" / f"{i}.png") for i in (1, 2)],
        [],
        [],
    ]
    assert [(ref.width, ref.height, ref.digest) for row in refs for ref in row] == [
        (10 + i, 12, digest(content)) for i, content in enumerate(data)
    ]
    each = seeing.images.text(refs[0][0]).count(seeing.images.token)
    assert counts.image_tokens == 3 * each > 0
    ids = np.concatenate([row.input_ids for row in used(tmp_path / "out")])
    assert int((ids == seeing.images.token_id).sum()) == counts.image_tokens


def test_where_paths_start_from(recipe, seeing, tmp_path):
    """The dataset's own folder, else the mixture's, else that of the data file."""
    for place, size in (("own", (11, 11)), ("shared", (12, 12)), ("data", (13, 13))):
        file(tmp_path / place / "a.png", picture(1, size))
    path = lines(tmp_path / "data" / "x.jsonl", [llava("a.png")])

    def width(dataset, images):
        mixture = {**listed(path, **dataset), "images": images}
        prepare_mixture(recipe(mixture), seeing, tmp_path / "out")
        return used(tmp_path / "out")[0].images[0].width

    with pytest.raises(MixtureError, match="elsewhere is not a folder"):
        width({"images": str(tmp_path / "elsewhere")}, {})
    shared = {"folder": str(tmp_path / "shared")}
    assert width({"images": str(tmp_path / "own")}, shared) == 11
    assert width({}, shared) == 12
    assert width({}, {}) == 13


def test_sub_folders_have_their_images_beside_their_rows(recipe, seeing, tmp_path):
    for name, side in (("one", 9), ("two", 10)):
        file(tmp_path / "m" / name / "a.png", picture(1, (side, side)))
        lines(tmp_path / "m" / name / "train.jsonl", [llava("a.png")])
    prepare_mixture(recipe({"folder": str(tmp_path / "m")}), seeing, tmp_path / "out")
    assert [used(tmp_path / "out", name=name)[0].images[0].width for name in ("one", "two")] == [9, 10]


def test_one_annotation_file_gives_a_dataset_per_task(recipe, seeing, tmp_path):
    """Vision-FLAN's form: one JSON list, task names in a column, images in a folder of their own."""
    for i in range(4):
        file(tmp_path / "images_191task_1k" / f"t_{i}.jpg", picture(i, (20 + i, 20), "JPEG"))
    rows = [{"id": str(i), "task_name": ("b+c", "a")[i % 2], **llava(f"t_{i}.jpg", f"a{i}")} for i in range(4)]
    path = file(tmp_path / "annotation.json", json.dumps(rows, indent=1).encode())
    mixture = {
        "path": str(path),
        "split_by": "task_name",
        "images": {"folder": str(tmp_path / "images_191task_1k")},
    }
    counts = prepare_mixture(recipe(mixture), seeing, tmp_path / "out")
    assert [(entry.name, entry.rows, entry.images) for entry in counts] == [("a", 2, 2), ("b+c", 2, 2)]
    assert [row.images[0].width for row in used(tmp_path / "out", name="a")] == [21, 23]


# ---- embedded ------------------------------------------------------------------------------------------------------


def test_embedded_images_lie_once_each_in_one_file(recipe, seeing, tmp_path):
    one, two, three = (picture(i, (10 + i, 9)) for i in range(3))
    path = parquet(tmp_path / "x.parquet", [[one], [two, one], [], [three, three]], column="images")
    [counts] = prepare_mixture(recipe(listed(path, test=str(path))), seeing, tmp_path / "out")
    store = tmp_path / "out" / "images" / "train" / "d.bin"
    assert store.read_bytes() == one + two + three
    assert (counts.images, counts.test_images, counts.image_bytes) == (5, 5, len(one + two + three))
    refs = [row.images for row in used(tmp_path / "out")]
    assert [[ref.file for ref in row] for row in refs] == [[str(store)] * n for n in (1, 2, 0, 2)]
    for ref, data in zip([ref for row in refs for ref in row], (one, two, one, three, three), strict=True):
        assert (np.asarray(read_image(ref)) == pixels(data)).all()
    assert (tmp_path / "out" / "images" / "test" / "d.bin").read_bytes() == store.read_bytes()
    assert sorted(path.name for path in (tmp_path / "out" / "images").rglob("*.*")) == ["d.bin", "d.bin"]
    # The folder may be moved.
    (tmp_path / "out").rename(tmp_path / "moved")
    assert (np.asarray(read_image(used(tmp_path / "moved")[1].images[0])) == pixels(two)).all()


def test_a_budget_keeps_the_images_of_used_rows_only(recipe, seeing, tmp_path):
    datas = [picture(i) for i in range(30)]
    path = parquet(tmp_path / "x.parquet", datas)
    [counts] = prepare_mixture(recipe({**listed(path), "samples": 4}), seeing, tmp_path / "out")
    rows = used(tmp_path / "out")
    by_digest = {digest(data): data for data in datas}
    kept = [by_digest[row.images[0].digest] for row in rows]
    assert len(kept) == 4
    assert kept == sorted(kept, key=datas.index)
    assert (tmp_path / "out" / "images" / "train" / "d.bin").read_bytes() == b"".join(kept)
    assert counts.image_bytes == len(b"".join(kept))
    for row, data in zip(rows, kept, strict=True):
        assert (np.asarray(read_image(row.images[0])) == pixels(data)).all()


def test_a_budget_of_few_rows_looks_at_few_images(recipe, seeing, tmp_path):
    rows = [llava(f"{i}.png") for i in range(100)]
    for i in range(100):
        file(tmp_path / f"{i}.png", picture(i))
    path = lines(tmp_path / "x.jsonl", rows)
    settings = recipe({**listed(path), "samples": 5})
    [counts] = prepare_mixture(settings, seeing, tmp_path / "out")
    names = [Path(row.images[0].file).name for row in used(tmp_path / "out")]
    assert len(names) == counts.images == 5
    for i in range(100):
        if f"{i}.png" not in names:
            (tmp_path / f"{i}.png").unlink()
    [again] = prepare_mixture(settings, seeing, tmp_path / "out")
    assert again == counts


@pytest.mark.parametrize("budget", [{"samples": 5}, {"tokens": 40}])
@pytest.mark.parametrize("kind", ["parquet", "cut", "hub"])
def test_a_budget_of_few_rows_puts_few_embedded_images_on_disk(recipe, seeing, tmp_path, monkeypatch, budget, kind):
    """And gives the rows that it gives where the whole file is at hand: the draw does not depend on how they are read."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datas = [picture(i) for i in range(300)]
    datas[::7] = [None] * len(datas[::7])  # text rows between them
    path = parquet(tmp_path / "hub" / "train.parquet", datas, rows_per_group=70, task=["d"] * 300)
    rows = [
        {"prompt": f"q {i}", "completion": f"answer {i}"} | ({"image": f"{i}.png"} if data else {})
        for i, data in enumerate(datas)
    ]
    for i, data in enumerate(datas):
        file(tmp_path / "paths" / f"{i}.png", data or b"")
    plain = listed(lines(tmp_path / "paths" / "x.jsonl", rows))
    mixture = {"path": str(path), "split_by": "task"} if kind == "cut" else listed(path)
    puts = []
    real = ImageFile.put
    monkeypatch.setattr(ImageFile, "put", lambda self, data: puts.append(data) or real(self, data))
    if kind == "hub":
        monkeypatch.setattr(
            "merit.mixture.sources._part", lambda *_, **__: Part("h", hub=(str(path.parent), None, "train"))
        )
    prepare_mixture(recipe({**mixture, **budget}), seeing, tmp_path / "out")
    monkeypatch.undo()
    assert 0 < len(puts) <= 70
    prepare_mixture(recipe({**plain, **budget}), seeing, tmp_path / "plain")
    seen, expected = used(tmp_path / "out"), used(tmp_path / "plain")
    assert [row.input_ids.tolist() for row in seen] == [row.input_ids.tolist() for row in expected]
    assert [[ref.digest for ref in row.images] for row in seen] == [[r.digest for r in row.images] for row in expected]
    for row in seen:
        for ref in row.images:
            read_image(ref)


@pytest.mark.parametrize("kind", ["parquet", "several", "cut", "budget", "hub", "base64", "gz", "renamed", "paths"])
def test_the_disk_that_embedded_images_take_is_known_before_they_are_read(recipe, seeing, tmp_path, monkeypatch, kind):
    """Fails on commit f5727a1 (B10): the plan's disk left them out."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datas = [picture(i, (48, 32 + i % 3)) for i in range(60)]
    path = parquet(tmp_path / "hub" / "train.parquet", datas, rows_per_group=25, task=["d", "e", "d"] * 20)
    mixture = listed(path, test=str(path))
    if kind == "several":
        mixture = listed(parquet(tmp_path / "s.parquet", [datas[i : i + 2] for i in range(0, 60, 2)], column="images"))
    elif kind == "cut":
        mixture = {"path": str(path), "split_by": "task"}
    elif kind == "budget":
        mixture = {**listed(path), "samples": 12}
    elif kind == "renamed":
        mixture = listed(parquet(tmp_path / "r.parquet", datas, column="photo"), columns={"image": "photo"})
    elif kind == "hub":
        mixture = listed(path)
        hub = Part("h", hub=(str(path.parent), None, "train"))
        monkeypatch.setattr("merit.mixture.sources._part", lambda *_, **__: hub)
    elif kind in ("base64", "gz"):
        rows = [llava("data:image/png;base64," + base64.b64encode(data).decode()) for data in datas]
        written = lines(tmp_path / "x.jsonl", rows)
        if kind == "gz":
            written = file(tmp_path / "x.jsonl.gz", gzip.compress(written.read_bytes()))
        mixture = listed(written)
    elif kind == "paths":
        names = [file(tmp_path / f"{i}.png", data).name for i, data in enumerate(datas)]
        mixture = listed(lines(tmp_path / "x.jsonl", [llava(name) for name in names]))
    found = recipe(mixture)
    expected = sum(item.embedded_bytes for item in check_sources(found))
    prepare_mixture(found, seeing, tmp_path / "out")
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("images/*/*"))
    assert expected == pytest.approx(stored, rel=0.05)
    assert (stored == 0) == (kind == "paths")


def test_rows_are_read_again_by_their_numbers(recipe, tmp_path):
    for name, count in (("a", 5), ("b", 7)):
        parquet(tmp_path / "d" / f"{name}.parquet", [picture(i) for i in range(count)], rows_per_group=3)
    [source] = discover(recipe(listed(tmp_path / "d")).mixture)
    rows = list(source.train.read())
    for numbers in ([], [0], [11], [4, 5], [1, 3, 6, 10], list(range(12))):
        assert list(source.train.again(numbers)) == [rows[i] for i in numbers]
    assert source.train.by_number
    assert not discover(recipe(listed(lines(tmp_path / "x.jsonl", [llava("a.png")]))).mixture)[0].train.by_number


def test_the_same_mixture_gives_the_same_files(recipe, seeing, tmp_path):
    path = parquet(tmp_path / "x.parquet", [picture(i) for i in range(40)])
    for folder in ("a", "b"):
        prepare_mixture(recipe({**listed(path), "samples": 25}), seeing, tmp_path / folder)
    a, b = (
        {str(p.relative_to(tmp_path / f)): p.read_bytes() for p in (tmp_path / f).rglob("*") if p.is_file()}
        for f in "ab"
    )
    assert a == b


def test_one_file_with_embedded_images_is_cut_by_a_column(recipe, seeing, tmp_path):
    datas = [picture(i, (10 + i, 10)) for i in range(70)]
    source = ["one" if i < 40 or i % 2 else "two" for i in range(70)]
    path = parquet(tmp_path / "x.parquet", datas, data_source=source, rows_per_group=33)
    mixture = recipe({"path": str(path), "split_by": "data_source"})
    for found in discover(mixture.mixture):
        places = [place for place, _ in found.train.read()]
        wanted = [i for i in range(70) if source[i] == found.name]
        assert places == [f"{path}, row {i + 1}" for i in wanted]
        assert [row["image"]["bytes"] for _, row in found.train.read()] == [datas[i] for i in wanted]
        assert found.train.count() == len(wanted)
    prepare_mixture(mixture, seeing, tmp_path / "out")
    assert [row.images[0].width for row in used(tmp_path / "out", name="two")] == [
        10 + i for i in range(70) if source[i] == "two"
    ]
    with pytest.raises(MixtureError, match=r"no column 'dta_source'.*data_source"):
        discover(recipe({"path": str(path), "split_by": "dta_source"}).mixture)


@pytest.mark.parametrize("free", [2**40, 2**20])
def test_a_file_whose_datasets_lie_all_over_it_is_read_once_if_there_is_room(
    recipe, seeing, tmp_path, monkeypatch, free
):
    count, datasets = 90, 6
    datas = [picture(i, (10 + i, 10)) for i in range(count)]
    source = [f"d{i % datasets}" for i in range(count)]
    path = parquet(tmp_path / "x.parquet", datas, data_source=source, rows_per_group=30)
    reads: list[object] = []
    inner = part.read_file
    monkeypatch.setattr(
        part, "read_file", lambda file, *rest, **more: (reads.append(rest or more), inner(file, *rest, **more))[1]
    )
    monkeypatch.setattr(part, "free_bytes", lambda _folder: free)
    prepare_mixture(recipe({"path": str(path), "split_by": "data_source"}), seeing, tmp_path / "out")
    for k in range(datasets):
        widths = [row.images[0].width for row in used(tmp_path / "out", name=f"d{k}")]
        assert widths == [10 + i for i in range(k, count, datasets)]
    whole = [given for given in reads if not given]
    assert len(whole) == (1 if free > 2**30 else 0)
    assert len(reads) <= 4 if whole else len(reads) > datasets


def test_images_are_never_all_in_memory(recipe, seeing, tmp_path):
    """60 images of 1 MiB each go through; as many as are looked at side by side may be held."""
    size = 2**20
    # Bytes after a PNG's end are no part of the image: large files that are quick to decode.
    datas = [picture(i, (4, 4)) + bytes([i]) * size for i in range(60)]
    path = parquet(tmp_path / "x.parquet", datas, rows_per_group=60)
    column = parquet(tmp_path / "y.parquet", datas, rows_per_group=60, task=["t"] * 60)
    del datas
    gc.collect()
    arrow = pa.default_memory_pool()
    held = 3 * image_threads() + 1
    for mixture in (listed(path), {"path": str(column), "split_by": "task"}):
        settings = recipe(mixture)
        before = arrow.bytes_allocated()
        tracemalloc.start()
        prepare_mixture(settings, seeing, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # A batch of 32 rows is in Python's hands, and the images in flight; never all 60.
        assert peak < (32 + held + 4) * size
        assert arrow.bytes_allocated() - before < 2 * size
        assert sum(f.stat().st_size for f in (tmp_path / "out" / "images").rglob("*.bin")) > 60 * size


def test_rows_in_flight_are_few_and_come_in_order(recipe, tmp_path, monkeypatch):
    from merit.mixture import images

    monkeypatch.setattr(images, "image_threads", lambda: 3)
    path = parquet(tmp_path / "x.parquet", [picture(i) if i % 3 else None for i in range(50)])
    source = discover(recipe(listed(path)).mixture)[0]
    taken = 0

    class Counted(type(source.train)):
        def read(self, limit=None):
            nonlocal taken
            for item in super().read(limit):
                taken += 1
                yield item

    part = Counted(source.train.where, source.train.files, folder=source.train.folder)
    ahead = []
    for number, (place, _, seen) in enumerate(
        look_at_images(
            part.chats("prompt_completion"), ImageFolder([part.folder], recipe(listed(path)).mixture.images)
        ),
        start=1,
    ):
        assert place.endswith(f", row {number}")
        assert bool(seen) == bool((number - 1) % 3)
        ahead.append(taken - number)
    assert number == 50
    assert max(ahead) <= 2 * 3 + 4  # images in flight, and rows without one between them


def test_hub_rows_come_undecoded(recipe, tmp_path, monkeypatch):
    """A local folder read as the hub is: the library would hand out decoded images by default."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    one, broken = picture(1), b"no image at all"
    parquet(tmp_path / "hub" / "train.parquet", [[one, broken], [one]], column="images")
    table = datasets.load_dataset(str(tmp_path / "hub"), split="train")
    assert isinstance(table.features["images"].feature, datasets.Image)
    part = Part("hub", hub=(str(tmp_path / "hub"), None, "train"))
    rows = [row for _, row in part.read()]
    assert [[item["bytes"] for item in row["images"]] for row in rows] == [[one, broken], [one]]
    assert to_chat(rows[0], "prompt_completion").raw == (one, broken)
    assert part.count() == 2
    groups = cut_by_column(part, "prompt", {})
    assert {value: [place for place, _ in group.read()] for value, group in groups.items()} == {
        "q 0": [f"{tmp_path / 'hub'} [train], row 1"],
        "q 1": [f"{tmp_path / 'hub'} [train], row 2"],
    }
    assert [row for _, row in groups["q 1"].read()] == rows[1:]
    with pytest.raises(MixtureError, match=r"no column 'propmt'.*'prompt'"):
        cut_by_column(part, "propmt", {})


def test_image_files_of_hub_datasets_lie_in_its_cache(recipe, tmp_path, monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    inside, outside = file(tmp_path / "cache" / "a.png", picture(1)), file(tmp_path / "b.png", picture(1))
    limits = recipe(listed(outside)).mixture.images
    part = Part("x/y", hub=("x/y", None, "train"))
    source = Source("d", part, None)
    folder = source.image_folder(part, limits)
    assert folder.look(str(inside)).width == 24
    for path, words in ((str(outside), "leads out"), ("a.png", "no folder is given")):
        with pytest.raises(Exception, match=words):
            folder.look(path)
    assert replace(source, images=str(tmp_path / "cache")).image_folder(part, limits).look("a.png").file == str(inside)


# ---- what is wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """A dataset with one good row and one of every fault; the reasons in order."""
    good = picture(1, (64, 48))
    file(tmp_path / "d" / "good.png", good)
    file(tmp_path / "d" / "cut.png", good[: len(good) // 2])
    file(tmp_path / "d" / "page.jpg", b"<!DOCTYPE html><p>404")
    file(tmp_path / "d" / "large.png", picture(2, (101, 100)))
    file(tmp_path / "outside.png", good)
    (tmp_path / "d" / "link.png").symlink_to(tmp_path / "outside.png")
    rows = [
        (llava("good.png"), None),
        (llava("gone.png"), "image_missing"),
        (llava("cut.png"), "image_damaged"),
        (llava("page.jpg"), "image_format"),
        (llava("large.png"), "image_too_large"),
        (llava("../outside.png"), "image_outside"),
        (llava("link.png"), "image_outside"),
        (llava("https://example.org/a.png"), "image_url"),
        (llava(["good.png", "cut.png"], question="<image><image>q"), "image_damaged"),
        (llava(["good.png", "good.png"]), "image_count"),
        (llava("good.png", "again"), None),
    ]
    path = lines(tmp_path / "d" / "x.jsonl", [row for row, _ in rows])
    return path, [reason for _, reason in rows]


def settings(path, bad):
    return {**listed(path), "images": {"bad": bad, "max_file_pixels": 10000}}


def test_rows_with_bad_images_are_dropped_and_counted(recipe, seeing, tmp_path, damaged):
    path, reasons = damaged
    [counts] = prepare_mixture(recipe(settings(path, "drop")), seeing, tmp_path / "out")
    expected = {reason: reasons.count(reason) for reason in sorted({r for r in reasons if r})}
    assert counts.rows_dropped == expected
    assert (counts.rows, counts.images, counts.source_rows) == (2, 2, len(reasons))
    assert (tmp_path / "out" / "images").exists() is False


def test_or_stop_with_one_message(recipe, seeing, tmp_path, damaged):
    path, reasons = damaged
    all_rows = path.read_text().splitlines(keepends=True)
    said = {
        "image_missing": "gone.png is not there",
        "image_damaged": "cut.png: it cannot be decoded",
        "image_format": "page.jpg: it is not a JPEG, .*it looks like an HTML page",
        "image_too_large": r"large.png: it has 101 x 100 pixels, more than mixture.images.max_file_pixels \(10000\)",
        "image_outside": "(outside|link).png leads out of .*d",
        "image_url": "https://example.org/a.png",
        "image_count": "2 images and 1 place",
    }
    for row, reason in zip(all_rows, reasons, strict=True):
        if reason is None:
            continue
        path.write_text(all_rows[0] + row)
        for attempt in (
            lambda: prepare_mixture(recipe(settings(path, "error")), seeing, tmp_path / "out"),
            lambda: check_sources(recipe(settings(path, "error"))),
        ):
            with pytest.raises(MixtureError, match=rf"Dataset d: .*x\.jsonl, line 2: .*{said[reason]}") as caught:
                attempt()
            assert "mixture.images.bad: drop" in str(caught.value)
        assert not list((tmp_path / "out").iterdir())


def test_bad_rows_and_bad_images_are_two_settings(recipe, seeing, tmp_path):
    file(tmp_path / "a.png", picture(1))
    path = lines(tmp_path / "x.jsonl", [llava("a.png"), llava("a.png", ""), llava("b.png")])
    both = {"images": {"bad": "drop"}, "bad_rows": "drop"}
    with pytest.raises(MixtureError, match=r"line 2: .*no text(.|\n)*mixture\.bad_rows: drop"):
        prepare_mixture(recipe({**listed(path), **both, "bad_rows": "error"}), seeing, tmp_path / "out")
    with pytest.raises(MixtureError, match=r"line 3: .*not there(.|\n)*mixture\.images\.bad: drop"):
        prepare_mixture(recipe({**listed(path), **both, "images": {"bad": "error"}}), seeing, tmp_path / "out")
    [counts] = prepare_mixture(recipe({**listed(path), **both}), seeing, tmp_path / "out")
    assert counts.rows_dropped == {"empty_answer": 1, "image_missing": 1}


def test_a_text_only_base_refuses_rows_with_images(recipe, byte_level, tmp_path):
    file(tmp_path / "a.png", picture(1))
    path = lines(tmp_path / "x.jsonl", [llava(None, question="q"), llava("a.png")])
    drop = {"images": {"bad": "drop"}, "bad_rows": "drop"}
    with pytest.raises(MixtureError, match=r"Dataset d: .*line 2: the row has images, but the base .*text-only"):
        prepare_mixture(recipe({**listed(path), **drop}), byte_level, tmp_path / "out")
    [summary] = check_sources(recipe(listed(path)))
    assert summary.first_image == f"{path}, line 2"
    with pytest.raises(MixtureError, match=r"Dataset d: .*line 2: the row has images, but the base .*text-only"):
        refuse_images([summary])


def test_text_rows_are_fine_for_a_base_that_sees(recipe, seeing, tmp_path):
    path = lines(tmp_path / "x.jsonl", [{"prompt": "q", "completion": "a"}])
    [counts] = prepare_mixture(recipe(listed(path)), seeing, tmp_path / "out")
    assert (counts.rows, counts.images, counts.image_tokens) == (1, 0, 0)


def test_the_check_names_every_bad_image_and_the_sizes(recipe, tmp_path, damaged):
    path, reasons = damaged
    file(tmp_path / "e" / "a.png", picture(5, (30, 20)))
    other = lines(tmp_path / "e" / "x.jsonl", [llava("a.png"), llava("a.png"), llava(None, question="q")])
    mixture = settings(path, "error")
    mixture["datasets"].append({"name": "e", "path": str(other), "test": str(other)})
    ticks = []
    report = check_images(recipe(mixture), lambda *tick: ticks.append(tick))
    assert [(entry.dataset, entry.place, entry.reason) for entry in report.bad] == [
        ("d", f"{path}, line {i + 1}", reason) for i, reason in enumerate(reasons) if reason
    ]
    d, e = report.datasets
    assert (d.rows, d.images, d.distinct, sum(d.bad.values())) == (len(reasons), 3, 1, 9)
    assert (e.rows, e.rows_with_images, e.images, e.distinct, e.bad) == (6, 4, 4, 1, {})
    assert (e.pixels["min"], e.pixels["max"], e.widest) == (600, 600, (30, 20))
    assert report.fatal
    assert ticks[-1][:2] == (len(reasons) + 6, len(reasons) + 6)
    assert json.loads(json.dumps(report.facts()))["bad"][0]["reason"] == "image_missing"
    assert not check_images(recipe(settings(path, "drop"))).fatal
    fine = check_images(recipe(listed(other)))
    assert (fine.fatal, fine.bad) == (False, [])
    assert image_tables.render(fine)[1:] == ["Every image can be used."]


def test_the_command_prints_them_and_says_so_in_its_exit_code(tmp_path, damaged):
    from typer.testing import CliRunner

    from merit.cli.commands import app

    path, _ = damaged
    content = {"name": "r", "model": {"base": "none"}, "mixture": settings(path, "error"), "split": {"method": "joint"}}
    text = file(tmp_path / "recipe.yaml", json.dumps(content).encode())
    said = CliRunner().invoke(app, ["check", str(text), "--images", "--offline", "--quiet"], env={"COLUMNS": "200"})
    assert said.exit_code == 2
    for words in ("Images that cannot be used", "gone.png is not there", "x.jsonl, line 9", "9 images cannot be used"):
        assert words in said.output
    asked = ["check", str(text), "--images", "--offline", "--json", "--quiet"]
    drop = CliRunner().invoke(app, [*asked, "--set", "mixture.images.bad=drop"])
    assert drop.exit_code == 0
    assert len(json.loads(drop.stdout)["images"]["bad"]) == 9
    assert json.loads(CliRunner().invoke(app, asked).stdout)["images"]["fatal"] is True


def test_the_check_finds_what_the_base_would_refuse_and_other_names(recipe, seeing, tmp_path):
    token = seeing.images.token
    file(tmp_path / "photo.jpg", picture(1))  # a PNG under another name: used, and told
    file(tmp_path / "line.png", picture(2, (603, 3)))
    turns = [{"from": "human", "value": f"see {token}"}, {"from": "gpt", "value": "yes"}]
    rows = [llava("photo.jpg"), llava("line.png"), {"conversations": turns}]
    path = lines(tmp_path / "x.jsonl", rows)
    report = check_images(recipe(listed(path)), sight=seeing.images)
    assert [(entry.place, entry.reason) for entry in report.bad] == [
        (f"{path}, line 2", "image_refused"),
        (f"{path}, line 3", "image_token_in_text"),
    ]
    assert "603 x 3" in report.bad[0].detail
    [counts] = report.datasets
    assert (counts.images, counts.renamed) == (2, 1)
    assert counts.renamed_first.endswith("photo.jpg: PNG")
    assert report.fatal
    blind = check_images(recipe(listed(path)))
    assert not blind.fatal
    assert "photo.jpg" in str(image_tables.render(blind)[1])


# ---- what is noticed -----------------------------------------------------------------------------------------------


def test_rows_with_other_images_are_other_rows(recipe, seeing, tmp_path):
    file(tmp_path / "a.png", picture(1))
    file(tmp_path / "b.png", picture(2))
    train = lines(tmp_path / "x.jsonl", [llava("a.png")])
    test = lines(tmp_path / "y.jsonl", [llava("b.png"), llava("a.png")])
    [counts] = prepare_mixture(recipe(listed(train, test=str(test))), seeing, tmp_path / "out")
    assert counts.test_rows_in_train == 1
    file(tmp_path / "a.png", picture(3))
    [changed] = prepare_mixture(recipe(listed(train, test=str(test))), seeing, tmp_path / "out")
    assert changed.fingerprint != counts.fingerprint
    assert changed.tokens == counts.tokens


def test_places_of_images_are_not_lost_characters(recipe, tmp_path, seeing, dropping):
    """A tokenizer that knows few characters does not know the sign that stands for an image, and need not."""
    tokenizer = copy.deepcopy(dropping)
    tokenizer.add_special_tokens({"additional_special_tokens": [seeing.images.token]})
    tokenizer.chat_template = seeing.tokenizer.chat_template
    images = copy.copy(seeing.images)
    images.token_id = tokenizer.convert_tokens_to_ids(images.token)
    file(tmp_path / "a.png", picture(1))
    path = lines(tmp_path / "x.jsonl", [llava("a.png")])
    [counts] = prepare_mixture(recipe(listed(path)), as_base(tokenizer, images), tmp_path / "out")
    assert counts.images == 1
    assert counts.characters_lost == {"prompt": 0.0, "answer": 0.0, "all": 0.0}


def test_a_changed_image_file_changes_its_sources_fingerprint(recipe, tmp_path):
    file(tmp_path / "a.png", picture(1))
    with_images = lines(tmp_path / "x.jsonl", [llava("a.png"), llava("b.png")])
    text = lines(tmp_path / "t.jsonl", [{"prompt": "an image", "completion": "a"}])
    embedded = parquet(tmp_path / "e.parquet", [picture(1)])
    mixture = listed(with_images)
    mixture["datasets"] += [{"name": "t", "path": str(text)}, {"name": "e", "path": str(embedded)}]
    memo = {}

    def found():
        known = source_fingerprints(recipe(mixture), memo)
        assert known == source_fingerprints(recipe(mixture))  # the memo changes nothing
        return known

    first = found()
    assert found() == first
    changes = []
    file(tmp_path / "b.png", picture(2))  # one that was missing
    changes.append(found())
    file(tmp_path / "a.png", picture(1) + b"more")
    changes.append(found())
    (tmp_path / "a.png").touch()  # a copy on another machine has other times
    assert found() == changes[-1]
    assert len({entry["d"] for entry in (first, *changes)}) == 3
    assert all((entry["t"], entry["e"]) == (first["t"], first["e"]) for entry in changes)


def test_datasets_cut_by_a_column_follow_their_files(recipe, tmp_path):
    """Also where the file is a folder's, or a listed dataset's."""

    def prints(mixture):
        return source_fingerprints(recipe(mixture))

    row = {"prompt": "q", "completion": "a", "task": "t"}
    folder = tmp_path / "f"
    mixtures = ({"path": str(folder), "split_by": "task"}, {"path": str(folder / "x.jsonl"), "split_by": "task"})
    lines(folder / "x.jsonl", [row])
    before = [prints(mixture) for mixture in mixtures]
    lines(folder / "x.jsonl", [row | {"completion": "b"}])
    for mixture, earlier in zip(mixtures, before, strict=True):
        assert prints(mixture).keys() == earlier.keys() == {"t"}
        assert prints(mixture) != earlier


def test_fingerprints_of_text_mixtures_are_as_before(recipe, tmp_path):
    """The hash of the files' hashes, so that runs made before images are still current."""
    import hashlib

    path = lines(tmp_path / "x.jsonl", [{"prompt": "an image", "completion": "a"}])
    content = {"train": [hashlib.sha256(path.read_bytes()).hexdigest()]}
    expected = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    assert source_fingerprints(recipe(listed(path))) == {"d": expected}


def test_a_failed_run_leaves_the_earlier_images(recipe, seeing, tmp_path):
    good, bad = parquet(tmp_path / "x.parquet", [picture(1)]), parquet(tmp_path / "y.parquet", [picture(2), b"broken"])
    prepare_mixture(recipe(listed(good)), seeing, tmp_path / "out")
    before = (tmp_path / "out" / "images" / "train" / "d.bin").read_bytes()
    with pytest.raises(MixtureError, match=r"row 2: its image: it is not a JPEG"):
        prepare_mixture(recipe(listed(bad)), seeing, tmp_path / "out")
    assert (tmp_path / "out" / "images" / "train" / "d.bin").read_bytes() == before
    assert not (tmp_path / "out" / ".unfinished").exists()
