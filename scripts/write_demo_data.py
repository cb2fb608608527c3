"""Write the data that both demos ship, or check that the generator still gives it: `--check`.

The package holds the rows and pictures of seed 0 as files, one archive per demo; nothing generates data at run time.
The check compares rows and pixels, not compressed bytes: those depend on the versions of Pillow and PyArrow.

Example:
    python scripts/write_demo_data.py --check
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from pyarrow import parquet

from demo_data import pictures, words

DEMO = Path(__file__).parents[1] / "src/merit/demo"
ARCHIVES = {DEMO / "data.tar.xz": words, DEMO / "vision" / "data.tar.xz": pictures}


def generate(folder: Path, module: Any, seed: int = 0) -> None:
    """Generate one demo's ``mixture/``, ``kept/`` and ``unseen/`` into ``folder``."""
    module.write_mixture(folder / "mixture", seed)
    module.write_kept(folder / "kept", seed)
    module.write_unseen(folder / "unseen", seed)


def pack(folder: Path, archive: Path) -> None:
    """Pack a folder; the same files give the same archive."""
    with tarfile.open(archive, "w:xz", preset=9, format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            member = tarfile.TarInfo(path.relative_to(folder).as_posix())
            member.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(member, file)


def content(path: Path) -> Any:
    """What a data file says: parsed rows, or pixels."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".parquet":
        rows = parquet.read_table(path).to_pylist()
        return [row | {"images": [pixels(io.BytesIO(image["bytes"])) for image in row["images"]]} for row in rows]
    return pixels(path)


def pixels(file: Path | io.BytesIO) -> tuple[tuple[int, int], bytes]:
    """Size and RGB values of a picture."""
    with Image.open(file) as image:
        return image.size, image.convert("RGB").tobytes()


def differing(shipped: Path, generated: Path) -> list[str]:
    """Names of files that are in one folder only, or say something else."""
    names = [{path.relative_to(root) for path in root.rglob("*") if path.is_file()} for root in (shipped, generated)]
    both: Iterable[Path] = names[0] & names[1]
    unequal = {name for name in both if content(shipped / name) != content(generated / name)}
    return sorted(str(name) for name in (names[0] ^ names[1]) | unequal)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line; write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the shipped data differs")
    check = parser.parse_args(argv).check
    wrong = 0
    for archive, module in ARCHIVES.items():
        with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as old:
            generate(Path(made), module)
            if not check:
                pack(Path(made), archive)
            with tarfile.open(archive) as tar:
                tar.extractall(old, filter="data")
            names = differing(Path(old), Path(made))
        wrong += len(names)
        print(f"{archive}: {archive.stat().st_size:,} bytes; {len(names)} files differ {' '.join(names[:5])}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
