"""The conflict benchmarks' results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from benchmarks.conflict import calibration

COMMAND = "python -m benchmarks.conflict.run --base BASE --mixture MIXTURE --work SCRATCH"


def report(found: dict[str, Any]) -> str:
    """All sections whose figures are there."""
    m = found["machine"]
    parts = [
        f"""# Conflict engine: measured

`{COMMAND}{f" --rows {found['rows']}" if "rows" in found else ""}`

{m["date"]}; {m["cpus"]} CPU cores, no GPU, {m["memory_gib"]} GiB; Python {m["python"]}, torch {m["torch"]}, transformers
{m["transformers"]}, NumPy {m["numpy"]}; one thread unless said. The cores were shared with other work, so times are CPU
time, the least of several interleaved rounds, unless said.

Base: tinystories-656k (Llama architecture, 656,000 parameters). Mixture: the datasets of the real mixture whose text its
tokenizer represents (at most 2 % of the characters lost), rows cut at 512 tokens."""
    ]
    sections = {
        "fidelity": _fidelity,
        "time": _time,
        "memory": _memory,
        "sensitivity": _sensitivity,
        "schemes": _schemes,
    }
    parts += [write(found[key]) for key, write in sections.items() if key in found]
    if "time" in found:
        parts.append(_scale(found))
    return "\n\n".join(parts) + "\n"


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = ["| " + " | ".join(headers) + " |", "|---|" + "---:|" * (len(headers) - 1)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _fidelity(found: dict[str, Any]) -> str:
    rows = found["representations"]
    head = ["representation", "MiB per dataset", "Pearson", "Spearman", "MAE", "RMSE", "largest error"]
    shown = [
        [
            f"{r['representation']} {r['setting']:,}",
            f"{r['bytes'] / 2**20:.2f}",
            *(f"{r[key]:.5f}" for key in ("pearson", "spearman", "mae", "rmse")),
            f"{r['max_error']:.4f}",
        ]
        for r in rows
    ]
    return f"""## Cosines against exact gradients

{found["datasets"]} datasets, {int(rows[0]["pairs"])} pairs, 200 examples each (all rows where there are fewer); sketches:
mean of {rows[0]["seeds"]} seeds. Target at 2^18 = 262,144: MAE ≤ 0.003, Pearson ≥ 0.9995. A stride's size grows with
the model, a sketch's does not.

{table(head, shown)}

The 100 largest of the 656,000 entries (mostly gains of norm layers) hold {found["top_100_share"]:.0%} of a gradient's
squared norm on average: a stride keeps a fifth of them by chance of position, a sketch keeps all."""


def _time(found: dict[str, Any]) -> str:
    head = ["model, rows", "parameters", "tokens", "micro-batches", "bare pass (s)", "held / bare", "streamed / bare"]
    shown = [
        [
            r["what"],
            f"{r['parameters']:,}",
            f"{r['tokens']:,}",
            r["micro_batches"],
            f"{r['bare_seconds']:.2f}",
            f"{r['held']:.3f}",
            f"{r['streamed']:.3f}",
        ]
        for r in found["ratios"]
    ]
    return f"""## Time over a bare forward and backward pass

The same micro-batches; *held* folds once per quarter-sample, *streamed* after every micro-batch. Target ≤ 1.10.

{table(head, shown)}

Folding costs {found["fold_ns_per_entry"]:.1f} ns per gradient entry; adding two float32 vectors of that length costs
{found["addition_ns_per_entry"]:.1f} ns per entry."""


def _memory(found: dict[str, Any]) -> str:
    first = found["plain"]
    shown = [
        [name, f"{r['model_mib']:.0f}", f"{r['peak_mib']:.0f}", f"{r['peak_mib'] / first['peak_mib']:.3f}"]
        for name, r in found.items()
    ]
    return f"""## Peak memory

Qwen2 architecture, {first["parameters"]:,} parameters in float32, 8 short rows per dataset; resident MiB above the
interpreter with its libraries. *plain*: a backward pass that holds all gradients of one dataset. The largest parameter takes
{first["largest_parameter_mib"]:.0f} MiB. Target: streamed ≤ 0.65 of plain, no growth with T.

{table(["way", "model (MiB)", "peak (MiB)", "peak / plain"], shown)}

The peak still creeps up, by less and less per dataset. Nothing is kept per dataset (on a small model the resident set stays
the same over 24 datasets); fragmentation of the C allocator's heap is the likely cause, not a verified one."""


def _sensitivity(rows: list[dict[str, Any]]) -> str:
    most = max(r["rows"] for r in rows)
    full = sorted({r["dataset"] for r in rows if r["rows"] == most})
    head = ["n", "real", "estimated", "lowest real", "datasets", "mean error", "largest error", "rms error of one draw"]
    shown = []
    for size in calibration.SIZES:
        every = [r for r in rows if r["examples"] == size]
        long = [r for r in every if r["dataset"] in full]
        if not long:
            continue
        errors = np.array([abs(r["estimated"] - r["real"]) for r in every])
        shown.append(
            [
                size,
                f"{np.mean([r['real'] for r in long]):.4f}",
                f"{np.mean([r['estimated'] for r in long]):.4f}",
                f"{min(r['real'] for r in long):.3f}",
                len(every),
                f"{errors.mean():.4f}",
                f"{errors.max():.4f}",
                f"{np.sqrt(np.mean([r['rms_error_of_one'] ** 2 for r in every])):.4f}",
            ]
        )
    return f"""## Calibration sensitivity

Cosine of the gradient of n examples with that of all (at most {most:,}) rows, really computed, and the expected cosine that
quarter-samples give without it; mean over {calibration.DRAWS} draws. Left: the {len(full)} datasets with {most:,} rows.
Right: errors of the mean estimate over all datasets with at least n rows.

{table(head, shown)}"""


def _schemes(rows: list[dict[str, Any]]) -> str:
    shown = [
        [
            r["scheme"],
            f"{r['examples']:.0f}",
            *(f"{r[f'agreement_{a}']:.3f} ({r[f'predicted_{a}']:.3f})" for a in (1, 2, 3) if f"agreement_{a}" in r),
        ]
        for r in rows
    ]
    return f"""## How many examples are enough for the split?

Share of datasets in the same group as in the split from all rows (PCA, balanced by samples), mean over draws; in brackets
the mean probability that a draw's own quarter-samples predict.

{table(["scheme", "examples per dataset", "r = 1", "r = 2", "r = 3"], shown)}"""


def _scale(found: dict[str, Any]) -> str:
    fold = found["time"]["fold_ns_per_entry"]
    return f"""## On paper: 7B parameters, 1,000 datasets

Not measured. 200 examples × 300 tokens per dataset are 6·10⁷ tokens; at 6 operations per parameter and token that is
2.5·10¹⁸ operations: about 5.6 h on one GPU that sustains 125 TFLOP/s in bfloat16 (an assumption: 40 % of an A100's peak), 42
min on eight (datasets are independent).

- Memory: float32 weights 28 GB + activations + the largest parameter's gradient (2.2 GB for 152,064 × 3,584).
- Disk: 1 GiB of sketches + 4 GiB of quarter-samples; one entry in five of every gradient would be 5.6 TB in float32.
- Geometry and split: see geometry.md, whatever the model.
- On a CPU core, folding the 7·10⁹ entries of a quarter-sample takes {7 * fold:.0f} s at the measured rate; its backward
  passes (15,000 tokens) would take 3.5 h at 50 GFLOP/s."""
