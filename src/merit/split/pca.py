"""The paper's split: principal axes of the column-centred cosine matrix, cut at weighted medians (paper §4 steps 3-4)."""

from __future__ import annotations

import numpy as np

from merit.split.balance import bisect
from merit.split.components import principal_components
from merit.split.view import Groups, MixtureView


def split(view: MixtureView, axes: int, seed: int) -> Groups:
    """Cut along the top ``axes`` principal components of the cosine matrix; ``seed`` is not used."""
    return bisect(scores(view, axes), view.weights, view.names)


def scores(view: MixtureView, axes: int) -> np.ndarray:
    """Coordinates (T, axes) along which the cuts are made."""
    assert view.cosine is not None
    return principal_components(view.cosine, axes).scores
