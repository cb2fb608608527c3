"""The main job measured as a user meets it: start-up, the demo, the cost of branching, and a kill in the middle.

    python -m benchmarks.pipeline.run            # about ten minutes on two cores
    python -m benchmarks.pipeline.run --only start-up

Training throughput has its own benchmark (benchmarks/training), and so has the merge (benchmarks/merge).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.report import table, write

from merit.files import file_hash, read_json

PARTS = ("start-up", "demo", "branching", "resume")


def timed(words: list[str], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found.append(time.perf_counter() - started)
    return found


def start_up() -> dict[str, Any]:
    """`merit --help` and `import merit`, beside a bare interpreter, and whether torch comes along."""
    code = "import merit, merit.cli, sys; sys.exit('torch' in sys.modules)"
    help_words = [sys.executable, "-m", "merit", "--help"]
    timed(help_words, 2)  # byte code and page cache
    return {
        "merit --help, median of 15 (s)": round(statistics.median(timed(help_words, 15)), 3),
        "import merit, median of 15 (s)": round(
            statistics.median(timed([sys.executable, "-c", "import merit"], 15)), 3
        ),
        "bare interpreter, median of 15 (s)": round(statistics.median(timed([sys.executable, "-c", "pass"], 15)), 3),
        "torch imported by the command line's modules": bool(subprocess.run([sys.executable, "-c", code]).returncode),
    }


def watched(words: list[str]) -> tuple[float, int]:
    """Wall seconds, and the peak of the process tree's proportional memory (bytes)."""
    import psutil

    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    peak, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(1.0):  # reading it takes a few hundredths of a second of a core
            held = 0
            try:
                for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                    held += one.memory_full_info().pss
            except psutil.Error:
                continue
            peak = max(peak, held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    stop.set()
    watcher.join()
    if code:
        raise SystemExit(f"{words} ended with {code}")
    return time.perf_counter() - started, peak


def merit(*words: str) -> list[str]:
    return [sys.executable, "-m", "merit", *words]


def demo(work: Path) -> dict[str, Any]:
    """`merit demo` from nothing."""
    seconds, peak = watched(merit("demo", "--output", str(work / "demo"), "--quiet"))
    stages = {name: read_json(work / "demo" / name / "record.json")["seconds"] for name in ("conflict", "evaluation")}
    return {"wall (s)": round(seconds, 1), "peak memory, process tree (MiB)": round(peak / 2**20), **stages}


def branching(work: Path) -> dict[str, Any]:
    """K branches one after another and their merge, against joint training at the same budget, in one process."""
    recipe = prepare(work)
    for command in ("gradients", "split"):
        subprocess.run(merit(command, str(recipe), "--output", str(work / "branching"), "--quiet"), check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
    subprocess.run(merit("train", str(work / "branching"), "--quiet"), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(merit("merge", str(work / "branching"), "--quiet"), check=True, stdout=subprocess.DEVNULL)
    run = work / "branching"
    branches = [read_json(file) for file in sorted(run.glob("branches/*/record.json"))]
    joint = read_json(run / "baselines" / "joint" / "branches" / "0" / "record.json")
    conflict, merged = read_json(run / "conflict" / "record.json"), read_json(run / "merged" / "record.json")
    trained = sum(record["seconds"] for record in branches)
    overhead = (trained + merged["seconds"]) / joint["seconds"] - 1
    whole = (trained + merged["seconds"] + conflict["seconds"]) / joint["seconds"] - 1
    assert sum(record["target_tokens"] for record in branches) == joint["target_tokens"]
    return {
        "target tokens, both": joint["target_tokens"],
        "joint (s)": joint["seconds"],
        f"{len(branches)} branches in sequence (s)": round(trained, 2),
        "merge (s)": merged["seconds"],
        "overhead of branches and merge": f"{overhead:+.1%}",
        "gradients (s)": conflict["seconds"],
        "overhead with gradients": f"{whole:+.1%}",
        "longest branch (s): wall time with K machines": max(record["seconds"] for record in branches),
    }


def prepare(work: Path) -> Path:
    from merit.demo import write_demo

    return write_demo(work / "material")


def resume(work: Path) -> dict[str, Any]:
    """SIGKILL in the middle of a branch, go on, and compare with the run that was left alone."""
    recipe = prepare(work)
    common = ("--set", "train.checkpoint_minutes=0.02", "--set", "baselines=[]", "--set", "train.threads=1", "--quiet")
    kills = 0
    for name in ("whole", "killed"):
        for command in ("gradients", "split"):
            subprocess.run(merit(command, str(recipe), "--output", str(work / name), *common), check=True,
                           stdout=subprocess.DEVNULL)  # fmt: skip
    words = ("--branch", "0", *common)
    subprocess.run(merit("train", str(work / "whole"), *words), check=True, stdout=subprocess.DEVNULL)
    checkpoints = work / "killed" / "branches" / "0" / "checkpoints"
    seen: set[str] = set()
    while kills < 3:
        process = subprocess.Popen(merit("train", str(work / "killed"), *words), stdout=subprocess.DEVNULL)
        while process.poll() is None:
            new = {path.parent.name for path in checkpoints.glob("*/complete.json")} - seen
            if new:
                seen |= new
                time.sleep(0.3)
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                break
            time.sleep(0.01)
        else:
            break
    subprocess.run(merit("train", str(work / "killed"), *words), check=True, stdout=subprocess.DEVNULL)
    files = [work / name / "branches" / "0" / "model" / "model.safetensors" for name in ("whole", "killed")]
    records = [read_json(file.parents[1] / "record.json") for file in files]
    return {
        "SIGKILLs": kills,
        "weights bit-identical": file_hash(files[0]) == file_hash(files[1]),
        "trained target tokens identical": records[0]["target_tokens"] == records[1]["target_tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="measure only this part; may be repeated")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    work = Path(tempfile.mkdtemp(prefix="merit-bench-"))
    facts: dict[str, Any] = {}
    try:
        for part in given.only or PARTS:
            facts[part] = start_up() if part == "start-up" else globals()[part](work)
            print(part, facts[part], flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    body = "\n\n".join(f"## {part}\n\n{table(('', ''), list(found.items()))}" for part, found in facts.items())
    if not given.only:
        print(write("pipeline", "The main job, as a user meets it", "python -m benchmarks.pipeline.run", body, facts))


if __name__ == "__main__":
    main()
