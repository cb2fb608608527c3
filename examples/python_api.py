"""The whole method in Python, on files that the package ships: a minute on one core, offline.

    python examples/python_api.py [FOLDER]

docs/python-api.md explains it line by line.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import merit
from merit.demo import write_demo
from merit.recipe.schema import ConflictSettings, EvaluateSettings, MixtureSettings, TrainSettings


def main(folder: Path) -> merit.Evaluation:
    """Split, train, merge and evaluate a small part of the demo's mixture; everything is written below ``folder``."""
    write_demo(folder / "demo")  # a base of 0.9M parameters, and datasets
    some = ["add_*", "reverse_*", "count_short", "compare_short", "swap", "stutter"]

    base = merit.open_base(folder / "demo" / "base")
    found = merit.find_datasets(MixtureSettings(folder=str(folder / "demo" / "mixture"), include=some, samples=48))
    mix = merit.encode_mixture(found, base, max_length=128)
    print(f"{len(mix.train)} datasets, {sum(mix.target_tokens.values()):,} target tokens")

    geometry = merit.measure_gradients(mix.train, base, ConflictSettings(examples=16))
    split = merit.split_mixture("pca", axes=1, geometry=geometry, weights=mix.rows)
    for number, group in enumerate(split.groups):
        print(f"group {number}: {', '.join(group)}")

    settings = TrainSettings(learning_rate=1e-4, batch_size=16, max_length=128, threads=1)
    parts = [
        merit.train_branch(mix.train.only(group), base, folder / "branches" / str(number), settings)
        for number, group in enumerate(split.groups)
    ]
    model = merit.merge_branches(base, parts, folder / "merged")
    print(f"merged with weights {', '.join(f'{weight:.2f}' for weight in model.weights)}")

    result = merit.evaluate({"base": base, "merged": model}, mix.test, EvaluateSettings(max_examples=8))
    print(result.verdict)
    return result


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
