"""Draw docs/theory-cubic-growth.svg and .png: gain of three splits of four tasks against the curvature gap.

python scripts/draw_theory.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from merit.report.figures import COLOURS, STYLE, save
from merit.theory import conflict_matrix, four_tasks, random_split_gain, two_group_gain


def main(folder: Path) -> None:
    gaps = np.geomspace(1, 16, 41)
    gains: dict[str, list[float]] = {"first": [], "second": [], "crossed": [], "random": []}
    for gap in gaps:
        gradients, hessian, splits = four_tasks((float(gap), 1.0), (1.0, 1.0))
        matrix = conflict_matrix(gradients, hessian)
        for name, signs in splits.items():
            gains[name].append(two_group_gain(signs, matrix, 1.0))
        gains["random"].append(random_split_gain(matrix, 1.0))
    labels = {
        "first": "cut along the first axis (PCA's choice): ∝ λ1³",
        "random": "random balanced split, on average",
        "second": "cut along the second axis",
        "crossed": "crossed groups: 0",
    }
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        for place, scale in zip(figure.subplots(1, 2), ("linear", "log"), strict=True):
            for colour, (name, label) in zip(COLOURS, labels.items(), strict=False):
                if scale == "linear" or name != "crossed":
                    place.plot(gaps, gains[name], color=colour, label=label)
            place.set(xscale=scale, yscale=scale, xlabel="curvature gap λ1 / λ2", ylabel="merging gain (units of η²)")
            place.set_title("linear axes" if scale == "linear" else "logarithmic axes: slope 3")
            if scale == "linear":
                place.legend()
        figure.suptitle("The gain of a split grows with the cube of the curvature that it cuts along", fontsize=11)
        save(figure, folder / "theory-cubic-growth")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs")
