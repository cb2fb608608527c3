"""Cost of the weight search: evaluations per second against bare forward passes on the same batches, and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/merge/search.py

The shipped text demo's base with four branches (θ0 plus seeded noise), and a wider model of the same kind; rows of the
demo's mixture. CPU seconds of one thread, bare passes and evaluations in turn, so that other work on the machine disturbs
them alike; peak memory in a process of its own for each way. Writes benchmarks/results/merge_search.md and .json. Not
covered: GPUs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from benchmark import RESULTS, machine
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from merit.demo import write_demo
from merit.evaluation.fixed import FixedBatches
from merit.evaluation.forward import Forward
from merit.hf.base import open_base
from merit.hf.inplace import Folder, InPlace, TaskVector
from merit.hf.models import load_model
from merit.mixture import encode_mixture, find_datasets
from merit.recipe.load import load_recipe
from merit.run.weight_search import hold

BRANCHES = 4
WAYS = ("bare", "held", "streamed")


def prepare(folder: Path, width: int) -> Path:
    """A base, as shipped (width 1) or wider with random weights, and branches near it."""
    recipe = write_demo(folder / "demo")
    base = folder / "demo" / "base"
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
    return recipe


def one(folder: Path, way: str, rows: int, repeats: int) -> dict[str, float]:
    """CPU seconds per bare pass and per evaluation, in turn; peak memory of the process."""
    torch.set_num_threads(1)
    recipe = load_recipe(folder / "demo" / "recipe.yaml")
    base = open_base(recipe.model)
    mixture = encode_mixture(find_datasets(recipe.mixture), base, max_length=recipe.train.max_length)
    chosen = {name: [part[i] for i in range(min(rows, len(part)))] for name, part in mixture.test.items()}
    device = torch.device("cpu")
    model = load_model(base, device)
    batches = FixedBatches(chosen, Forward(base.batcher, device, recipe.evaluate.batch_tokens), model)
    values = Folder(base.folder)
    place = InPlace(model, values)
    directions = [TaskVector(Folder(folder / f"branch-{k}")) for k in range(BRANCHES)]
    if way == "held":
        place, directions = hold(place, directions)
    batches.losses(model)
    bare, moved = [], []
    with place.moving() as move:
        for i in range(repeats):
            started = time.process_time()
            batches.losses(model)
            bare.append(time.process_time() - started)
            if way != "bare":
                started = time.process_time()
                move([(0.1 + 0.01 * i, direction) for direction in directions])
                batches.losses(model)
                moved.append(time.process_time() - started)
    return {
        "parameters": place.size,
        "rows": len(batches.rows),
        "tokens": int(sum(len(row.input_ids) for row in batches.rows)),
        "bare_seconds": statistics.median(bare),
        "evaluation_seconds": statistics.median(moved or bare),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=4, metavar=("FOLDER", "WAY", "ROWS", "REPEATS"))
    parser.add_argument("--width", type=int, default=6, help="Of the wider model, in widths of the demo's.")
    parser.add_argument("--repeats", type=int, default=7)
    words = parser.parse_args()
    if words.one:
        folder, way, rows, repeats = words.one
        print(json.dumps(one(Path(folder), way, int(rows), int(repeats))))
        return
    found = []
    for width, rows in ((1, 8), (words.width, 2)):
        with tempfile.TemporaryDirectory() as place:
            prepare(Path(place), width)
            for way in WAYS:
                repeats = words.repeats if width == 1 else max(3, words.repeats // 2)
                line = [sys.executable, __file__, "--one", place, way, str(rows), str(repeats)]
                result = subprocess.run(line, check=True, capture_output=True, text=True)
                found.append({"width": width, "way": way, **json.loads(result.stdout.splitlines()[-1])})
                print(found[-1], flush=True)
    host = machine()
    lines = [
        "# Cost of the weight search",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/merge/search.py`: {BRANCHES} branches, float32, one thread, medians of CPU",
        "seconds; bare: forward passes over the rows; held, streamed: the weights are set to θ0 + Σ c_k δ_k first, from",
        "memory or from the branches' files. ×: an evaluation over a bare pass in the same process.",
        "",
        "| parameters | rows (tokens) | way | bare pass, s | evaluation, s | evaluations/s | × | peak memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        moved, bare = row["evaluation_seconds"], row["bare_seconds"]
        shown = f"| {row['parameters'] / 1e6:.1f}M | {row['rows']} ({row['tokens']}) | {row['way']} | {bare:.3f} |"
        lines.append(f"{shown} {moved:.3f} | {1 / moved:.2f} | {moved / bare:.3f} | {row['peak_mib']:.0f} |")
    lines += [
        "",
        "Held in memory: base and task vectors in float32, (branches + 1) × 4 bytes per weight, above the model itself.",
        f"{host['cores']} cores ({host['cpu']}), {host['memory_gib']} GiB; Python {platform.python_version()}, torch "
        f"{version('torch')}; {datetime.date.today()}.",
        "",
    ]
    (RESULTS / "merge_search.md").write_text("\n".join(lines))
    values = {"date": str(datetime.date.today()), "machine": host, "torch": version("torch"), "results": found}
    (RESULTS / "merge_search.json").write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
