"""A new split before a round: the gradients are measured again where the round starts, and the mixture is cut again."""

from __future__ import annotations

from dataclasses import replace

from merit.conflict.result import Geometry
from merit.conflict.stage import measure_gradients
from merit.hf.base import open_base
from merit.mixture import Mixture
from merit.run import key
from merit.run.round_stages import RoundStages
from merit.run.session import Session
from merit.run.splitting import make_split
from merit.run.step import Step, Work, run_step
from merit.run.store import Stage
from merit.split.result import Split
from merit.split.view import needs_conflict


def split_again(session: Session, rounds: RoundStages, number: int, mixture: Mixture) -> Split:
    """The groups of a round after the first, in ``rounds/I/split``.

    Methods that draw at random draw anew: round I uses the recipe's seed + I - 1.

    Raises:
        UserError: A gradient cannot be measured, or the round before is not merged.
    """
    settings = rounds.recipe.split.model_copy(update={"groups": None})
    recipe = rounds.recipe.model_copy(update={"seed": rounds.recipe.seed + number - 1, "split": settings})
    scope = rounds.scope
    measured = _gradients(session, rounds, number, mixture) if needs_conflict(settings.method) else None
    geometry = Geometry.load(measured.path) if measured is not None else None
    content = measured.record().outputs["geometry.npz"].xxh3 if measured is not None else None
    stage = key.split_stage(recipe, scope, rows=mixture.fingerprints, geometry=content)
    stage = replace(stage, path=rounds.split_folder(number) / "split", title=scope.name(f"round {number} split"))

    def make(work: Work) -> Split:
        result = make_split(recipe, mixture, geometry, work.folder)
        work.facts["left_out"] = result.left_out
        return result

    def describe(split: Split) -> str:
        return f"round {number}: {' + '.join(str(len(group)) for group in split.groups)} datasets"

    return run_step(Step("split", stage, make, Split.load, recipe.seed, describe=describe), session)


def _gradients(session: Session, rounds: RoundStages, number: int, mixture: Mixture) -> Stage:
    """One gradient per dataset at the round's start."""
    recipe, start = rounds.recipe, rounds.start(number)
    assert start is not None
    stage = key.conflict_stage(
        recipe, rounds.split_folder(number), base=rounds.content(number), rows=mixture.fingerprints
    )
    stage = replace(stage, title=rounds.scope.name(f"round {number} gradients"))
    base = open_base(session.base.settings.model_copy(update={"base": str(start), "revision": None}))

    def make(work: Work) -> Geometry:
        geometry = measure_gradients(
            mixture.train,
            base,
            recipe.conflict,
            recipe.seed,
            work.folder,
            device=session.device,
            jobs=session.jobs,
            progress=work.progress,
        )
        work.facts.update(geometry.facts(), device=str(session.device), jobs=session.jobs)
        return geometry

    step = Step(
        "gradients", stage, make, Geometry.load, recipe.seed,
        describe=lambda _geometry: f"{len(mixture.counts)} datasets at the start of round {number}", keep=("partial",),
    )  # fmt: skip
    run_step(step, session)
    return stage
