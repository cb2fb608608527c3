"""Held-out losses, row by row, of two trainings that differ in their seed alone: figures for a null that is real.

``python -m benchmarks.evaluation.losses RUN`` takes rows and base of a demo run (``merit demo --output RUN``), trains on
half of all rows in two orders, and writes ``benchmarks/evaluation/losses.json``; about two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from merit.evaluation.forward import Forward
from merit.evaluation.heldout import row_losses
from merit.files import write_text
from merit.hf.base import Base, open_base
from merit.hf.batches import target_losses
from merit.hf.models import load_model
from merit.hf.rows import EncodedRow
from merit.mixture import load_split
from merit.recipe.load import load_recipe

FILE = Path(__file__).with_name("losses.json")
BATCH, RATE = 16, 1e-4


def train(base: Base, rows: list[EncodedRow], seed: int) -> PreTrainedModel:
    """One epoch of AdamW with a linear decay, in an order drawn by ``seed``."""
    cpu = torch.device("cpu")
    model = load_model(base, cpu, trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0)
    steps = np.array_split(np.random.default_rng(seed).permutation(len(rows)), len(rows) // BATCH)
    model.train()
    for number, chosen in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - number / len(steps))
        losses, counts = target_losses(model, base.batcher([rows[i] for i in chosen]))
        optimizer.zero_grad()
        (losses.sum() / counts.sum()).backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    torch.set_num_threads(1)
    base = open_base(load_recipe(run / "recipe.yaml").model)
    rows = [row for part in load_split(run / "mixture", "train").values() for row in part][::2]
    parts = {name: load_split(run / "mixture", split) for name, split in (("mixture", "test"), ("kept", "kept"))}
    found: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
    for seed in (1, 2):
        model = train(base, rows, seed)
        print(f"seed {seed} is trained", flush=True)
        for part, datasets in parts.items():
            for name, dataset in datasets.items():
                losses, counts = row_losses(model, list(dataset), Forward(base.batcher, torch.device("cpu")))
                cells = [[round(float(loss), 5), int(count)] for loss, count in zip(losses, counts, strict=True)]
                found.setdefault(part, {}).setdefault(name, {})[f"seed {seed}"] = cells
    write_text(FILE, json.dumps(found, separators=(",", ":")).replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()
