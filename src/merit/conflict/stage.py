"""The conflict stage: measure every dataset's gradient at the base (resuming and reusing), compare them, write the files.

Files in its folder:

- ``geometry.npz``, ``datasets.json``, ``summary.json``: :class:`merit.conflict.result.Geometry`;
- ``sketches.safetensors``: one float32 vector per dataset (representation: sketch);
- ``partial/``: quarter-sample vectors by content key, which a killed run continues from and a changed mixture reuses; with
  ``conflict.cache`` they lie there instead.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from merit.conflict.assemble import Judged, build_geometry
from merit.conflict.measure import measure_datasets
from merit.conflict.result import Geometry
from merit.conflict.sample import Probe
from merit.conflict.store import GradientStore, write_vectors
from merit.errors import ConflictError
from merit.hf.base import Base
from merit.hf.models import pick_device
from merit.mixture.dataset import EncodedDataset
from merit.progress import Progress, silent
from merit.recipe.schema import ConflictSettings, SplitSettings


def measure_gradients(  # noqa: PLR0913 - public: each is one thing that a caller may want to set
    rows: Mapping[str, EncodedDataset],
    base: Base,
    settings: ConflictSettings | None = None,
    seed: int = 0,
    folder: Path | None = None,
    *,
    device: torch.device | None = None,
    jobs: int = 1,
    split: SplitSettings | None = None,
    progress: Progress = silent,
) -> Geometry:
    """Measure one gradient per dataset at the base, and compare them.

    Args:
        rows: Training rows by dataset name.
        base: The base; its settings name the trainable subset.
        settings: Sample, representation, weighting. Default: the recipe's defaults.
        seed: Of the calibration draw, the sketch and new adapters.
        folder: Where the files go; its ``partial`` sub-folder may stand from before. Default: nothing is kept.
        device: Where to compute; with several CUDA devices and jobs > 1 each worker takes one. Default: CUDA where there is
            one.
        jobs: Processes. Workers on a CPU have one thread each; where this process has one too, results are the same bit for
            bit whatever ``jobs`` is, otherwise up to float rounding.
        split: The split whose axes are judged (its ``cosine`` and ``balance``). Default: the recipe's defaults.
        progress: Called with datasets done, datasets in all, and the latest name.

    Raises:
        ConflictError: A gradient is zero or not finite (and ``skip_bad`` is off), or no dataset is left.
        ResourceError: Disk or memory does not suffice, or a worker was killed.
    """
    settings = settings or ConflictSettings()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="merit-gradients-") as scratch:
            return measure_gradients(
                rows, base, settings, seed, Path(scratch), device=device, jobs=jobs, split=split, progress=progress
            )
    store = GradientStore(Path(settings.cache) if settings.cache else folder / "partial")
    probe = Probe(base, settings, seed, device or pick_device("auto"))
    measured = measure_datasets(rows, probe, store, jobs=jobs, progress=progress)
    good = [item for item in measured if item.bad is None]
    if not good:
        raise ConflictError("conflict: no dataset is left; every gradient was zero or not finite.")
    split = split or SplitSettings()
    tokens = {name: int(np.sum(item.target_counts)) for name, item in rows.items()} if split.balance == "tokens" else {}
    bad = [item for item in measured if item.bad]
    geometry = build_geometry(good, bad, store, settings, Judged(split.cosine, tokens))
    if settings.representation == "sketch":
        vectors = (item.vector(store)[:] for item in good)
        write_vectors(folder / "sketches.safetensors", [item.name for item in good], vectors, good[0].width)
    geometry.save(folder)
    if not settings.cache:
        store.prune(key for item in good for key in item.keys)
    return geometry
