"""A Qwen2.5-VL of random weights through gradients, one branch and the merge, each beside the plainest way to do it.

    python -m benchmarks.vision.run [--size small|half] [--device auto|cpu|cuda] [--rows 64] [--side 224]

``small`` is about 9 million parameters, for a CPU; ``half`` about 0.6 billion, for a GPU. Rows are generated pictures of
``--side`` pixels with a short question and answer. The bare loops see the same rows in the same batches, with pixels from
the same image processor (that is measured apart), so the ratio is what MERIT adds. Time is wall time, the better of
``--repeats`` rounds after one that is not counted; on a CPU one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import report
from tests.builders import make_vision_base as make_base
from tests.hf.vision_cases import picture_chats

from merit.conflict.gradients import GradientMeter
from merit.conflict.store import Sums
from merit.hf import batches, models
from merit.hf.base import open_base
from merit.mixture.dataset import EncodedDataset
from merit.mixture.encode import ChatEncoder
from merit.recipe.load import parse_recipe
from merit.recipe.schema import Recipe
from merit.train.branch import train_branch

TEXT = {
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4},
    "half": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 151936,
    },
}
VISION = {
    "small": {"depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 512, "out_hidden_size": 256},
    "half": {"depth": 12, "hidden_size": 640, "num_heads": 10, "intermediate_size": 2560, "out_hidden_size": 1024},
}
SEEN = {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [3]}


def peak(device: torch.device) -> float:
    """GiB at most so far: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def best(action: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Wall seconds of the fastest round after a first one."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def make_recipe(base: Path, device: str) -> Recipe:
    return parse_recipe(
        {
            "name": "vision",
            "model": {"base": str(base)},
            "mixture": {"folder": str(base)},
            "train": {"batch_size": 8, "learning_rate": 1e-5, "device": device, "max_length": 1024},
        }
    )


def bare_gradient(model: Any, parts: list[Any], batcher: Any, device: torch.device, cast: Any) -> None:
    """Forward and backward over the same batches, nothing kept of the gradient."""
    for rows in parts:
        batch = batches.to_device(batcher(rows), device)
        with cast():
            losses, counts = batches.target_losses(model, batch)
        (losses / counts).sum().backward()
    model.zero_grad(set_to_none=True)


def bare_branch(model: Any, parts: list[Any], batcher: Any, device: torch.device, cast: Any) -> None:
    """The plainest training loop."""
    parameters = list(models.trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    for rows in parts:
        batch = batches.to_device(batcher(rows), device)
        with cast():
            losses, counts = batches.target_losses(model, batch)
        (losses.sum() / counts.sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def run(args: argparse.Namespace, scratch: Path) -> None:
    device = models.pick_device(args.device)
    models.limit_threads(1 if device.type == "cpu" else None)
    folder = make_base(
        "qwen2_5_vl",
        scratch / "base",
        dtype="bfloat16",
        text=TEXT[args.size],
        vision={**SEEN, **VISION[args.size]},
        processor={"patch_size": 14, "min_pixels": 3136, "max_pixels": 614656},
    )
    recipe = make_recipe(folder, device.type)
    base = open_base(recipe.model)
    assert base.images is not None
    chats = picture_chats(scratch / "pictures", args.rows, many=False, sizes=[(args.side, args.side)])
    rows: list[Any] = ChatEncoder(base.tokenizer, 1024, base.images).encode(chats)
    dataset = EncodedDataset("pictures", rows, seeing=base.images.settings)
    batcher = base.batcher
    parts = [[dataset[i] for i in range(k, min(k + 8, len(rows)))] for k in range(0, len(rows), 8)]

    def cast() -> Any:
        return models.autocast(recipe.model, device)

    pixels = best(lambda: [batcher(part) for part in parts], args.repeats, device)
    model = models.load_model(base, device, trainable=True)
    trained = sum(p.numel() for p in models.trainable_parameters(model).values())
    tokens = int(dataset.lengths.sum())
    found: list[tuple[str, float, float]] = []

    plain = best(lambda: bare_gradient(model, parts, batcher, device, cast), args.repeats, device)
    settings = recipe.conflict.model_copy(update={"batch_tokens": 8 * int(dataset.lengths.max())})
    meter = GradientMeter(model, settings, seed=0, batcher=batcher, device=device, autocast=cast)
    out = np.zeros((4, meter.width), np.float32)
    every = [dataset[i] for i in range(len(rows))]
    ours = best(lambda: meter.measure("pictures", every, out, Sums()), args.repeats, device)
    found.append(("gradient of one dataset", ours, plain))

    plain = best(lambda: bare_branch(model.train(), parts, batcher, device, cast), args.repeats, device)
    facts: dict[str, Any] = {}

    def branch() -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            settings = recipe.train.model_copy(update={"threads": 1} if device.type == "cpu" else {})
            facts.update(train_branch({"pictures": dataset}, base, Path(folder) / "branch", settings).facts())

    best(branch, args.repeats, device)
    found.append(("one branch, one epoch", facts["seconds"], plain))

    body = report.table(
        ["", "ours, s", "bare loop, s", "ratio", "images/s", "tokens/s"],
        [
            [
                name,
                f"{ours:.2f}",
                f"{plain:.2f}",
                f"{ours / plain:.2f}",
                f"{len(rows) / ours:.1f}",
                f"{tokens / ours:.0f}",
            ]
            for name, ours, plain in found
        ],
    )
    body += (
        f"\n\n{base.parameters / 1e6:.1f} million parameters, {trained / 1e6:.1f} of them trained (language); "
        f"{len(rows)} pictures of {args.side} x {args.side} pixels, {tokens} tokens in all; device {device.type}. "
        f"Decoding and processing the pictures alone takes {pixels:.2f} s of each figure; peak memory "
        f"{peak(device):.2f} GiB. The branch's figure is its training time; loading and saving are not in it."
    )
    command = f"python -m benchmarks.vision.run --size {args.size} --rows {args.rows} --side {args.side}"
    file = report.write(
        f"vision-{args.size}-{device.type}",
        "Vision-language: what MERIT adds",
        command,
        body,
        {"figures": [dict(zip(("what", "ours", "bare"), item, strict=True)) for item in found], "pixels_s": pixels},
    )
    print(json.dumps({"written": file.name}), body, sep="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(TEXT), default="small")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run(args, Path(scratch))


if __name__ == "__main__":
    main()
