"""PCA of raw gradients: as :mod:`merit.split.pca`, on the Gram matrix, so that long gradients weigh more (paper §5)."""

from __future__ import annotations

import numpy as np

from merit.split.balance import bisect
from merit.split.components import principal_components
from merit.split.view import Groups, MixtureView


def split(view: MixtureView, axes: int, seed: int) -> Groups:
    """Cut along the top ``axes`` principal components of the Gram matrix; ``seed`` is not used."""
    return bisect(scores(view, axes), view.weights, view.names)


def scores(view: MixtureView, axes: int) -> np.ndarray:
    """Coordinates (T, axes) along which the cuts are made."""
    assert view.gram is not None
    return principal_components(view.gram, axes).scores
