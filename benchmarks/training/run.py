"""Training throughput on the same batches: ours, a bare PyTorch loop, and TRL's SFTTrainer where it is installed.

    python benchmarks/training/run.py --base CHECKPOINT --mixture FOLDER [--include NAME]... [--steps 60] [--rounds 5]

All contestants start from the same base, see the same rows in the same order, and take the same number of optimizer
steps (AdamW, cosine, batch 16, one thread, float32). They run interleaved, round after round, in one process; the first
round is not counted. Time is the process's CPU time from the first step to the last, loading and saving left out (wall
time stands beside it: on a busy machine it says more about the neighbours). The ratio is the median over rounds of
(bare loop's time / contestant's time): above 1 is faster than the bare loop.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from merit.files import write_json, write_text
from merit.hf import batches, models
from merit.hf.base import open_base
from merit.mixture import EncodedDataset
from merit.mixture.found import find_datasets
from merit.mixture.stage import encode_mixture
from merit.recipe.load import parse_recipe
from merit.recipe.schema import Recipe
from merit.run.record import versions
from merit.train import branch as train
from merit.train.batches import CPU_OVERHEAD, GroupRows, StepOrder, steps_for
from merit.train.guards import silence_libraries

RESULTS = Path(__file__).parents[1] / "results"
Clock = tuple[float, float]


def now() -> Clock:
    return time.process_time(), time.perf_counter()


def since(start: Clock) -> Clock:
    return time.process_time() - start[0], time.perf_counter() - start[1]


class Bench:
    """The base, the rows and the order that every contestant gets."""

    def __init__(self, recipe: Recipe, group: Mapping[str, EncodedDataset]) -> None:
        self.recipe = recipe
        self.group = group
        self.rows = GroupRows(group)
        self.device = torch.device("cpu")
        self.base = open_base(recipe.model)
        self.batch = recipe.train.batch_size
        self.steps = steps_for(len(self.rows), self.batch, recipe.train.epochs)
        self.batches = list(StepOrder(len(self.rows), self.batch, recipe.seed, self.steps))

    def model(self) -> Any:
        return models.load_model(self.base, self.device, trainable=True, seed=self.recipe.seed)

    def bare(self, loss_of: Callable[[Any, dict[str, torch.Tensor]], tuple[torch.Tensor, int]]) -> tuple[Clock, float]:
        """The plainest loop: forward, backward, clip, AdamW, schedule."""
        model = self.model().train()
        settings = self.recipe.train
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        warmup = math.ceil(settings.warmup_ratio * self.steps)
        start = now()
        for step, numbers in enumerate(self.batches):
            past = (step - warmup) / (self.steps - warmup)
            factor = (step + 1) / (warmup + 1) if past < 0 else 0.5 * (1 + math.cos(math.pi * past))
            optimizer.param_groups[0]["lr"] = settings.learning_rate * factor
            batch = self.base.batcher([self.rows[i] for i in numbers])
            total, count = loss_of(model, batch)
            loss = total / count
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return since(start), loss.item()

    def bare_plain(self) -> tuple[Clock, float]:
        def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            labels = batch["labels"][:, 1:]
            total = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=batches.IGNORE, reduction="sum"
            )
            return total, int((labels != batches.IGNORE).sum())

        return self.bare(loss_of)

    def bare_target_positions(self) -> tuple[Clock, float]:
        def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
            losses, counts = batches.target_losses(model, batch)
            return losses.sum(), int(counts.sum())

        return self.bare(loss_of)

    def ours(self, overhead: int | None = CPU_OVERHEAD) -> tuple[Clock, float]:
        taken: list[Clock] = []
        original = train._take_steps

        def timed(*args: Any) -> None:
            start = now()
            original(*args)
            taken.append(since(start))

        train._take_steps, train.CPU_OVERHEAD = timed, overhead  # type: ignore[assignment]
        try:
            with tempfile.TemporaryDirectory() as folder:
                settings = self.recipe.train
                train.train_branch(self.group, self.base, folder, settings, seed=self.recipe.seed)
                last = json.loads((Path(folder) / "log.jsonl").read_text().splitlines()[-1])["loss"]
        finally:
            train._take_steps, train.CPU_OVERHEAD = original, CPU_OVERHEAD
        return taken[0], last

    def stock_trl(self) -> tuple[Clock, float]:
        """SFTTrainer as it comes, given encoded rows and our order."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        order = [number for numbers in self.batches for number in numbers]

        class Ordered(SFTTrainer):
            def _get_train_sampler(self, train_dataset: Any = None) -> Any:
                return order

        encoded = [self.rows[i] for i in range(len(self.rows))]
        dataset = Dataset.from_dict(
            {
                "input_ids": [row.input_ids.tolist() for row in encoded],
                "labels": [np.where(row.targets, row.input_ids, batches.IGNORE).tolist() for row in encoded],
            }
        )
        settings = self.recipe.train
        with tempfile.TemporaryDirectory() as folder:
            args = SFTConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                activation_checkpointing=False,
                per_device_train_batch_size=self.batch,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=settings.warmup_ratio,
                max_steps=self.steps,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            stock = Ordered(model=self.model(), args=args, processing_class=self.base.tokenizer, train_dataset=dataset)
            start = now()
            stock.train()
            taken = since(start)
            batch = self.base.batcher([self.rows[i] for i in self.batches[-1]])
            with torch.no_grad():
                losses, counts = batches.target_losses(stock.model, batch)
        return taken, float(losses.sum() / counts.sum())


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--mixture", required=True)
    parser.add_argument("--include", action="append")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    mixture = {"folder": str(Path(options.mixture).resolve()), "include": options.include or ["*"]}
    base = str(Path(options.base).resolve())
    first = parse_recipe({"name": "benchmark", "model": {"base": base}, "mixture": mixture}, ["train.max_length=512"])
    mix = encode_mixture(find_datasets(first.mixture), open_base(first.model), max_length=512)
    group = {name: EncodedDataset(name, [rows[i] for i in range(len(rows))]) for name, rows in mix.train.items()}
    per_epoch = math.ceil(sum(map(len, group.values())) / 16)
    steps = min(options.steps, per_epoch)
    settings = {"batch_size": 16, "epochs": steps / per_epoch, "learning_rate": 1e-4, "max_length": 512}
    recipe = first.model_copy(update={"train": first.train.model_copy(update=settings)})
    silence_libraries()
    bench = Bench(recipe, group)
    contestants: dict[str, Callable[[], tuple[Clock, float]]] = {
        "bare PyTorch loop, logits everywhere": bench.bare_plain,
        "bare PyTorch loop, our loss": bench.bare_target_positions,
        "merit, micro-batches cut by length (as it comes on a CPU)": bench.ours,
        "merit, one micro-batch (as it comes on a GPU)": lambda: bench.ours(None),
    }
    if find_spec("trl") is not None:
        contestants["TRL SFTTrainer as it comes"] = bench.stock_trl
    times: dict[str, list[Clock]] = {name: [] for name in contestants}
    losses: dict[str, float] = {}
    for round_ in range(options.rounds + 1):
        for name, run in contestants.items():
            clock, losses[name] = run()
            if round_:
                times[name].append(clock)
            print(f"round {round_}: {name}: {clock[0]:.2f} s CPU, {clock[1]:.2f} s wall", flush=True)
    reference = next(iter(contestants))
    rows = [bench.rows[i] for numbers in bench.batches for i in numbers]
    targets = sum(int(row.targets.sum()) for row in rows)
    padded = sum(max(len(bench.rows[i].input_ids) for i in numbers) * len(numbers) for numbers in bench.batches)
    table = []
    for name in contestants:
        cpu = [clock[0] for clock in times[name]]
        ratios = [one[0] / other[0] for one, other in zip(times[reference], times[name], strict=True)]
        table.append(
            {
                "contestant": name,
                "cpu_seconds": statistics.median(cpu),
                "wall_seconds": statistics.median(clock[1] for clock in times[name]),
                "target_tokens_per_cpu_second": targets / statistics.median(cpu),
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "last_step_loss": losses[name],
            }
        )
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} x {cpu_model()}, {psutil.virtual_memory().total / 2**30:.0f} GiB, one thread",
        "versions": versions(),
        "base": {"model_type": bench.base.model_type, "parameters": bench.base.parameters},
        "work": {
            "datasets": sorted(group),
            "steps": bench.steps,
            "batch_size": 16,
            "rows": len(rows),
            "target_tokens": targets,
            "tokens": sum(len(row.input_ids) for row in rows),
            "padded_tokens": padded,
        },
        "rounds": options.rounds,
        "results": table,
    }
    write(facts, options.output)


