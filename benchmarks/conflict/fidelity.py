"""Cosine fidelity: sketches of several sizes and strides against exact gradients of the default calibration sample."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.conflict.blocks import read_blocks

from merit.conflict.compare import agreement, compress
from merit.conflict.geometry import gram_matrix
from merit.split.components import cosine_matrix

SKETCHES = [2**k for k in range(14, 21)]
STRIDES = [5, 50]
SEEDS = range(3)


def fidelity(work: Path, layout: dict[str, int]) -> dict[str, Any]:
    """One entry per representation (a sketch's figures are means over seeds), and how uneven the gradients are."""
    vectors = [blocks.sample for blocks in read_blocks(work)]
    true = cosine_matrix(gram_matrix(vectors))
    table = []
    for kind, settings in (("sketch", SKETCHES), ("stride", STRIDES)):
        for setting in settings:
            runs = []
            for seed in SEEDS if kind == "sketch" else (0,):
                rows = [compress(vector, layout, kind, setting, seed) for vector in vectors]
                runs.append(asdict(agreement(cosine_matrix(gram_matrix(rows)), true)))
            mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
            table.append(
                {"representation": kind, "setting": setting, "bytes": 4 * len(rows[0]), "seeds": len(runs), **mean}
            )
    shares = [np.sort(v.astype(np.float64) ** 2)[-100:].sum() / (v.astype(np.float64) ** 2).sum() for v in vectors]
    return {"datasets": len(vectors), "top_100_share": float(np.mean(shares)), "representations": table}
