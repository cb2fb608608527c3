"""Cost of the spectral operators: CPU seconds per layer of a 0.5B model (4 branches), and how it grows.

    OMP_NUM_THREADS=1 python benchmarks/merge/operators.py

One thread, CPU time (other work on the machine disturbs it less than wall time). Beside it a full SVD of the same matrices,
which is what the operators' Gram eigenproblem replaces. Writes benchmarks/results/merge_operators.md and .json. Not
covered: reading and writing files, GPUs.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from benchmark import HIDDEN, INTERMEDIATE, KV, LAYERS, RESULTS, machine
from threadpoolctl import threadpool_limits

from merit.merge.operators import iso_cts, spectral, star, tsv

BRANCHES = 4
WIDTHS = (0.25, 0.5, 1.0)


def layer(width: float) -> list[tuple[int, int]]:
    h, i, kv = int(HIDDEN * width), int(INTERMEDIATE * width), int(KV * width)
    return [(i, h), (i, h), (h, i), (h, h), (h, h), (kv, h), (kv, h)]


def cpu(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    rng = np.random.default_rng(0)
    methods: dict[str, Callable[[list[np.ndarray]], object]] = {
        "star": star.merge_matrix,
        "tsv": tsv.merge_matrix,
        "iso_cts": iso_cts.merge_matrix,
        "(SVDs alone, by Gram)": lambda parts: [spectral.svd(p) for p in parts],
        "(SVDs alone, full)": lambda parts: [np.linalg.svd(p, full_matrices=False) for p in parts],
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    with threadpool_limits(1):
        for width in WIDTHS:
            matrices = [[rng.normal(size=shape) * 1e-3 for _ in range(BRANCHES)] for shape in layer(width)]
            for name, method in methods.items():
                seconds[name].append(sum(cpu(lambda m=method, parts=parts: m(parts)) for parts in matrices))
                print(width, name, round(seconds[name][-1], 2), flush=True)
    host = machine()
    lines = [
        "# Cost of the spectral merge operators",
        "",
        "`OMP_NUM_THREADS=1 python benchmarks/merge/operators.py`: CPU seconds, one thread, float64, 4 branches, the",
        f"seven matrices of one Qwen2 layer ({HIDDEN} × {INTERMEDIATE} at full width).",
        "",
        "| | " + " | ".join(f"layer, {w:g} × width" for w in WIDTHS) + f" | growth | {LAYERS} layers |",
        "|---|" + "---|" * (len(WIDTHS) + 2),
    ]
    for name, row in seconds.items():
        growth = math.log(row[-1] / row[-2]) / math.log(WIDTHS[-1] / WIDTHS[-2])
        cells = [f"{s:.2f}" for s in row] + [f"width^{growth:.1f}", f"{row[-1] * LAYERS:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Matrices are merged side by side, one thread each, so wall time is about the total divided by the cores.",
        f"{host['cores']} cores ({host['cpu']}), {host['memory_gib']} GiB; Python {platform.python_version()}, "
        f"numpy {version('numpy')}; {datetime.date.today()}.",
        "",
    ]
    (RESULTS / "merge_operators.md").write_text("\n".join(lines))
    values = {"date": str(datetime.date.today()), "machine": host, "numpy": version("numpy"), "widths": WIDTHS}
    Path(RESULTS / "merge_operators.json").write_text(json.dumps(values | {"cpu_seconds": seconds}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
