"""Does the probe foresee how a full run ends? Rank correlations over bases × rates × splits, published whatever they are.

    python -m benchmarks.diagnostics.probe [--bases 3] [--rates 1e-3 ...] [--write]

Bases are tiny Llamas of different readiness (random; briefly and longer trained on related tasks), the mixture has 12
datasets of words, rates span a factor of 30, and splits are pca, random and conflict_induced. Each setting is probed (`merit
diagnose --probe`) and run in full. Outcomes, on held-out rows: loss of the base − loss of the merged model; and, for
what is to be gained over a random split, loss of the random split's merged model − loss of this split's, at the same base
and rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from benchmarks.report import RESULTS, machine, table
from scipy.stats import spearmanr

from merit.hf.base import open_base
from merit.hf.batches import target_losses
from merit.hf.models import load_model
from merit.mixture import find_datasets
from merit.mixture.stage import encode_mixture
from merit.progress import Silent
from merit.recipe.load import load_recipe
from merit.recipe.schema import EvaluateSettings, MixtureSettings, ModelSettings
from merit.run.chain import run_chain
from merit.run.diagnose_command import probe_alone
from merit.run.session import Session

BASES = {"random": 0, "brief": 60, "longer": 300}
RATES = (1e-3, 5e-3, 3e-2)
SPLITS = ("pca", "random", "conflict_induced")
WORDS = {
    "upper": str.upper,
    "reverse": lambda w: w[::-1],
    "first": lambda w: w[0],
    "last": lambda w: w[-1],
    "length": lambda w: str(len(w)),
    "double": lambda w: w + w,
    "sort": lambda w: "".join(sorted(w)),
    "vowels": lambda w: "".join(c for c in w if c in "aeiou") or "none",
    "next": lambda w: "".join(chr((ord(c) - 96) % 26 + 97) for c in w),
    "bare": lambda w: w,
    "polite": lambda w: f"Sure, {w}.",
    "spaced": lambda w: " ".join(w),
}


def rows(task: str, count: int, seed: int, prompt: str) -> list[dict[str, object]]:
    rng = np.random.default_rng([seed, *map(ord, task)])
    words = ["".join(rng.choice(list(string.ascii_lowercase), rng.integers(2, 7))) for _ in range(count)]
    return [
        {"messages": [{"role": "user", "content": prompt.format(w)}, {"role": "assistant", "content": WORDS[task](w)}]}
        for w in words
    ]


def write_mixture(folder: Path, prompt: str, train: int, test: int) -> Path:
    for task in WORDS:
        place = folder / task
        place.mkdir(parents=True)
        for name, count, seed in (("train", train, 0), ("test", test, 1)):
            lines = [json.dumps(row) for row in rows(task, count, seed, f"{task} {prompt}")]
            (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_base(folder: Path, steps: int, related: Path) -> Path:
    """A tiny Llama, trained for some steps on the same skills in other words."""
    from tests import builders

    builders.make_base(folder, hidden=32, tied=True)
    if not steps:
        return folder
    base = open_base(ModelSettings(base=str(folder), dtype="float32"))
    mixture = encode_mixture(
        find_datasets(MixtureSettings(folder=str(related)), EvaluateSettings()), base, max_length=96
    )
    every = [row for dataset in mixture.train.values() for row in dataset]
    model = load_model(base, torch.device("cpu"))
    for p in model.parameters():
        p.requires_grad_(True)
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=5e-3), np.random.default_rng(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / steps)
        losses, counts = target_losses(model, base.batcher([every[i] for i in rng.integers(0, len(every), 32)]))
        optimizer.zero_grad()
        (losses.sum() / counts.sum()).backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def held_out_loss(session: Session, model: str) -> float:
    results = json.loads((session.run / "evaluation" / "results.json").read_text())
    return float(np.mean([figures["loss"] for figures in results[model].values()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=list(SPLITS))
    parser.add_argument("--rows", type=int, default=192, help="training rows per dataset")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/probe.json and .md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, object]] = []
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        related = write_mixture(root / "related", "of: {}", 200, 4)
        mixture = write_mixture(root / "mixture", "{}", args.rows, 12)
        bases = {name: write_base(root / name, BASES[name], related) for name in args.bases}
        for (name, base), rate, split in itertools.product(bases.items(), args.rates, args.splits):
            text = {
                "name": "x",
                "model": {"base": str(base), "dtype": "float32"},
                "mixture": {"folder": str(mixture)},
                "conflict": {"examples": 32, "sketch_size": 4096},
                "split": {"axes": 1, "method": split},
                "train": {"learning_rate": rate, "batch_size": 16, "max_length": 96, "threads": 1, "epochs": 2},
                "evaluate": {"exact_match": "never", "drift": {"prompts": 0}, "branches": False},
                "diagnose": {"probe_steps": 32, "examples": 12, "task_examples": 24, "hessian_examples": 96},
            }
            file = root / f"{name}-{rate}-{split}.yaml"
            file.write_text(json.dumps(text))
            session = Session(load_recipe(file), root / file.stem, Silent())
            try:
                probe = probe_alone(session)
                run_chain(session)
            except Exception as error:  # a rate past the cliff may end in a loss that is not finite
                print(f"{file.stem}: {error}", flush=True)
                continue
            base_loss, merged = held_out_loss(session, "base"), held_out_loss(session, "merged")
            found.append(
                {
                    "base": name, "rate": rate, "split": split, "verdict": probe.verdict, "merged_gain": probe.merged_gain,
                    "carried": probe.carried, "barrier": probe.barrier, "ratio": probe.ratio, "percentile": probe.percentile,
                    "over_random": probe.over_random, "outcome": base_loss - merged, "merged_loss": merged,
                }
            )  # fmt: skip
            print(f"{file.stem}: probe {probe.merged_gain:+.3f}, outcome {base_loss - merged:+.3f}", flush=True)
    report(found, args, time.process_time() - started)


def correlation(pairs: list[tuple[float, float]]) -> dict[str, object]:
    """Spearman's rank correlation and its two-sided p by permutation."""
    if len(pairs) < 3:
        return {"settings": len(pairs), "rho": None, "p": None}
    one, two = map(np.array, zip(*pairs, strict=True))
    rho = float(spearmanr(one, two).statistic)
    rng = np.random.default_rng(0)
    other = [abs(float(spearmanr(one, rng.permutation(two)).statistic)) for _ in range(2000)]
    return {"settings": len(pairs), "rho": rho, "p": float(np.mean([o >= abs(rho) - 1e-12 for o in other]))}


