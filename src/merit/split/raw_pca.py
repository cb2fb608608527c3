"""PCA of raw gradients: as :mod:`merit.split.pca`, on the Gram matrix, so that long gradients weigh more (paper §5)."""

from __future__ import annotations

from merit.errors import RecipeError
from merit.split.balance import bisect
from merit.split.components import principal_components
from merit.split.view import Groups, MixtureView


def split(view: MixtureView, axes: int, seed: int) -> Groups:
    """Cut along the top ``axes`` principal components of the Gram matrix; ``seed`` plays no part.

    Raises:
        RecipeError: The view holds no Gram matrix.
    """
    if view.gram is None:
        raise RecipeError("split.method raw_pca needs the gradients' inner products; run `merit gradients` first.")
    return bisect(principal_components(view.gram, axes).scores, view.weights, view.names)
