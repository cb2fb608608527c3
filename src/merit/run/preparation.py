"""The preparation of a base, in order: assemble → each training stage → ``prepared/base``.

A training stage is a separate run inside the run folder, with one group and no gradients: it trains, resumes, records and
is refused like any other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merit.errors import CheckpointError, RecipeError, RunFolderError
from merit.hf import checkpoint
from merit.hf.base import BaseFacts, open_base, resolve_base
from merit.prepare import prepared_base, stage_folder, stage_recipe
from merit.prepare.assemble import assemble
from merit.prepare.plan import Assembly, parameter_sizes, plan_assembly
from merit.recipe.schema import ModelSettings, Recipe
from merit.run import key
from merit.run.session import Session
from merit.run.step import Step, Work, run_step
from merit.run.store import Stage


def prepare(session: Session, run_chain: Callable[[Session, str], None]) -> Path:
    """Make ``prepared/base``, resuming from what is done.

    Args:
        session: The command's session.
        run_chain: Runs the stages of an inner run.

    Returns:
        The folder of the prepared base: an ordinary checkpoint with tokenizer and image processor.

    Raises:
        UserError: A step cannot be done, or was done with other settings.
        Interrupted: Stopped from outside; the same command resumes.
    """
    recipe, run, reporter = session.given, session.run, session.reporter
    if recipe.prepare is None:
        raise RecipeError(
            f"{recipe.name}: the recipe has no prepare block, so there is nothing to prepare.",
            "model.base is used as the base; docs/preparation.md explains when a prepared one is needed.",
        )
    final = prepared_stage(recipe, run)
    if final.begun and not stage_folder(run, "").is_dir() and _only_inputs(final.changes()):
        final.verify()
        reporter.stage("prepare", "done before (its stages were removed)")
        return prepared_base(run)
    base = recipe.model.base
    if recipe.prepare.assemble is not None:
        base = str(_assemble(session).resolve())
    for place, stage in enumerate(recipe.prepare.stages, start=1):
        reporter.stage("prepare", f"stage {place} of {len(recipe.prepare.stages)}: {stage.name}")
        folder = stage_folder(run, stage.name)
        run_chain(Session(stage_recipe(recipe, stage, base), folder, reporter, redo=session.redo), "train")
        base = str((folder / "branches" / "0" / "model").resolve())
    final = prepared_stage(recipe, run, model=checkpoint.fingerprint(base))

    def make(work: Work) -> Path:
        _link(Path(base), prepared_base(run))
        work.facts["model_fingerprint"] = checkpoint.fingerprint(prepared_base(run))
        return prepared_base(run)

    step = Step(
        "prepare",
        final,
        make,
        load=lambda _folder: prepared_base(run),
        seed=recipe.seed,
        describe=lambda folder: f"the base is {folder}",
    )
    return run_step(step, session)


def prepared_stage(recipe: Recipe, run: Path, model: str | None = None) -> Stage:
    """The prepared base's stage, as requested now."""
    assert recipe.prepare is not None
    inner = [(stage, stage_recipe(recipe, stage, "")) for stage in recipe.prepare.stages]
    return key.prepared_stage(recipe, run, inner, model)


def _only_inputs(changes: list[str]) -> bool:
    return all(change.startswith("input.") for change in changes)


def _assemble(session: Session) -> Path:
    recipe = session.given
    plan = plan_of(recipe)
    with session.hashes() as known:
        content = {
            "language model": checkpoint.fingerprint(plan.language, known),
            "vision_from": checkpoint.fingerprint(plan.vision, known),
        }

    def make(work: Work) -> Path:
        model = work.folder / "model"
        work.facts.update(assemble(plan, model, seed=recipe.seed).facts())
        work.facts["model_fingerprint"] = checkpoint.fingerprint(model)
        return model

    step = Step(
        "prepare",
        key.assemble_stage(recipe, stage_folder(session.run, "assemble"), content),
        make,
        load=lambda folder: folder / "model",
        seed=recipe.seed,
        describe=lambda _model: "assembled and read back",
        begin=f"assemble: {plan.config.model_type} around {recipe.model.base}",
        notes=lambda _model: plan.notes,
    )
    return run_step(step, session)


def plan_of(recipe: Recipe) -> Assembly:
    """The recipe's assembly, checked without weights.

    Raises:
        CheckpointError: A checkpoint is missing, or the two do not fit together.
    """
    assert recipe.prepare is not None
    assert recipe.prepare.assemble is not None
    joined = recipe.prepare.assemble
    try:
        vision = resolve_base(ModelSettings(base=joined.vision_from, revision=joined.revision))
    except CheckpointError as error:
        message = error.message.replace("model.base", "prepare.assemble.vision_from")
        raise CheckpointError(message, *error.ways_out) from None
    return plan_assembly(resolve_base(recipe.model), vision, projector=joined.projector)


def planned_base(recipe: Recipe, run: Path) -> tuple[BaseFacts, dict[str, int]]:
    """Facts about the base that a preparation will make, and its parameters' sizes by file name, before it is made.

    Training does not change shapes, so they are those of the assembled model, or of ``model.base``.

    Raises:
        CheckpointError: See :func:`plan_of`.
    """
    assert recipe.prepare is not None
    if recipe.prepare.assemble is None:
        base = open_base(recipe.model)
        headers = checkpoint.read_headers(base.folder)
        return base, {name: tensor.size for name, tensor in headers.tensors.items()}
    plan = plan_of(recipe)
    sizes = parameter_sizes(plan)
    config: Any = plan.config
    facts = BaseFacts(
        folder=prepared_base(run),
        model_type=str(config.model_type),
        architecture=f"{config.model_type}, to be assembled",
        parameters=sum(sizes.values()),
        dtypes={name: plan.dtypes[0 if plan.family.role(name) == "language" else 1] for name in sizes},
        context=int(config.text_config.max_position_embeddings),
        family=plan.family,
    )
    return facts, sizes


def _link(source: Path, target: Path) -> None:
    """The files of ``source`` under another name: hard links if the disk supports them, otherwise copies."""
    if not source.is_dir():
        raise RunFolderError(f"{source} is missing.", "Run `merit prepare` again.")
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if not file.is_file():
            continue
        try:
            os.link(file.resolve(), target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)
