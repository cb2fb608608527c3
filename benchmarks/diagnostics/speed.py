"""What moving a model costs: evaluations along paths against bare forward passes on the same batches, and peak memory.

    python -m benchmarks.diagnostics.speed [--rows 8] [--rounds 2] [--write]

K = 4 branches of the demo's base (the base plus noise), rows of the demo's 29 datasets; 10 paths (branch to branch and
branch to merged) of 21 points. CPU seconds of this process, interleaved path by path, so that a busy machine slows both
alike. Memory: a Llama moved between two branches, highest resident size above that of the loaded model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import combinations
from pathlib import Path

import torch
from benchmarks.report import RESULTS, machine, table
from safetensors.torch import load_file, save_file

from merit.demo import write_demo
from merit.diagnostics.connectivity import between
from merit.diagnostics.lab import Lab, Subject
from merit.hf.base import open_base
from merit.hf.inplace import Folder, InPlace, TaskVector
from merit.hf.models import load_model
from merit.mixture import find_datasets
from merit.mixture.stage import encode_mixture
from merit.recipe.diagnose import DiagnoseSettings
from merit.recipe.load import load_recipe

POINTS = 21


def noisy_copy(base: Path, folder: Path, seed: int) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    moved = {
        n: t + 1e-3 * torch.randn(t.shape, generator=generator)
        for n, t in load_file(base / "model.safetensors").items()
    }
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def speed(root: Path, rows: int, rounds: int) -> dict[str, float]:
    write_demo(root / "demo", 0)
    recipe = load_recipe(root / "demo" / "recipe.yaml")
    base = open_base(recipe.model)
    mixture = encode_mixture(find_datasets(recipe.mixture, recipe.evaluate), base, max_length=recipe.train.max_length)
    branches = {f"branch-{k}": noisy_copy(base.folder, root / str(k), k) for k in range(4)}
    lab = Lab(Subject(base, branches, [1.0] * 4, mixture.train), DiagnoseSettings(examples=rows))
    pairs = [*combinations(branches, 2), *((name, "merged") for name in branches)]
    lab.measure(lab.train)
    moved = bare = 0.0
    for _ in range(rounds):
        for a, b in pairs:
            start = time.process_time()
            lab.losses([between(lab.points[a], lab.points[b], i / (POINTS - 1)) for i in range(POINTS)], lab.train)
            middle = time.process_time()
            for _ in range(POINTS):
                lab.measure(lab.train)
            bare += time.process_time() - middle
            moved += middle - start
    count = rounds * len(pairs) * POINTS
    return {"evaluations": count, "moved_per_second": count / moved, "bare_per_second": count / bare, "ratio": moved / bare,
            "rows": len(lab.train.rows), "parameters": lab.place.size}  # fmt: skip


def memory(root: Path) -> dict[str, float]:
    from tests import builders

    base = builders.make_base(root / "large", hidden=512, vocab_size=32000, num_hidden_layers=4, num_attention_heads=8)
    branches = [noisy_copy(base, root / f"large-{k}", k) for k in range(2)]
    model = load_model(open_base(load_settings(base)), torch.device("cpu"))
    place = InPlace(model, Folder(base))
    directions = [TaskVector(Folder(branch)) for branch in branches]
    with place.moving() as move:  # loaded weights are pages of their file until they are first written to
        move([(1.0, directions[0])])
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew
    before = resident("VmRSS")
    with place.moving() as move:
        for alpha in (0.0, 0.5, 1.0):
            move([(1 - alpha, directions[0]), (alpha, directions[1])])
    largest = max(tensor.nbytes for tensor in place.tensors.values())
    return {
        "model_bytes": 4 * place.size,
        "largest_tensor_bytes": largest,
        "peak_above_model_bytes": resident("VmHWM") - before,
    }


def load_settings(base: Path):
    from merit.recipe.schema import ModelSettings

    return ModelSettings(base=str(base), dtype="float32")


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="rows per dataset")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/diagnostics_speed.json and .md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        kept = memory(Path(scratch))
        found = speed(Path(scratch), args.rows, args.rounds)
    facts = machine()
    fits = kept["peak_above_model_bytes"] <= kept["largest_tensor_bytes"]
    quick = "met" if found["ratio"] <= 1.15 else "missed"
    largest, above = (f"{kept[name] / 2**20:.0f}" for name in ("largest_tensor_bytes", "peak_above_model_bytes"))
    rows = [
        ["CPU seconds over bare forward passes", "≤ 1.15", f"{found['ratio']:.3f}", quick],
        ["peak memory above the model, MiB", f"≤ {largest} (its largest tensor)", above, "met" if fits else "missed"],
    ]
    lines = [
        "# What moving a model along a path costs",
        "",
        f"`python -m benchmarks.diagnostics.speed --rows {args.rows} --rounds {args.rounds} --write` on {facts['date']}, "
        f"one thread of {facts['cores']} CPU cores: {found['evaluations']} evaluations on 10 paths of 21 points, K = 4, "
        f"{found['parameters']:,} weights, {found['rows']} rows; {found['moved_per_second']:.2f} evaluations per CPU second "
        f"against {found['bare_per_second']:.2f} bare ones.",
        "",
        table(["aimed at", "target", "measured", ""], rows),
        "",
        f"Memory: a Llama of {kept['model_bytes'] / 4 / 1e6:.0f}M weights ({kept['model_bytes'] / 2**20:.0f} MiB in "
        "float32), moved between two branches on disk.",
        "",
    ]
    print("\n".join(lines))
    if args.write:
        (RESULTS / "diagnostics_speed.md").write_text("\n".join(lines))
        value = {"machine": facts, "speed": found, "memory": kept}
        (RESULTS / "diagnostics_speed.json").write_text(json.dumps(value, indent=1))


if __name__ == "__main__":
    main()
