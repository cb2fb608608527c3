"""How true are sketches and strides? Cosines of each representation against exact ones, on the model and mixture at hand.

Behind ``merit gradients --compare``. It measures exact gradients once (on disk) and compresses those, which by linearity
gives the same as compressing while measuring. It writes no stage files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr

from merit.conflict.geometry import gram_matrix
from merit.conflict.measure import measure_datasets
from merit.conflict.sample import Probe
from merit.conflict.sketch import Sketch
from merit.conflict.store import GradientStore, StoredVector
from merit.errors import ConflictError
from merit.mixture.dataset import EncodedDataset
from merit.progress import Progress, silent
from merit.split.components import cosine_matrix

_SLICE = 2**22


@dataclass(frozen=True)
class Agreement:
    """How cosines agree with exact ones over all T(T−1)/2 pairs: correlations, mean, root mean square and largest error."""

    pairs: int
    pearson: float
    spearman: float
    mae: float
    rmse: float
    max_error: float


@dataclass(frozen=True)
class Comparison:
    """One representation against exact gradients.

    Attributes:
        representation: sketch or stride.
        setting: Its size.
        bytes: Per dataset.
        datasets: T.
        agreement: Of the cosines.
    """

    representation: str
    setting: int
    bytes: int
    datasets: int
    agreement: Agreement


def compare_representations(
    rows: Mapping[str, EncodedDataset],
    probe: Probe,
    folder: Path,
    settings: Mapping[str, Sequence[int]] | None = None,
    *,
    jobs: int = 1,
    progress: Progress = silent,
) -> list[Comparison]:
    """Compare representations with exact cosines over all pairs of datasets.

    Args:
        rows: Training rows by dataset name; at least three whose gradient can be used.
        probe: Base, calibration sample and device; its representation is ignored.
        folder: Where exact gradients (four float32 vectors per dataset) lie while it runs; removed at the end.
        settings: Sketch sizes (``sketch``) and strides (``stride``) to try. Default: the probe's own.
        jobs: Processes for the gradients.
        progress: Called with datasets done, in all, and the latest name.

    Raises:
        ConflictError: Too few datasets, or a gradient that cannot be used.
        ResourceError: The disk has no room for the exact gradients.
    """
    _enough(list(rows), [])
    settings = settings or {"sketch": [probe.settings.sketch_size], "stride": [probe.settings.stride]}
    exact = replace(probe, settings=probe.settings.model_copy(update={"representation": "exact"}))
    with tempfile.TemporaryDirectory(prefix="compare-", dir=folder) as scratch:
        store = GradientStore(Path(scratch))
        measured = measure_datasets(rows, exact, store, jobs=jobs, progress=progress)
        _enough([m.name for m in measured if m.bad is None], [m.bad for m in measured if m.bad])
        vectors = [m.vector(store) for m in measured if m.bad is None]
        true = cosine_matrix(gram_matrix(vectors))
        layout = probe.layout()
        table = []
        for kind, sizes in settings.items():
            for size in sizes:
                kept = [compress(vector, layout, kind, size, probe.seed) for vector in vectors]
                found = agreement(cosine_matrix(gram_matrix(kept)), true)
                table.append(Comparison(kind, size, 4 * len(kept[0]), len(kept), found))
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


def compress(
    vector: StoredVector | np.ndarray, layout: Mapping[str, int], kind: str, setting: int, seed: int
) -> np.ndarray:
    """The sketch or stride (float32) of a whole gradient, read parameter by parameter."""
    if kind == "stride":
        whole = [
            vector[slice(start, start + _SLICE)][-start % setting :: setting] for start in range(0, len(vector), _SLICE)
        ]
        return np.concatenate(whole)
    sketch, start = Sketch(setting, seed), 0
    for name, entries in layout.items():
        sketch.add(name, torch.from_numpy(np.array(vector[slice(start, start + entries)], dtype=np.float32)))
        start += entries
    kept: np.ndarray = sketch.vector().float().numpy()
    return kept


def agreement(found: np.ndarray, true: np.ndarray) -> Agreement:
    """How the off-diagonal entries of two (T, T) cosine matrices agree."""
    upper = np.triu_indices(len(true), 1)
    a, b = found[upper], true[upper]
    error = np.abs(a - b)
    return Agreement(
        pairs=len(a),
        pearson=float(pearsonr(a, b).statistic),
        spearman=float(spearmanr(a, b).statistic),
        mae=float(error.mean()),
        rmse=float(np.sqrt((error**2).mean())),
        max_error=float(error.max()),
    )
