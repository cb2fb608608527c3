"""`merit diagnose --probe`: the chain up to the split, a few dozen steps per group, and what they tell. A stage of its own.

Branches are trained by the same code as a run's, at the recipe's peak rate, and are removed when it is done.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

from merit.diagnostics.lab import Lab, Subject
from merit.diagnostics.probe import Probe, measure
from merit.errors import RecipeError
from merit.files import write_json
from merit.mixture import Mixture
from merit.run import key
from merit.run.session import Session
from merit.run.step import Step, Work, run_step
from merit.run.store import Stage
from merit.split.result import Split
from merit.train.batches import steps_for
from merit.train.branch import train_branch

__all__ = ["probe_recipe"]


def probe_recipe(session: Session, mixture: Mixture, split: Split) -> Probe:
    """Train every group briefly and judge the recipe.

    Raises:
        RecipeError: The split has one group only.
        TrainingError: A loss is not finite: the rate is far past the cliff.
    """
    if len(split.groups) < 2:
        raise RecipeError(
            "diagnose --probe: the split has one group; there is nothing to merge.",
            "Set a split.method other than joint, or more than one of split.groups.",
        )
    inputs = {"base": session.base.fingerprint, **{f"{key.ROWS}{n}": v for n, v in mixture.fingerprints.items()}}
    inputs["split"] = Stage("split", session.run / "split").record().outputs["split.json"].xxh3
    stage = key.probe_stage(session.recipe, session.run, inputs)
    step = Step(
        "probe", stage, lambda work: _make(session, mixture, split, work), load=Probe.load, seed=session.recipe.seed,
        describe=lambda probe: probe.verdict, begin=f"{len(split.groups)} groups", unit="steps", follows_inputs=True,
    )  # fmt: skip
    probe = run_step(step, session)
    write_json(session.run / "diagnostics" / "probe.json", probe.facts())
    return probe


def _make(session: Session, mixture: Mixture, split: Split, work: Work) -> Probe:
    recipe = session.recipe
    wanted = recipe.diagnose.probe_steps
    folders, tokens, taken = {}, [], []
    for k, group in enumerate(split.groups):
        rows = mixture.train.only(group)
        count = sum(len(dataset) for dataset in rows.values())
        steps = min(wanted, steps_for(count, recipe.train.batch_size, recipe.train.epochs))
        settings = recipe.train.model_copy(
            update={
                "epochs": steps * recipe.train.batch_size / count,
                "scheduler": "constant_with_warmup",
                "save_dtype": "float32",
                "report_to": [],
            }
        )
        show = _shown(work.progress, k, len(split.groups))
        result = train_branch(rows, session.base, work.folder / str(k), settings, seed=recipe.seed, progress=show)
        folders[f"branch-{k}"] = result.model
        tokens.append(float(result.tokens))
        taken.append(result.steps)
    subject = Subject(
        base=session.base,
        branches=folders,
        weights=tokens,
        train=mixture.train,
        test=mixture.test,
        groups=split.groups,
        balance=split.balance,
        seed=recipe.seed,
        device=session.device,
    )
    probe = measure(Lab(subject, recipe.diagnose, work.progress), max(taken), recipe.train.learning_rate)
    for k in range(len(split.groups)):
        shutil.rmtree(work.folder / str(k))
    probe.save(work.folder)
    work.facts.update(verdict=probe.verdict, reason=probe.reason, device=str(session.device))
    return probe


def _shown(progress: Callable[[float, float, str], None], k: int, groups: int) -> Callable[..., None]:
    """Progress of one group as a share of all."""

    def show(done: float, total: float, label: str = "", /) -> None:
        progress(k * total + done, groups * total, label)

    return show
