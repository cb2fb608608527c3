"""From measured quarter-sample vectors to a geometry and a split: CPU seconds and memory at 100, 400 and 1,000 datasets.

    python -m benchmarks.conflict.growth --datasets 100 400 1000

Every size runs in a process of its own, on one thread, through the code of the stages. Vectors are sketches of 2^18 entries
that lie in memory; reading them from disk is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 2**18


class Made:
    """Stands for the store of gradients: quarter p of dataset i is a window of its row, at an offset that depends on p."""

    def __init__(self, count: int) -> None:
        generator = np.random.default_rng(0)
        shape = generator.standard_normal((4, SIZE + 64), dtype=np.float32)
        self.rows = generator.standard_normal((count, SIZE + 64), dtype=np.float32)
        for row in self.rows:
            row *= 0.5
            row += shape.T @ (generator.standard_normal(4, dtype=np.float32) * np.float32([1, 0.5, 0.3, 0.2]))

    def vector(self, keys: Sequence[str], width: int, parts: tuple[int, ...], scale: float) -> Window:
        return Window(self.rows[int(keys[0])], width, parts)


@dataclass(frozen=True)
class Window:
    """A vector that is put together when it is read, as from disk."""

    row: np.ndarray
    width: int
    parts: tuple[int, ...]

    def __len__(self) -> int:
        return self.width

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.width)
        total: np.ndarray = np.sum([self.row[p + start : p + stop] for p in self.parts], axis=0, dtype=np.float32)
        return total


def measure(count: int) -> dict[str, Any]:
    """CPU seconds of the comparison and of the split, and the memory that they add."""
    from merit.conflict.assemble import build_geometry
    from merit.conflict.sample import Measured
    from merit.recipe.schema import ConflictSettings
    from merit.split.stage import split_mixture

    sizes = np.random.default_rng(1).integers(50, 900, count)
    items = [
        Measured(f"d{i:04}", str(i), (str(i),), 200, int(n), 1 / int(n), np.full(4, 50.0), np.full(4, 50.0), width=SIZE)
        for i, n in enumerate(sizes)
    ]
    store: Any = Made(count)
    before = _peak()
    clock = time.process_time()
    geometry = build_geometry(items, [], store, ConflictSettings())
    compared = time.process_time() - clock
    split = split_mixture("pca", 2, weights={item.name: float(item.dataset_rows) for item in items}, geometry=geometry)
    cut = time.process_time() - clock - compared
    assert len(split.groups) == 4
    return {"datasets": count, "geometry": compared, "split": cut, "more_mib": _peak() - before}


def _peak() -> float:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, nargs="+", default=[100, 400, 1000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one)))
        return
    from benchmarks.report import table, write

    threads = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    found = []
    for count in given.datasets:
        words = [sys.executable, "-m", "benchmarks.conflict.growth", "--one", str(count)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=threads)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1], flush=True)
    rows = [
        [item["datasets"], *(f"{item[key]:.1f}" for key in ("geometry", "split")), f"{item['more_mib']:,.0f}"]
        for item in found
    ]
    head = ["datasets", "products, axes, judgement: CPU s", "split and its stability: CPU s", "memory it adds, MiB"]
    sizes = " ".join(map(str, given.datasets))
    write(
        "geometry",
        "Geometry and split of many datasets",
        f"python -m benchmarks.conflict.growth --datasets {sizes}",
        f"One thread, sketches of 2^18, all {SIZE:,} entries read.\n\n{table(head, rows)}",
        {"sizes": found},
    )


if __name__ == "__main__":
    main()
