"""Do finer splits fail first at small learning rates? Joint against 1D, 2D and 3D with SGD at five rates (F.1 step 6).

    python -m benchmarks.diagnostics.sgd_sweep [--base longer] [--rates 0.01 0.1] [--write]

Base and mixture of :mod:`benchmarks.diagnostics.probe`; one epoch, one seed; held-out loss (nats per target token), a mean
over datasets.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from benchmarks.diagnostics.probe import BASES, held_out_loss, write_base, write_mixture
from benchmarks.report import RESULTS, machine, table

from merit.progress import Silent
from merit.recipe.load import load_recipe
from merit.run.chain import run_chain
from merit.run.session import Session

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
SPLITS = {"joint": ("joint", 1), "1D": ("pca", 1), "2D": ("pca", 2), "3D": ("pca", 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="longer", choices=list(BASES))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/sgd_sweep.json and .md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    losses: dict[str, dict[str, float]] = {}
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        related = write_mixture(root / "related", "of: {}", 200, 4)
        mixture = write_mixture(root / "mixture", "{}", 192, 12)
        base = write_base(root / "base", BASES[args.base], related)
        for rate in args.rates:
            for name, (method, axes) in SPLITS.items():
                recipe = {
                    "name": "x",
                    "model": {"base": str(base), "dtype": "float32"},
                    "mixture": {"folder": str(mixture)},
                    "conflict": {"examples": 32, "sketch_size": 4096},
                    "split": {"axes": axes, "method": method},
                    "train": {
                        "learning_rate": rate,
                        "batch_size": 16,
                        "max_length": 96,
                        "threads": 1,
                        "optimizer": "sgd",
                    },
                    "evaluate": {"exact_match": "never", "drift": {"prompts": 0}, "branches": False},
                }
                file = root / f"{rate}-{name}.yaml"
                file.write_text(json.dumps(recipe))
                session = Session(load_recipe(file), root / file.stem, Silent())
                run_chain(session)
                losses.setdefault(f"{rate:g}", {})[name] = held_out_loss(session, "merged")
                losses[f"{rate:g}"]["base"] = held_out_loss(session, "base")
                print(rate, name, losses[f"{rate:g}"], flush=True)
    report(losses, args.base, f"{time.process_time() - started:.0f} CPU seconds", write=args.write)


def report(losses: dict[str, dict[str, float]], base: str, cost: str, *, write: bool) -> None:
    """Print the table; with ``write``, also keep it."""
    facts = machine()
    rows = [[rate, *(f"{found[name]:.3f}" for name in ("base", *SPLITS))] for rate, found in losses.items()]
    lines = [
        f"# SGD at {len(losses)} learning rates: joint, 1D, 2D, 3D",
        "",
        f"`python -m benchmarks.diagnostics.sgd_sweep --base {base} --rates {' '.join(losses)} --write` on {facts['date']}, "
        f"{facts['cores']} CPU cores, {cost}. Held-out loss, mean over 12 datasets (nats per target token); one epoch, one "
        "seed, a tiny Llama.",
        "",
        table(["rate", "base", *SPLITS], rows),
        "",
    ]
    print("\n".join(lines))
    if write:
        (RESULTS / "sgd_sweep.md").write_text("\n".join(lines))
        (RESULTS / "sgd_sweep.json").write_text(json.dumps({"machine": facts, "losses": losses}, indent=1))


if __name__ == "__main__":
    main()
