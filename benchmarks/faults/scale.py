"""The whole chain over 100, 400 and 1,000 datasets with a tiny model: time, peak memory and files of each stage.

    python -m benchmarks.faults.scale --datasets 100 400 1000

Each size runs in a process of its own, stage by stage, so that peak memory is that of one size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.calling import command, settle

STAGES = ("mixture", "gradients", "split", "train", "merge", "evaluate")
FOLDERS = ("mixture", "conflict", "split", "branches", "merged", "evaluation")


def main() -> None:
    """Parse, run each size, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, nargs="+", default=[100, 400, 1000])
    parser.add_argument("--rows", type=int, default=6, help="Training rows per dataset.")
    parser.add_argument("--no-write", action="store_true", help="Print only.")
    parser.add_argument("--one", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    settle()
    if given.one is not None:
        print(json.dumps(measure(given.one, given.datasets[0], given.rows)))
        return
    found = []
    for count in given.datasets:
        with tempfile.TemporaryDirectory(prefix="merit-scale-") as folder:
            words = [sys.executable, "-m", "benchmarks.faults.scale", "--one", folder, "--rows", str(given.rows)]
            done = subprocess.run([*words, "--datasets", str(count)], stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(found[-1]), flush=True)
    text = summary(found)
    print(text)
    if not given.no_write:
        from benchmarks.report import write

        sizes = " ".join(map(str, given.datasets))
        write(
            "scale",
            "The chain over many datasets",
            f"python -m benchmarks.faults.scale --datasets {sizes} --rows {given.rows}",
            text,
            {"sizes": found},
        )


def measure(folder: Path, datasets: int, rows: int) -> dict[str, Any]:
    """Run the chain stage by stage; CPU seconds, peak memory (MiB) and files after each."""
    from tests import builders

    base = builders.make_base(folder / "base", hidden=8)
    recipe = _write(folder, base, datasets, rows)
    stages = {}
    warm = command(
        "check", recipe, "--output", folder / "run", "--quiet"
    )  # libraries are loaded before the clock starts
    assert warm.code == 0, warm
    for stage, name in zip(STAGES, FOLDERS, strict=True):
        started, cpu = time.monotonic(), time.process_time()
        found = command("run", recipe, "--output", folder / "run", "--quiet", "--until", stage, limit=3600)
        assert found.code == 0, found
        stages[stage] = {
            "seconds": round(time.monotonic() - started, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "files": sum(path.is_file() for path in (folder / "run" / name).rglob("*")),
        }
    started = time.process_time()
    again = command("run", folder / "run", "--quiet", limit=3600)
    assert again.code == 0, again
    stages["run again"] = {"cpu_seconds": round(time.process_time() - started, 2)}
    return {"datasets": datasets, "rows": rows, "stages": stages}


def _write(folder: Path, base: Path, datasets: int, rows: int) -> Path:
    import yaml
    from tests import builders

    rng = random.Random(0)
    for number in range(datasets):
        place = folder / "data" / f"d{number:04}"
        letter = string.ascii_lowercase[number % 26]
        for name, count in (("train", rows), ("test", 2)):
            words = ["".join(rng.choices(string.ascii_lowercase, k=4)) for _ in range(count)]
            lines = [{"prompt": f"{letter} {word}", "completion": word[:: -1 if number % 2 else 1]} for word in words]
            builders.write_rows(place / f"{name}.jsonl", lines)
    settings = {
        "name": "scale",
        "model": {"base": str(base), "dtype": "float32"},
        "mixture": {"folder": str(folder / "data")},
        "conflict": {"examples": rows, "sketch_size": 256},
        "split": {"axes": 1},
        "train": {"learning_rate": 1e-3, "batch_size": 32, "max_length": 32, "threads": 1},
        "evaluate": {"max_new_tokens": 2, "branches": False, "drift": {"prompts": 4, "tokens": 2}},
        "baselines": [],
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


def summary(found: list[dict[str, Any]]) -> str:
    """CPU seconds, memory and files by stage and size; what one dataset more costs."""
    from benchmarks.report import table

    sizes = [item["datasets"] for item in found]
    parts = []
    titles = {
        "cpu_seconds": "CPU seconds",
        "peak_mib": "peak memory, MiB (training starts to count anew)",
        "files": "files",
    }
    for key, title in titles.items():
        rows = []
        for stage in (*STAGES, "run again"):
            values = [item["stages"][stage].get(key) for item in found]
            if None not in values:
                step = [
                    f"{1000 * (b - a) / (m - n):.2f}"
                    for a, b, n, m in zip(values, values[1:], sizes, sizes[1:], strict=False)
                ]
                rows.append([stage, *values, *step])
        more = [f"per 1,000 from {a} to {b}" for a, b in itertools.pairwise(sizes)]
        parts.append(f"## {title}\n\n" + table(["stage", *(f"{size} datasets" for size in sizes), *more], rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
