"""A task of :mod:`merit.run.spreading`: measures gradients of some datasets, or some models, into the stage's store.

python -m merit.run.measuring JOB.json OUTCOME.json
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from merit.conflict.measure import measure_datasets
from merit.conflict.sample import Probe
from merit.conflict.store import GradientStore
from merit.evaluation.results import ANSWERS_OF_THE_BASE, MODELS, answers_file
from merit.evaluation.stage import ModelSet, evaluate
from merit.files import publish
from merit.mixture import load_split
from merit.progress import Silent
from merit.recipe.load import load_recipe
from merit.run.evaluating import find_models, held_out_rows, model_set
from merit.run.session import Session
from merit.run.spreading import MeasureJob
from merit.run.worker import run_job
from merit.signals import ignore_from_now_on


def measure(file: Path) -> None:
    """Do the job."""
    job = MeasureJob.load(file)
    session = Session(load_recipe(job.run / "recipe.yaml"), job.run, Silent())
    if job.kind == "gradients":
        recipe = session.recipe
        rows = load_split(job.run / "mixture", "train").only(job.names)
        store = GradientStore(Path(recipe.conflict.cache) if recipe.conflict.cache else job.folder / "partial")
        measure_datasets(rows, Probe(session.base, recipe.conflict, recipe.seed, session.device), store)
        return
    for name in job.names:
        _evaluate(session, name, job.folder / MODELS)


def _evaluate(session: Session, name: str, folder: Path) -> None:
    """Measure one model, next to the base, and keep its figures and answers."""
    models, _ = find_models(session)
    chosen = model_set(session, {one: models[one] for one in {"base", name}}, {})
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch) / MODELS
        here.mkdir()
        for path in _files(folder, "base"):
            shutil.copyfile(path, here / path.name)
        evaluate(
            ModelSet(chosen.base, chosen.models, chosen.about),
            held_out_rows(session.run / "mixture"),
            session.recipe.evaluate,
            seed=session.recipe.seed,
            folder=Path(scratch),
            device=session.device,
        )
        folder.mkdir(parents=True, exist_ok=True)
        for path in _files(here, name):
            unfinished = folder / f".{path.name}.partial"
            shutil.copyfile(path, unfinished)
            publish(unfinished, folder / path.name)


def _files(folder: Path, name: str) -> list[Path]:
    """What is kept of a model, the figures last."""
    names = [answers_file(name), *([ANSWERS_OF_THE_BASE] if name == "base" else []), f"{name}.json"]
    return [folder / one for one in names if (folder / one).is_file()]


if __name__ == "__main__":
    code = run_job(lambda: measure(Path(sys.argv[1])), Path(sys.argv[2]))
    ignore_from_now_on()
    sys.exit(code)
