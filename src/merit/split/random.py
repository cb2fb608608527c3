"""Random balanced split: the paper's random baseline, with the same balance rule as the conflict-aware one (paper §5)."""

from __future__ import annotations

import numpy as np

from merit.split.balance import bisect
from merit.split.view import Groups, MixtureView


def split(view: MixtureView, axes: int, seed: int) -> Groups:
    """Cut along random axes: standard normal scores, drawn by seed in name order."""
    scores = np.random.default_rng([seed, 0x5EED]).standard_normal((len(view.names), axes))
    return bisect(scores, view.weights, view.names)
