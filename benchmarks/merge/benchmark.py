"""Time, memory and numerical error of the merge on a 0.5B model (base + 4 branches, bf16), beside its peers, in one run.

    python benchmarks/merge/benchmark.py [--workdir DIR] [--mergekit PATH/TO/mergekit-yaml] [--repeats 5]

Peers: copying the same bytes (the physical limit), mergekit's ``linear``, a plain load-everything script. Every round runs
all of them in turn, warm (files in the page cache) and cold (dropped from it); the table shows the fastest round, and the
user + system seconds, which other work on the machine disturbs less. ``merit merge`` runs with its compiled kernel, compiled
before the rounds, and once more with NumPy alone. Needs 7 GB in the work folder, which is cleaned up.
Writes benchmarks/results/merge.md and merge.json. Not covered: network disks, GPUs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from merit.hf.checkpoint import TensorInfo, read_headers, read_tensor
from merit.hf.dtypes import BLOCK, DTYPES, to_float
from merit.merge import native
from merit.merge.arithmetic import round_to

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
TOKENS = [123_456_789, 98_765_432, 111_111_111, 77_777_777]
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, KV = 896, 4864, 24, 151_936, 128


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """A Qwen2 architecture of 494M parameters at 24 layers, tied embeddings."""
    h, i = HIDDEN, INTERMEDIATE
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, h), "model.norm.weight": (h,)}
    for n in range(layers):
        layer = {
            "input_layernorm.weight": (h,),
            "post_attention_layernorm.weight": (h,),
            "self_attn.o_proj.weight": (h, h),
        }
        layer |= {"mlp.gate_proj.weight": (i, h), "mlp.up_proj.weight": (i, h), "mlp.down_proj.weight": (h, i)}
        for name, rows in (("q", h), ("k", KV), ("v", KV)):
            layer |= {f"self_attn.{name}_proj.weight": (rows, h), f"self_attn.{name}_proj.bias": (rows,)}
        result |= {f"model.layers.{n}.{key}": shape for key, shape in layer.items()}
    return result


def make(folder: Path, seed: int | None, layers: int) -> Path:
    """The base (seed None), or a branch: the base a small random step away."""
    folder.mkdir(parents=True)
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": HIDDEN, "hidden_act": "silu"}
    config |= {"intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": 14}
    config |= {
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes(layers).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    base, step = np.random.default_rng(0), np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes(layers).values():
            for start in range(0, int(np.prod(shape)), 1 << 22):
                n = min(1 << 22, int(np.prod(shape)) - start)
                values = base.standard_normal(n, np.float32) * np.float32(0.02)
                if seed is not None:
                    values += step.standard_normal(n, np.float32) * np.float32(0.001)
                stream.write(round_to(values.astype(np.float64), DTYPES["BF16"]).tobytes())
    return folder


def drop_cache(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_cache(files: list[Path]) -> None:
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def run(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds, and peak anonymous memory in bytes (sampled every 10 ms), of one command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = max(peak, *(1024 * int(x.split()[1]) for x in status.splitlines() if x.startswith("RssAnon")))
            except (OSError, TypeError):
                return
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    wall = time.perf_counter() - started
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{output}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    inner = [float(x.split()[1]) for x in output.splitlines() if x.startswith("merge-seconds ")]
    return {"wall": wall, "cpu": cpu, "anonymous": peak} | ({"inner": inner[0]} if inner else {})


COPIES = ["copying the same bytes, one reader", "copying the same bytes, two readers"]
OURS, INSIDE = "merit merge (whole command)", "merit, in a running Python"
NUMPY = "merit merge without the compiled kernel"
MERGEKIT = "mergekit linear (whole command)"

IN_PROCESS = """
import sys, time
from pathlib import Path
from merit.merge import Branch, plan_merge, run_merge
base, output, *pairs = sys.argv[1:]
started = time.perf_counter()
branches = [Branch(Path(p.rsplit("=", 1)[0]), p.rsplit("=", 1)[1], p) for p in pairs]
run_merge(plan_merge(base, branches, output=output))
print("merge-seconds", time.perf_counter() - started)
"""


def wrong_elements(merged: Path, branches: list[Path]) -> tuple[int, int]:
    """Elements that differ from the float64 accumulation with integer weights rounded once, and elements in all."""
    heads, ours = [read_headers(b) for b in branches], read_headers(merged)
    wrong = total = 0
    for name, info in heads[0].tensors.items():
        parts = [read_tensor(h, name).ravel() for h in heads]
        got = read_tensor(ours, name).ravel()
        for start in range(0, info.size, BLOCK):
            rows = [to_float(p[start : start + BLOCK], info.dtype) for p in parts]
            mean = sum(n * x for n, x in zip(TOKENS, rows, strict=True)) / sum(TOKENS)
            want = to_float(round_to(mean, info.dtype), info.dtype)
            tensor: TensorInfo = ours.tensors[name]
            wrong += int(np.count_nonzero(to_float(got[start : start + BLOCK], tensor.dtype) != want))
        total += info.size
    return wrong, total


def machine() -> dict[str, object]:
    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": model or platform.processor(), "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="where to put 7 GB of temporary files (default: the system's)")
    parser.add_argument("--mergekit", default=os.environ.get("MERIT_MERGEKIT") or shutil.which("mergekit-yaml"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer for a quick trial")
    given = parser.parse_args()
    if given.workdir is not None:
        given.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.workdir) as scratch:
        measure(Path(scratch), given)


def measure(folder: Path, given: argparse.Namespace) -> None:
    base = make(folder / "base", None, given.layers)
    branches = [make(folder / f"branch-{k}", k + 1, given.layers) for k in range(len(TOKENS))]
    files = [p / "model.safetensors" for p in (base, *branches)]
    pairs = [f"{b}={n}" for b, n in zip(branches, TOKENS, strict=True)]
    output = folder / "out"
    python = sys.executable
    checkpoints = [x for pair in pairs for x in ("--checkpoint", pair)]
    copy = [python, str(HERE / "copy_bytes.py")]
    merge = [python, "-m", "merit", "merge", "--quiet", "--base", str(base), *checkpoints, "--output", str(output)]
    commands = {
        COPIES[0]: [*copy, "1", str(output), *map(str, files)],
        COPIES[1]: [*copy, "2", str(output), *map(str, files)],
        OURS: merge,
        INSIDE: [python, "-c", IN_PROCESS, str(base), str(output), *pairs],
        NUMPY: ["env", "MERIT_KERNEL=numpy", *merge],
        "load-everything script": [python, str(HERE / "load_everything.py"), str(output), *pairs],
    }
    startup: dict[str, list[str]] = {"merit": [python, "-m", "merit", "merge", "--help"]}
    if given.mergekit:
        recipe = {"merge_method": "linear", "dtype": "bfloat16", "parameters": {"normalize": True}}
        models = [{"model": str(b), "parameters": {"weight": n}} for b, n in zip(branches, TOKENS, strict=True)]
        (folder / "recipe.yaml").write_text(json.dumps({**recipe, "models": models}))
        commands[MERGEKIT] = [given.mergekit, str(folder / "recipe.yaml"), str(output)]
        startup["mergekit"] = [given.mergekit, "--help"]
    rounds: dict[str, dict[str, list[dict[str, float]]]] = {"warm": {}, "cold": {}}
    wrong: dict[str, tuple[int, int]] = {}
    starts = {name: min(run(command)["wall"] for _ in range(3)) for name, command in startup.items()}
    loads = [os.getloadavg()[0]]
    for _ in range(given.repeats):
        for state in rounds:
            for name, command in commands.items():
                if (
                    state == "warm"
                ):  # a first run that is not counted: a virtual machine pays for pages that are new to it
                    warm_cache(files)
                    run(command)
                    shutil.rmtree(output)
                (drop_cache if state == "cold" else warm_cache)(files)
                rounds[state].setdefault(name, []).append(run(command))
                if name not in wrong and "copying" not in name:
                    wrong[name] = wrong_elements(output, branches)
                shutil.rmtree(output)
                print(state, name, {k: round(v, 3) for k, v in rounds[state][name][-1].items()}, flush=True)
        loads.append(os.getloadavg()[0])
    report(rounds, wrong, starts, loads, given)


def targets(table: dict, limit: dict[str, float], starts: dict) -> list[str]:
    """What was aimed at, beside what came out: a miss is shown like a hit."""
    ours, inside, plain, theirs = table[OURS], table[INSIDE], table[NUMPY], table.get(MERGEKIT)
    rows: list[tuple[str, float, float]] = [
        ("warm over the fastest copy, compiled kernel, whole command", 1.5, ours["warm"] / limit["warm"]),
        ("warm over the fastest copy, compiled kernel, in a running Python", 1.5, inside["warm"] / limit["warm"]),
        ("warm over the fastest copy, NumPy alone, whole command", 3, plain["warm"] / limit["warm"]),
        ("cold over the fastest copy, whole command", 1.15, ours["cold"] / limit["cold"]),
        ("anonymous memory, GB", 0.5, ours["anonymous_bytes"] / 1e9),
        ("wrongly rounded elements", 0, ours["wrong"][0] + plain["wrong"][0]),
    ]
    if not native.available():
        rows = rows[2:]
    lines = ["| aimed at | target | measured | |", "|---|---|---|---|"]
    lines += [
        f"| {name} | ≤ {aim} | {value:.2f} | {'met' if value <= aim else 'missed'} |" for name, aim, value in rows
    ]
    if theirs:
        whole = theirs["warm"] / ours["warm"]
        alone = (theirs["warm"] - starts["mergekit"]) / inside["warm"]
        rows = [("times faster than mergekit, warm, whole command", 7, whole)]
        rows.append(("times faster than mergekit, warm, without start-up", 3, alone))
        lines += [
            f"| {name} | ≥ {aim} | {value:.2f} | {'met' if value >= aim else 'missed'} |" for name, aim, value in rows
        ]
    return lines


def best(rows: list[dict[str, float]], key: str) -> float:
    return min(row[key] for row in rows)


def report(rounds: dict, wrong: dict, starts: dict, loads: list[float], given: argparse.Namespace) -> None:
    packages = {name: version(name) for name in ("numpy", "safetensors", "torch", "xxhash")} | {
        "python": platform.python_version()
    }
    if given.mergekit:
        packages["mergekit"] = "0.1.5"
    millions = next(iter(wrong.values()))[1] / 1e6
    lines = [
        "# Merging four branches of a 0.5B model",
        "",
        f"`python benchmarks/merge/benchmark.py --repeats {given.repeats}`: base and 4 branches, Qwen2 architecture, "
        f"{millions:.0f}M parameters, bf16, token-weighted.",
        f"Fastest of {given.repeats} interleaved rounds, a warm one right after a run that is not counted; CPU is "
        "user + system seconds of that command, fastest round.",
        "",
        "| | warm, wall s | × fastest copy | CPU s | cold, wall s | × copy | peak anonymous memory | wrongly rounded |",
        "|---|---|---|---|---|---|---|---|",
    ]
    warm, cold = rounds["warm"], rounds["cold"]
    limit = {state: min(best(rounds[state][name], "wall") for name in COPIES) for state in rounds}
    table = {}
    for name in warm:
        key = "inner" if "inner" in warm[name][0] else "wall"
        w, c = best(warm[name], key), best(cold[name], key)
        memory = max(r["anonymous"] for r in warm[name] + cold[name])
        bad = f"{wrong[name][0]:,} of {wrong[name][1]:,}" if name in wrong else "–"
        cpu = best(warm[name], "cpu")
        table[name] = {"warm": w, "cold": c, "warm_cpu": cpu, "anonymous_bytes": memory, "wrong": wrong.get(name)}
        parts = [name, f"{w:.2f}", f"{w / limit['warm']:.1f}", f"{cpu:.2f}", f"{c:.2f}", f"{c / limit['cold']:.2f}"]
        lines.append(f"| {' | '.join([*parts, f'{memory / 1e9:.2f} GB', bad])} |")
    lines += ["", f"Start-up alone (`--help`): {', '.join(f'{k} {v:.2f} s' for k, v in starts.items())}."]
    ours, inside = table[OURS], table[INSIDE]
    theirs = table.get(MERGEKIT)
    if theirs:
        lines.append(
            f"Against mergekit: {theirs['warm'] / ours['warm']:.1f} × faster warm (whole commands), "
            f"{(theirs['warm'] - starts['mergekit']) / inside['warm']:.1f} × without start-up; "
            f"{theirs['warm_cpu'] / ours['warm_cpu']:.1f} × less CPU time."
        )
    kernel = "compiled once per machine, before the rounds" if native.available() else "not compiled: no C compiler"
    lines += [f"Kernel: {kernel}.", "", *targets(table, limit, starts)]
    host = machine()
    lines += [
        "",
        f"{host['cores']} cores ({host['cpu']}), {host['memory_gib']} GiB; one-minute load of the machine during the rounds "
        f"{min(loads):.1f} to {max(loads):.1f}.",
        f"{', '.join(f'{k} {v}' for k, v in packages.items())}; {datetime.date.today()}.",
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "merge.md").write_text("\n".join(lines))
    values = {
        "date": str(datetime.date.today()),
        "machine": host,
        "versions": packages,
        "load": loads,
        "startup": starts,
        "compiled_kernel": native.available(),
    }
    (RESULTS / "merge.json").write_text(json.dumps(values | {"table": table, "rounds": rounds}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
