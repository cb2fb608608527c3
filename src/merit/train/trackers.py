"""Experiment trackers (TensorBoard, Weights & Biases, MLflow ...) through accelerate: where they write, how runs are named.

Without settings of the user's own (WANDB_DIR, MLFLOW_TRACKING_URI) everything is written into the given folder, so that
a run leaves nothing elsewhere. Nothing is sent anywhere unless the recipe names a tracker.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

__all__ = ["PROJECT", "keyword_arguments", "own_folder", "plain_name", "send"]

PROJECT = "merit"
"""Project (experiment) of every tracker."""


def keyword_arguments(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """What each tracker is opened with, so that runs have a name that says what they are.

    Args:
        folder: Where it writes.
        name: ``my-run/branches/0``; what precedes the first slash groups runs.
    """
    return {
        "wandb": {"dir": str(folder), "name": name, "group": name.partition("/")[0]},
        "mlflow": {"run_name": name},
    }


@contextlib.contextmanager
def own_folder(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Trackers that would write into the working directory write into ``folder`` inside; what the user has set stands."""
    wanted = {"MLFLOW_TRACKING_URI": (folder / "mlflow").absolute().as_uri()} if "mlflow" in names else {}
    # MLflow asks for this to be said where runs are kept as files, which need no database:
    wanted |= {"MLFLOW_ALLOW_FILE_STORE": "true"} if wanted else {}
    added = {key: value for key, value in wanted.items() if key not in os.environ}
    if "MLFLOW_TRACKING_URI" in os.environ:
        added = {}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def plain_name(text: str) -> str:
    """A figure's name that every tracker takes: letters, digits, ``_ - . /`` and spaces."""
    return re.sub(r"[^\w\-./ ]", "_", text, flags=re.ASCII)


def send(
    names: Sequence[str], folder: Path, name: str, figures: Mapping[str, float], settings: Mapping[str, str]
) -> None:
    """Log a finished run's figures once, as a run of its own next to its branches'.

    Args:
        names: Trackers, as in ``train.report_to``.
        folder: Where they write, if they write files.
        name: Of the run.
        figures: By name.
        settings: What the tracker shows as configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    Accelerator(cpu=True)  # accelerate's trackers ask it which process they are in
    options = keyword_arguments(folder, name)
    with own_folder(folder, names):
        for kind in names:
            made = LOGGER_TYPE_TO_CLASS[kind]
            place = (PROJECT, str(folder)) if made.requires_logging_directory else (PROJECT,)
            tracker = made(*place, **options.get(kind, {}))
            tracker.start()
            tracker.store_init_configuration(dict(settings))
            tracker.log({plain_name(key): value for key, value in figures.items()}, step=0)
            tracker.finish()
