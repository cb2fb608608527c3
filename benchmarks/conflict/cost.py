"""What measuring costs: time over a bare forward and backward pass, and peak memory.

Times are CPU time of the process (wall time beside it), so that other work on the machine disturbs little; contestants
take turns, and the least of several rounds counts. Memory is the peak resident set after the model stands, less what stood
before it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 6


def random_qwen2(hidden: int, layers: int, vocabulary: int, intermediate: int) -> Any:
    """A Qwen2-architecture model with random weights, all of it trainable."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def random_rows(count: int, length: int, vocabulary: int) -> list[Any]:
    from merit.hf.rows import EncodedRow

    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocabulary, size=(count, length)).astype(np.int32)
    return [EncodedRow(row, np.arange(length) >= length // 2) for row in ids]


def clocked(work: Callable[[], Any]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def time_ratio(model: Any, rows: list[Any], recipe: Any, batcher: Any, label: str) -> dict[str, Any]:
    """Seconds of a bare pass, and ratios of our two ways, over the same micro-batches."""
    import torch

    from merit.conflict.gradients import GradientMeter
    from merit.conflict.store import Sums
    from merit.hf.batches import iterate_batches, length_sorted_batches, target_losses

    cpu = torch.device("cpu")
    meters = {
        memory: GradientMeter(model, recipe.conflict, seed=0, batcher=batcher, device=cpu, memory=memory)
        for memory in ("held", "streamed")
    }
    tokens = meters["held"].batch_tokens
    out = np.zeros((4, meters["held"].width), dtype=np.float32)

    def bare() -> None:
        for part in range(4):
            quarter = rows[part::4]
            model.zero_grad(set_to_none=True)
            for _, batch in iterate_batches(
                quarter, length_sorted_batches([len(r.input_ids) for r in quarter], tokens), batcher, cpu
            ):
                losses, counts = target_losses(model, batch)
                (losses / counts).sum().backward()
        model.zero_grad(set_to_none=True)

    contestants = {"bare": bare} | {
        name: (lambda meter=meter: meter.measure("x", rows, out, Sums())) for name, meter in meters.items()
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for number in range(ROUNDS + 1):
        for name, work in contestants.items():
            clock = clocked(work)
            if number:
                times[name].append(clock)
    least = {name: min(cpu for cpu, _ in found) for name, found in times.items()}
    batches = sum(len(length_sorted_batches([len(r.input_ids) for r in rows[p::4]], tokens)) for p in range(4))
    return {
        "what": label,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": sum(len(r.input_ids) for r in rows),
        "micro_batches": batches,
        "bare_seconds": least["bare"],
        "bare_wall_seconds": min(wall for _, wall in times["bare"]),
        "held": least["held"] / least["bare"],
        "streamed": least["streamed"] / least["bare"],
    }


def fold_rate(size: int = 2**18, entries: int = 2**22) -> dict[str, float]:
    """Nanoseconds per gradient entry to fold, beside a plain addition of the same entries."""
    import torch

    from merit.conflict.sketch import fold

    values, total, other = torch.randn(entries), torch.zeros(size, dtype=torch.float64), torch.zeros(entries)
    least = min(clocked(lambda: fold(total, "w", values, 0))[0] for _ in range(5))
    plain = min(clocked(lambda: other.add_(values))[0] for _ in range(5))
    return {"fold_ns_per_entry": least / entries * 1e9, "addition_ns_per_entry": plain / entries * 1e9}


# ---- memory, each variant in a process of its own -------------------------------------------------------------------


def peak_memory(variant: str, datasets: int, work: Path) -> dict[str, float]:
    """Peak resident MiB above the interpreter with its libraries, for one variant."""
    text = subprocess.run(
        [sys.executable, "-m", "benchmarks.conflict.cost", variant, str(datasets), str(work)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return json.loads(text.strip().splitlines()[-1])


def _status(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def _memory_child(variant: str, datasets: int, work: Path) -> None:
    import torch

    from merit.conflict.gradients import GradientMeter
    from merit.conflict.store import GradientStore
    from merit.hf.batches import Batcher, target_losses
    from merit.recipe.schema import ConflictSettings

    torch.set_num_threads(1)
    rows = random_rows(8, 32, 8192)
    target_losses(random_qwen2(64, 1, 8192, 64), Batcher(0)(rows))[0].sum().backward()  # libraries warm up
    before = _status("VmRSS")
    model = random_qwen2(768, 16, 8192, 3072)
    stands = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    if variant == "plain":
        for _ in range(datasets):
            model.zero_grad(set_to_none=True)
            for start in range(0, 8, 2):
                target_losses(model, Batcher(0)(rows[start : start + 2]))[0].sum().backward()
    else:
        settings = ConflictSettings(batch_tokens=64)
        meter = GradientMeter(model, settings, seed=0, batcher=Batcher(0), device=torch.device("cpu"), memory=variant)  # type: ignore[arg-type]
        store = GradientStore(work / f"memory-{variant}-{datasets}")
        for index in range(datasets):
            with store.writing(f"{index:032d}", meter.width) as (vectors, sums):
                meter.measure(f"d{index}", rows, vectors, sums)
    parameters = sum(p.numel() for p in model.parameters())
    largest = max(p.numel() for p in model.parameters())
    print(
        json.dumps(
            {
                "parameters": parameters,
                "model_mib": stands - before,
                "peak_mib": _status("VmHWM") - before,
                "largest_parameter_mib": largest * 4 / 2**20,
            }
        )
    )


if __name__ == "__main__":
    _memory_child(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