def report(found: list[dict[str, object]], args: argparse.Namespace, seconds: float) -> None:
    random = {(item["base"], item["rate"]): item["merged_loss"] for item in found if item["split"] == "random"}
    for item in found:
        there = random.get((item["base"], item["rate"]))
        item["outcome_over_random"] = None if there is None else there - item["merged_loss"]  # type: ignore[operator]
    others = [i for i in found if i["split"] != "random" and i["outcome_over_random"] is not None]
    figures = {
        "merged gain of the probe → merged gain of the run": correlation(
            [(i["merged_gain"], i["outcome"]) for i in found]
        ),
        **{
            f"the same, base {name} alone": correlation(
                [(i["merged_gain"], i["outcome"]) for i in found if i["base"] == name]
            )
            for name in args.bases
        },
        "carried share of the probe → merged gain of the run": correlation(
            [(i["carried"], i["outcome"]) for i in found]
        ),
        "−barrier of the probe → merged gain of the run": correlation([(-i["barrier"], i["outcome"]) for i in found]),
        "gain over random, forecast → measured": correlation(
            [(i["over_random"], i["outcome_over_random"]) for i in others if i["over_random"] is not None]
        ),
        "percentile among random splits → measured gain over random": correlation(
            [(i["percentile"], i["outcome_over_random"]) for i in others if i["percentile"] is not None]
        ),
    }
    shown = [
        [
            i["base"], f"{i['rate']:g}", i["split"], i["verdict"], f"{i['merged_gain']:+.3f}", f"{i['carried']:.0%}",
            f"{i['barrier']:.1%}", "–" if i["percentile"] is None else f"{i['percentile']:.0%}",
            "–" if i["over_random"] is None else f"{i['over_random']:+.4f}", f"{i['outcome']:+.3f}",
            "–" if i["outcome_over_random"] is None else f"{i['outcome_over_random']:+.3f}",
        ]
        for i in found
    ]  # fmt: skip
    head = ["base", "rate", "split", "verdict", "probe: merged gain", "carried", "barrier", "percentile", "over random"]
    head += ["run: merged gain", "over random"]
    rhos = [[name, f["settings"], _shown(f["rho"], "+.2f"), _shown(f["p"], ".3f")] for name, f in figures.items()]
    bad = [i for i in found if i["outcome"] <= 0]
    called = (
        f"The merged model ended no better than the base in {len(bad)} settings; the verdict was not ready in "
        f"{sum(i['verdict'] == 'not ready' for i in bad)} of them, doubtful in "
        f"{sum(i['verdict'] == 'doubtful' for i in bad)}; and "
        f"not ready in {sum(i['verdict'] == 'not ready' for i in found if i['outcome'] > 0)} of the other "
        f"{len(found) - len(bad)}."
    )
    facts = machine()
    lines = [
        "# Does the probe foresee the outcome?",
        "",
        f"`python -m benchmarks.diagnostics.probe --write` on {facts['date']}, {facts['cores']} CPU cores, {seconds:.0f} "
        f"CPU seconds: {len(found)} settings, 12 datasets of {args.rows} rows, K = 2, two epochs; 32 probe steps per "
        "group. Losses are nats per target token on held-out rows; tiny Llamas, so the figures say nothing about large "
        "models.",
        "",
        table(["forecast → outcome", "settings", "Spearman's ρ", "p (permutation)"], rhos),
        "",
        called,
        "",
        table(head, shown),
        "",
    ]
    print("\n".join(lines))
    if args.write:
        (RESULTS / "probe.md").write_text("\n".join(lines))
        value = {"machine": facts, "correlations": figures, "settings": found}
        (RESULTS / "probe.json").write_text(json.dumps(value, indent=1))


def _shown(value: object, form: str) -> str:
    return "–" if value is None else format(value, form)


if __name__ == "__main__":
    main()
