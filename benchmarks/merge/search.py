"""Cost of the weight search: evaluations per second against bare forward passes on the same batches, and memory.

    OMP_NUM_THREADS=1 python benchmarks/merge/search.py

The shipped text demo's base with four branches (θ0 plus seeded noise), and a wider model of the same kind, on random rows of
20 to 100 tokens. Medians of CPU seconds of one thread; a bare pass, an evaluation with branches in memory and one with
branches read from their files take turns, so that other work on the machine disturbs them alike. Memory: the bytes of θ0 and
the task vectors that are held, and the peak resident memory of a process of its own per way that evaluates once.
Writes benchmarks/results/merge_search.md and .json. Not covered: GPUs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from benchmark import RESULTS, machine
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from merit.demo import base_folder
from merit.evaluation.fixed import FixedBatches
from merit.evaluation.forward import Forward
from merit.hf.base import open_base
from merit.hf.inplace import Folder, Held, InPlace, TaskVector
from merit.hf.models import load_model
from merit.hf.rows import EncodedRow
from merit.recipe.schema import ModelSettings
from merit.run.weight_search import hold

BRANCHES = 4
WAYS = ("bare", "held", "streamed")


def prepare(folder: Path, width: int) -> None:
    """A base, as shipped (width 1) or wider with random weights, and branches near it."""
    base = Path(shutil.copytree(base_folder(), folder / "base"))
    if width > 1:
        config = AutoConfig.from_pretrained(base)
        for name in ("hidden_size", "intermediate_size", "head_dim"):
            if getattr(config, name, None):
                setattr(config, name, width * getattr(config, name))
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    for k in range(BRANCHES):
        generator = torch.Generator().manual_seed(k)
        moved = {n: t + 0.002 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
        branch = folder / f"branch-{k}"
        branch.mkdir()
        save_file(moved, branch / "model.safetensors", {"format": "pt"})
        (branch / "config.json").write_bytes((base / "config.json").read_bytes())


@dataclass(frozen=True)
class Ready:
    """A model in place, rows to measure it on, and its branches' files."""

    model: PreTrainedModel
    batches: FixedBatches
    place: InPlace
    branches: list[TaskVector]


def ready(folder: Path, rows: int) -> Ready:
    """Load the base and draw the rows."""
    base = open_base(ModelSettings(base=str(folder / "base"), dtype="float32"))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(rows):
        length = int(rng.integers(20, 101))
        drawn.append(
            EncodedRow(rng.integers(5, 200, length).astype(np.int32), np.arange(length) >= length // 2, length // 2)
        )
    device = torch.device("cpu")
    model = load_model(base, device)
    batches = FixedBatches({"rows": drawn}, Forward(base.batcher, device), model)
    place = InPlace(model, Folder(base.folder))
    streamed = [TaskVector(Folder(folder / f"branch-{k}")) for k in range(BRANCHES)]
    batches.losses(model)
    return Ready(model, batches, place, streamed)


def peak(folder: Path, rows: int, way: str) -> int:
    """Peak memory in bytes of this process, which evaluates once in one way."""
    made = ready(folder, rows)
    if way != "bare":
        place, directions = hold(made.place, made.branches) if way == "held" else (made.place, made.branches)
        with place.moving() as move:
            move([(0.1, direction) for direction in directions])
            made.batches.losses(made.model)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin at the parent's
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def peaks(folder: Path, rows: int) -> dict[str, float]:
    """Peak MiB of a process of its own per way."""
    found = {}
    for way in WAYS:
        words = [sys.executable, __file__, "--peak", way, "--folder", str(folder), "--rows", str(rows)]
        found[f"{way}_peak_mib"] = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout) / 2**20
    return found


def one(folder: Path, rows: int, repeats: int) -> dict[str, float]:
    """CPU seconds per pass and per evaluation, and memory."""
    made = ready(folder, rows)
    model, batches, place, streamed = made.model, made.batches, made.place, made.branches
    in_memory, held = hold(place, streamed)
    assert isinstance(in_memory.base, Held)
    size = sum(t.numel() * t.element_size() for part in (in_memory.base, *held) for t in part.tensors.values())
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}

    def evaluate(way: str, i: int) -> None:
        started = time.process_time()
        if way != "bare":
            directions = held if way == "held" else streamed
            moves[way]([(0.1 + 0.01 * i, direction) for direction in directions])
        batches.losses(model)
        seconds[way].append(time.process_time() - started)

    with in_memory.moving() as from_memory, place.moving() as from_files:
        moves = {"held": from_memory, "streamed": from_files}
        for i in range(repeats):
            for way in seconds:
                evaluate(way, i)
    return {
        "parameters": place.size,
        "rows": len(batches.rows),
        "tokens": int(sum(len(row.input_ids) for row in batches.rows)),
        "held_mib": size / 2**20,
        **peaks(folder, rows),
        **{way: statistics.median(taken) for way, taken in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=3, help="Of the wider model, in widths of the demo's.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", choices=WAYS, help="Print the peak memory of this way, in bytes, and nothing else.")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rows", type=int)
    words = parser.parse_args()
    torch.set_num_threads(1)
    if words.peak:
        print(peak(words.folder, words.rows, words.peak))
        return
    found = []
    for width, rows in ((1, 96), (words.width, 24)):
        with tempfile.TemporaryDirectory() as place:
            prepare(Path(place), width)
            found.append(one(Path(place), rows, words.repeats))
            print(found[-1], flush=True)
    host = machine()
    lines = [
        "# Cost of the weight search",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/merge/search.py --width {words.width} --repeats {words.repeats}`: {BRANCHES} "
        "branches, float32, one thread, medians of CPU seconds; bare: a forward pass over the rows; held, streamed: the "
        "weights are set to θ0 + Σ c_k δ_k first, from memory or from the branches' files; ×: over the bare pass.",
        "",
        "| parameters | rows (tokens) | bare, s | held, s (×) | streamed, s (×) | evaluations/s, held | held, MiB | "
        "peak of a process: bare, held, streamed, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        bare, held, streamed = (row[way] for way in ("bare", "held", "streamed"))
        size = f"| {row['parameters'] / 1e6:.1f}M | {row['rows']} ({row['tokens']}) | {bare:.3f} "
        ways = f"| {held:.3f} ({held / bare:.2f}) | {streamed:.3f} ({streamed / bare:.2f}) "
        highest = ", ".join(f"{row[f'{way}_peak_mib']:.0f}" for way in WAYS)
        lines.append(f"{size}{ways}| {1 / held:.2f} | {row['held_mib']:.1f} | {highest} |")
    lines += [
        "",
        "Held: θ0 and task vectors in float32, (branches + 1) × 4 bytes per weight above the model itself "
        "(sum of the sizes).",
        "Peak: highest resident memory (VmHWM) of a process that evaluates once, Python and torch included. The time to set",
        "the weights does not depend on the rows: with more of them, as in a real search, × gets smaller.",
        f"{host['cores']} cores ({host['cpu']}), {host['memory_gib']} GiB; Python {platform.python_version()}, torch "
        f"{version('torch')}; {datetime.date.today()}.",
        "",
    ]
    (RESULTS / "merge_search.md").write_text("\n".join(lines))
    values = {"date": str(datetime.date.today()), "machine": host, "torch": version("torch"), "results": found}
    (RESULTS / "merge_search.json").write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
