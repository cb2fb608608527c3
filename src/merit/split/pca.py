"""The paper's split: principal axes of the column-centred cosine matrix, cut at weighted medians (paper §4 steps 3-4)."""

from __future__ import annotations

from merit.split.balance import bisect
from merit.split.components import principal_components
from merit.split.view import Groups, MixtureView


def split(view: MixtureView, axes: int, seed: int) -> Groups:
    """Cut along the top ``axes`` principal components of the cosine matrix; ``seed`` plays no part."""
    assert view.cosine is not None
    return bisect(principal_components(view.cosine, axes).scores, view.weights, view.names)
