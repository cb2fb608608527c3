"""The gradient of a dataset that comes later: measured alone, next to those that a run has stored already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from merit.conflict.assemble import build_geometry
from merit.conflict.measure import measure_datasets
from merit.conflict.result import Geometry
from merit.conflict.sample import Probe
from merit.conflict.store import GradientStore
from merit.errors import ConflictError
from merit.mixture.dataset import EncodedDataset
from merit.progress import Progress, silent


def geometry_with(
    rows: Mapping[str, EncodedDataset], later: str, probe: Probe, folder: Path, progress: Progress = silent
) -> Geometry:
    """The geometry of a run's datasets and a later one; gradients that the run's conflict stage has stored are used again.

    Nothing but the later dataset's gradient is written.

    Args:
        rows: Training rows by name, the later dataset's among them.
        later: Its name.
        probe: As in the conflict stage.
        folder: The conflict stage's folder.
        progress: Told of datasets.

    Raises:
        ConflictError: Its gradient is zero or not finite.
    """
    settings = probe.settings
    store = GradientStore(Path(settings.cache) if settings.cache else folder / "partial")
    measured = measure_datasets(rows, probe, store, progress=progress)
    bad = next((item.bad for item in measured if item.name == later and item.bad), None)
    if bad is not None:
        raise ConflictError(bad, "Such a dataset has no direction to place it by. Nothing was changed.")
    return build_geometry([item for item in measured if item.bad is None], [], store, settings)
