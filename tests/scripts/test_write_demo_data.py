"""The shipped data: the generator still gives it, and a difference is noticed."""

import tarfile

import write_demo_data


def test_the_generator_gives_the_shipped_rows_and_pixels(capsys):
    assert write_demo_data.main(["--check"]) == 0
    assert sum(archive.stat().st_size for archive in write_demo_data.ARCHIVES) < 3_500_000, "the wheel stays small"


def test_a_changed_row_is_noticed(tmp_path):
    with tarfile.open(next(iter(write_demo_data.ARCHIVES))) as tar:
        for name in ("a", "b"):
            tar.extractall(tmp_path / name, filter="data")
    file = tmp_path / "b" / "mixture" / "swap" / "test.jsonl"
    file.write_text(file.read_text().replace("swap the ends", "change the ends", 1))
    assert write_demo_data.differing(tmp_path / "a", tmp_path / "b") == ["mixture/swap/test.jsonl"]
    file.unlink()
    assert write_demo_data.differing(tmp_path / "a", tmp_path / "b") == ["mixture/swap/test.jsonl"]
