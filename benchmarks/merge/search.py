"""Cost of the weight search: evaluations per second against bare forward passes on the same batches, and memory.

    OMP_NUM_THREADS=1 python benchmarks/merge/search.py

The shipped text demo's base with four branches (θ0 plus seeded noise), and a wider model of the same kind, on random rows of
20 to 100 tokens. Medians of CPU seconds of one thread; a bare pass, an evaluation with branches in memory and one with
branches read from their files take turns, so that other work on the machine disturbs them alike. Memory: what the process
holds more after the branches were taken into memory. Writes benchmarks/results/merge_search.md and .json. Not covered: GPUs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch
from benchmark import RESULTS, machine
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from merit.demo import base_folder
from merit.evaluation.fixed import FixedBatches
from merit.evaluation.forward import Forward
from merit.hf.base import open_base
from merit.hf.inplace import Folder, InPlace, TaskVector
from merit.hf.models import load_model
from merit.hf.rows import EncodedRow
from merit.recipe.schema import ModelSettings
from merit.run.weight_search import hold

BRANCHES = 4


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


def one(folder: Path, rows: int, repeats: int) -> dict[str, float]:
    """CPU seconds per pass and per evaluation, and memory."""
    base = open_base(ModelSettings(base=str(folder / "base"), dtype="float32"))
    rng = np.random.default_rng(0)
    made = []
    for _ in range(rows):
        length = int(rng.integers(20, 101))
        made.append(
            EncodedRow(rng.integers(5, 200, length).astype(np.int32), np.arange(length) >= length // 2, length // 2)
        )
    device = torch.device("cpu")
    model = load_model(base, device)
    batches = FixedBatches({"rows": made}, Forward(base.batcher, device), model)
    place = InPlace(model, Folder(base.folder))
    streamed = [TaskVector(Folder(folder / f"branch-{k}")) for k in range(BRANCHES)]
    batches.losses(model)
    before = psutil.Process().memory_info().rss
    in_memory, held = hold(place, streamed)
    grown = psutil.Process().memory_info().rss - before
    seconds: dict[str, list[float]] = {"bare": [], "held": [], "streamed": []}

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
        "held_mib": grown / 2**20,
        **{way: statistics.median(taken) for way, taken in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=3, help="Of the wider model, in widths of the demo's.")
    parser.add_argument("--repeats", type=int, default=3)
    words = parser.parse_args()
    torch.set_num_threads(1)
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
        "| parameters | rows (tokens) | bare, s | held, s (×) | streamed, s (×) | held, per s | memory of the held, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        bare, held, streamed = (row[way] for way in ("bare", "held", "streamed"))
        size = f"| {row['parameters'] / 1e6:.1f}M | {row['rows']} ({row['tokens']}) | {bare:.3f} "
        ways = f"| {held:.3f} ({held / bare:.2f}) | {streamed:.3f} ({streamed / bare:.2f}) "
        lines.append(f"{size}{ways}| {1 / held:.2f} | {row['held_mib']:.0f} |")
    lines += [
        "",
        "Held: θ0 and task vectors in float32, (branches + 1) × 4 bytes per weight above the model itself. The time to set",
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