def write(facts: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "training.json", facts)
    work = facts["work"]
    lines = [
        "# Training throughput",
        "",
        "`python benchmarks/training/run.py --base CHECKPOINT --mixture FOLDER "
        + " ".join(f"--include {name}" for name in work["datasets"])
        + f" --steps {work['steps']} --rounds {facts['rounds']}`",
        "",
        f"{facts['date']}; {facts['machine']}; torch {facts['versions']['torch']}, transformers "
        f"{facts['versions']['transformers']}, accelerate {facts['versions']['accelerate']}. "
        f"Base: {facts['base']['model_type']}, "
        f"{facts['base']['parameters']:,} parameters. {work['steps']} steps of 16 rows: {work['target_tokens']:,} target "
        f"tokens of {work['tokens']:,} ({work['padded_tokens']:,} with padding). Medians of {facts['rounds']} interleaved "
        "rounds; CPU time of the process, loading and saving left out. Ratio: bare loop's time over the contestant's, "
        "above 1 is faster (in brackets the range over rounds).",
        "",
        "| contestant | CPU s | wall s | target tokens per CPU s | ratio to the bare loop | loss at the last step |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in facts["results"]:
        low, high = row["ratio_range"]
        lines.append(
            f"| {row['contestant']} | {row['cpu_seconds']:.2f} | {row['wall_seconds']:.2f} | "
            f"{row['target_tokens_per_cpu_second']:,.0f} | {row['ratio']:.2f} ({low:.2f}–{high:.2f}) | "
            f"{row['last_step_loss']:.5f} |"
        )
    stock = any("TRL" in row["contestant"] for row in facts["results"])
    differs = (
        "TRL's after it (and TRL's warm-up starts at a learning rate of 0), so TRL's differs; the others agree"
        if stock
        else "and all agree"
    )
    lines += [
        "",
        f"The loss at the last step is taken before that step's update, {differs} to rounding because they do the same "
        "work.",
        "",
        "The gain over the bare loop is padding that is not computed; what the trainer itself costs is the fourth row "
        "against the second. Wall times were taken on a machine with other work on it.",
    ]
    write_text(output / "training.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
