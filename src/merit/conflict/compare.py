"""How true are sketches and strides? Cosines of each representation against exact ones, on the model and mixture at hand.

Behind ``merit gradients --compare``. It measures exact gradients once (on disk) and compresses those, which by linearity
gives what compressing on the way gives. It writes no stage files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merit.conflict.geometry import cosine_matrix, gram_matrix
from merit.conflict.stage import Progress, measure_datasets
from merit.conflict.store import GradientStore, StoredVector
from merit.errors import ConflictError
from merit.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch

    from merit.hf.base import Base
    from merit.mixture.encode import EncodedDataset

__all__ = ["agreement", "compare_representations", "compress"]

_SLICE = 2**22


def compare_representations(
    recipe: Recipe,
    mixture: Mapping[str, EncodedDataset],
    folder: Path,
    *,
    base: Base,
    device: torch.device,
    jobs: int = 1,
    progress: Progress | None = None,
    sketch_sizes: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Compare representations with exact cosines over all pairs of datasets.

    Args:
        recipe: ``conflict`` names the calibration sample; its representation is ignored.
        mixture: Training rows by dataset name; at least three whose gradient can be used.
        folder: Where exact gradients (two float32 halves per dataset) lie while it runs; removed at the end.
        base: The base.
        device: Where to compute.
        jobs: Processes for the gradients.
        progress: Called with datasets done, in all, and the latest name.
        sketch_sizes: Sketch sizes to try. Default: the recipe's.
        strides: Strides to try. Default: the recipe's.

    Returns:
        One entry per representation: representation, setting, bytes (per dataset), pairs, and :func:`agreement`'s figures.

    Raises:
        ConflictError: Too few datasets, or a gradient that cannot be used.
        ResourceError: The disk cannot hold the exact gradients.
    """
    _enough(list(mixture), [])
    exact = recipe.model_copy(update={"conflict": recipe.conflict.model_copy(update={"representation": "exact"})})
    with tempfile.TemporaryDirectory(prefix="compare-", dir=folder) as scratch:
        store = GradientStore(Path(scratch))
        measured, width = measure_datasets(
            exact,
            mixture,
            store,
            base=base,
            device=device,
            jobs=jobs,
            progress=progress,
        )
        _enough([m.name for m in measured if m.bad is None], [str(m.bad) for m in measured if m.bad])
        vectors = [store.vector(m.keys, width, (0, 1), 1.0 / m.weight) for m in measured if m.bad is None]
        true = cosine_matrix(gram_matrix(vectors))
        layout = _layout(recipe, base)
        table = []
        for kind, settings in (
            ("sketch", sketch_sizes or [recipe.conflict.sketch_size]),
            ("stride", strides or [recipe.conflict.stride]),
        ):
            for setting in settings:
                rows = [compress(vector, layout, kind, setting, recipe.seed) for vector in vectors]
                figures = agreement(cosine_matrix(gram_matrix(rows)), true)
                table.append(
                    {
                        "representation": kind,
                        "setting": setting,
                        "bytes": 4 * len(rows[0]),
                        "datasets": len(rows),
                        **figures,
                    }
                )
    return table


def _enough(usable: Sequence[str], left_out: Sequence[str]) -> None:
    """Three datasets make three pairs: the fewest on which a correlation says anything."""
    if len(usable) >= 3:
        return
    after = f" after {len(left_out)} were left out ({left_out[0]})" if left_out else ""
    raise ConflictError(
        f"conflict: comparing representations needs at least three datasets, found {len(usable)}{after}.",
        "Add datasets to the mixture, or measure without --compare.",
    )


def _layout(recipe: Recipe, base: Base) -> dict[str, int]:
    """Entries of every trainable parameter, in order."""
    import torch

    from merit.hf.models import load_model, trainable_parameters

    model = load_model(base, torch.device("cpu"), trainable=True, seed=recipe.seed)
    return {name: parameter.numel() for name, parameter in trainable_parameters(model).items()}


def compress(
    vector: StoredVector | np.ndarray, layout: Mapping[str, int], kind: str, setting: int, seed: int
) -> np.ndarray:
    """The sketch or stride (float32) of a whole gradient, read parameter by parameter."""
    import torch

    from merit.conflict.sketch import Sketch

    if kind == "stride":
        whole = [
            vector[slice(start, start + _SLICE)][-start % setting :: setting] for start in range(0, len(vector), _SLICE)
        ]
        return np.concatenate(whole)
    sketch, start = Sketch(setting, seed), 0
    for name, entries in layout.items():
        sketch.add(name, torch.from_numpy(np.array(vector[slice(start, start + entries)], dtype=np.float32)))
        start += entries
    return sketch.vector().float().numpy()


def agreement(found: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Pearson, Spearman, MAE, RMSE and largest error over the T(T−1)/2 off-diagonal pairs of two cosine matrices."""
    from scipy.stats import pearsonr, spearmanr

    upper = np.triu_indices(len(true), 1)
    a, b = found[upper], true[upper]
    error = np.abs(a - b)
    return {
        "pairs": len(a),
        "pearson": float(pearsonr(a, b).statistic),
        "spearman": float(spearmanr(a, b).statistic),
        "mae": float(error.mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "max_error": float(error.max()),
    }
