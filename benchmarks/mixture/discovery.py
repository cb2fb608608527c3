"""Finding the datasets of one large file that `split_by` cuts: passes over its bytes, time, peak memory.

    python -m benchmarks.mixture.discovery [--gigabytes 1.0]

It writes a JSON Lines file with the rows of 200 datasets in random order, and the same rows as a Parquet file, into a
temporary folder. Every contestant runs in a process of its own. Passes are bytes read (``rchar`` of /proc/self/io, so cached
ones count) over the file's size. The floor is `json.loads` on every line, keeping nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import table, write

DATASETS = 200
TEXT = "merge branch gradient sketch dataset answer question instruct token weight image group split"


def make(folder: Path, size: int) -> tuple[Path, Path]:
    """The same rows as JSON Lines and as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(0)
    text = [" ".join(rng.choices(TEXT.split(), k=60)) for _ in range(997)]
    lines, parquet = folder / "rows.jsonl", folder / "rows.parquet"
    schema = pa.schema([(name, pa.string()) for name in ("task", "prompt", "completion")])
    written = 0
    with lines.open("w") as out, pq.ParquetWriter(parquet, schema, compression="zstd") as writer:
        while written < size:
            rows = [
                {
                    "task": f"task {rng.randrange(DATASETS)}",
                    "prompt": f"{rng.random()} {rng.choice(text)}",
                    "completion": f"{rng.random()} {rng.choice(text)}",
                }
                for _ in range(20_000)
            ]
            chunk = "".join(json.dumps(row) + "\n" for row in rows)
            out.write(chunk)
            written += len(chunk)
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return lines, parquet


def work(what: str, path: Path) -> int:
    """One contestant; returns the rows that it saw."""
    if what == "json.loads on every line":
        with path.open() as handle:
            return sum(bool(json.loads(line)["task"]) for line in handle)
    from merit.mixture import find_datasets
    from merit.recipe.schema import MixtureSettings

    found = find_datasets(MixtureSettings(path=str(path), split_by="task"))
    if what == "found":
        return len(found.sources)
    found.fingerprints()
    found.check()
    if what == "found, checked, fingerprinted":
        return len(found.sources)
    return sum(1 for source in found.sources for _ in source.train.read())  # type: ignore[union-attr]


CONTESTANTS = ("json.loads on every line", "found", "found, checked, fingerprinted", "and every dataset read")


def measured(what: str, path: Path) -> dict[str, Any]:
    """Figures of one contestant in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.mixture.discovery", "--one", what, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def one(what: str, path: Path) -> dict[str, Any]:
    """Run it here and say what it took."""
    import merit.mixture  # noqa: F401  counted for nobody

    def peak() -> int:  # ru_maxrss would count the parent's, too
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    before, start, cpu = read(), time.perf_counter(), time.process_time()
    rest = peak()
    rows = work(what, path)
    return {
        "rows": rows,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "passes": round((read() - before) / path.stat().st_size, 2),
        "mib": round((peak() - rest) / 1024),
    }


def main() -> None:
    """Make the files, measure, write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "FILE"), help="for its own processes")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one[0], Path(arguments.one[1]))))
        return
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        lines, parquet = make(Path(folder), int(arguments.gigabytes * 1e9))
        sizes = {"JSON Lines": lines.stat().st_size, "Parquet": parquet.stat().st_size}
        for name, path in (("JSON Lines", lines), ("Parquet", parquet)):
            for what in CONTESTANTS[name == "Parquet" :]:
                facts[f"{name}: {what}"] = measured(what, path)
    rows = facts["JSON Lines: json.loads on every line"]["rows"]
    floor = facts["JSON Lines: json.loads on every line"]["cpu_seconds"]
    body = (
        f"{rows:,} rows of {DATASETS} datasets in random order: {sizes['JSON Lines'] / 1e9:.2f} GB of JSON Lines, "
        f"{sizes['Parquet'] / 1e9:.2f} GB of Parquet. Memory is the growth of the process's peak while it works; what "
        "is read of the scratch file of the Parquet rows counts as well.\n\n"
    )
    header = ("", "passes over the file's bytes", "seconds", "CPU seconds", "CPU / floor", "memory, MiB")
    body += table(
        header,
        [
            (name, f["passes"], f["seconds"], f["cpu_seconds"], f"{f['cpu_seconds'] / floor:.2f}", f["mib"])
            for name, f in facts.items()
        ],
    )
    command = f"python -m benchmarks.mixture.discovery --gigabytes {arguments.gigabytes:g}"
    write("discovery", "Finding the datasets of one large file", command, body, {"bytes": sizes, "figures": facts})


if __name__ == "__main__":
    main()
