"""Show whether two run folders hold the same answers, stage by stage: the proof that a refactor changed nothing.

Records, times and file layout inside Parquet may differ; rows, geometry, groups, losses, weights and figures may not.
Exit code 0 where all is the same, 1 where something differs.

Example:
    python scripts/compare_runs.py runs/before runs/after
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pyarrow import parquet

GEOMETRY = ("names", "gram", "cosine", "scores", "explained_variance")
FIGURES = ("results", "kept", "drift")


@dataclass(frozen=True)
class Finding:
    """One comparison: what, whether it is the same, and by how much not."""

    what: str
    same: bool
    detail: str = ""


def rows(old: Path, new: Path) -> Finding:
    """Encoded rows of one Parquet file, every column but where the pictures lie."""
    one, other = parquet.read_table(old), parquet.read_table(new)
    if set(one.column_names) != set(other.column_names):
        return Finding("", False, f"columns {one.column_names} -> {other.column_names}")
    columns = [name for name in one.column_names if name != "images"]
    unequal = [name for name in columns if one[name].to_pylist() != other[name].to_pylist()]
    return Finding("", not unequal, " ".join(unequal))


def geometry(old: Path, new: Path) -> Finding:
    """Bits of the arrays that a split is made from."""
    with np.load(old) as one, np.load(new) as other:
        unequal = []
        for name in GEOMETRY:
            if not np.array_equal(one[name], other[name]):
                numbers = one[name].dtype.kind == "f" and one[name].shape == other[name].shape
                unequal.append(f"{name} by {np.abs(one[name] - other[name]).max():.3g}" if numbers else name)
    return Finding("", not unequal, ", ".join(unequal))


def groups(old: Path, new: Path) -> Finding:
    """Which dataset is in which group."""
    return Finding("", read(old)["groups"] == read(new)["groups"])


def losses(tolerance: float) -> Callable[[Path, Path], Finding]:
    """Comparison of every step's loss (within ``tolerance``, relative where the loss is above 1) and target tokens."""

    def compare(old: Path, new: Path) -> Finding:
        one, other = ([json.loads(line) for line in path.read_text().splitlines()] for path in (old, new))
        pairs = list(zip(one, other, strict=False))
        apart = max((abs(a["loss"] - b["loss"]) / max(1.0, abs(a["loss"])) for a, b in pairs), default=0.0)
        counted = all(a["target_tokens"] == b["target_tokens"] for a, b in pairs)
        same = len(one) == len(other) and counted and apart <= tolerance
        return Finding("", same, f"{len(one)} and {len(other)} steps, losses differ by {apart:.3g} at most")

    return compare


def weights(old: Path, new: Path) -> Finding:
    """Bytes of a weight file."""
    one, other = (hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in (old, new))
    return Finding("", one == other, "" if one == other else f"{one} -> {other}")


def figures(old: Path, new: Path) -> Finding:
    """Every number of an evaluation."""
    apart = distance(read(old), read(new))
    return Finding("", apart == 0, f"differ by {apart:.3g} at most" if apart else "")


def read(path: Path) -> dict[str, object]:
    """A JSON object."""
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict), path
    return value


def distance(one: object, other: object) -> float:
    """Largest difference of two numbers at the same place; infinite where a place is missing or holds something else."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return max((distance(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other)
    return 0.0 if one == other else math.inf


def compare(old: Path, new: Path, tolerance: float = 1e-6) -> Iterator[Finding]:
    """Compare what both run folders hold; what is missing in either differs."""
    kinds: tuple[tuple[str, Callable[[Path, Path], Finding]], ...] = (
        ("mixture/*/*.parquet", rows),
        ("conflict/geometry.npz", geometry),
        ("**/split/split.json", groups),
        ("**/branches/*/log.jsonl", losses(tolerance)),
        ("**/model/*.safetensors", weights),
        *((f"evaluation/{name}.json", figures) for name in FIGURES),
    )
    for pattern, kind in kinds:
        for name in sorted({path.relative_to(run) for run in (old, new) for path in run.glob(pattern)}):
            missing = [str(run) for run in (old, new) if not (run / name).is_file()]
            if missing:
                yield Finding(str(name), False, f"missing in {missing[0]}")
            else:
                found = kind(old / name, new / name)
                yield Finding(str(name), found.same, found.detail)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, print one line per comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="run folder made before the change")
    parser.add_argument("new", type=Path, help="run folder of the same recipe made after it")
    parser.add_argument("--loss-tolerance", type=float, default=1e-6, help="for losses per step (default %(default)s)")
    given = parser.parse_args(argv)
    found = list(compare(given.old, given.new, given.loss_tolerance))
    for item in found:
        print("same" if item.same else "DIFF", item.what, item.detail)
    different = sum(not item.same for item in found)
    print(f"{len(found) - different} of {len(found)} comparisons are the same" if found else "nothing to compare")
    return int(different > 0 or not found)


if __name__ == "__main__":
    sys.exit(main())
