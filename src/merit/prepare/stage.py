"""The preparation of a base, in order: assemble → each training stage → ``prepared/base``. Joins; computes nothing itself.

Every step has a record like any other stage: what is done is not done again, what was made otherwise is refused by name, and
a stage that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit.errors import CheckpointError, RunFolderError
from merit.hf import checkpoint
from merit.prepare import prepared_base, stage_folder, stage_recipe
from merit.progress import duration
from merit.recipe.schema import ModelSettings, Recipe
from merit.run import key as stages
from merit.run.store import Stage

if TYPE_CHECKING:
    from merit.hf.base import BaseFacts
    from merit.prepare.assemble import Assembly
    from merit.run.chain import Pipeline


def prepare(pipeline: Pipeline) -> Path:
    """Make ``prepared/base``, going on from what is done.

    Returns:
        The folder of the prepared base: an ordinary checkpoint with tokenizer and image processor.

    Raises:
        UserError: A step cannot be done, or was done with other settings.
        Interrupted: Stopped from outside; the same command goes on.
    """
    recipe, run = pipeline.given, pipeline.run_folder
    assert recipe.prepare is not None
    final = prepared_stage(recipe, run)
    if final.record_file.is_file() and not stage_folder(run, "").is_dir() and final.settings_match():
        final.verify()
        pipeline.reporter.stage("prepare", "done before (its stages were removed)")
        return prepared_base(run)
    base = recipe.model.base
    if recipe.prepare.assemble is not None:
        base = str(_assemble(pipeline).resolve())
    for place, stage in enumerate(recipe.prepare.stages, start=1):
        pipeline.reporter.stage("prepare", f"stage {place} of {len(recipe.prepare.stages)}: {stage.name}")
        inner = pipeline.inner(stage_recipe(recipe, stage, base), stage_folder(run, stage.name))
        inner.run(until="train")
        base = str((inner.run_folder / "branches" / "0" / "model").resolve())
    final = prepared_stage(recipe, run, model=checkpoint.fingerprint(base))
    if not pipeline.done(final):
        with final.writing(seed=recipe.seed) as record:
            _link(Path(base), prepared_base(run))
            record["model_fingerprint"] = checkpoint.fingerprint(prepared_base(run))
    pipeline.reporter.stage("prepare", f"the base is {prepared_base(run)}")
    return prepared_base(run)


def _assemble(pipeline: Pipeline) -> Path:
    from merit.prepare.assemble import assemble

    recipe, run = pipeline.given, pipeline.run_folder
    plan = plan_of(recipe)
    with pipeline.hashes() as memo:
        content = {
            "language model": checkpoint.fingerprint(plan.language, memo),
            "vision_from": checkpoint.fingerprint(plan.vision, memo),
        }
    stage = assemble_stage(recipe, run, content)
    model = stage.path / "model"
    if pipeline.done(stage):
        pipeline.reporter.stage("prepare", "assemble (done before)")
        return model
    pipeline.reporter.stage("prepare", f"assemble: {plan.config.model_type} around {recipe.model.base}")
    with stage.writing(seed=recipe.seed) as record:
        record |= assemble(plan, model, seed=recipe.seed)
        record["model_fingerprint"] = checkpoint.fingerprint(model)
    for note in plan.notes:
        pipeline.reporter.note(note)
    pipeline.reporter.stage("prepare", f"assembled and read back ({duration(stage.record()['seconds'])})")
    return model


def plan_of(recipe: Recipe) -> Assembly:
    """The recipe's assembly, checked without weights.

    Raises:
        CheckpointError: A checkpoint is not there, or the two do not fit.
    """
    from merit.hf.base import resolve_base
    from merit.prepare.assemble import plan_assembly

    assert recipe.prepare is not None
    assert recipe.prepare.assemble is not None
    joined = recipe.prepare.assemble
    try:
        vision = resolve_base(ModelSettings(base=joined.vision_from, revision=joined.revision))
    except CheckpointError as error:
        raise CheckpointError(
            error.message.replace("model.base", "prepare.assemble.vision_from"), *error.ways_out
        ) from None
    return plan_assembly(resolve_base(recipe.model), vision, projector=joined.projector)


def planned_base(recipe: Recipe, run: Path) -> tuple[BaseFacts, dict[str, int]]:
    """Facts of the base that a preparation will end in, and its parameters' sizes by file name, before it is made.

    Training changes no shape, so they are those of the assembled model, or of ``model.base``.

    Raises:
        CheckpointError: See :func:`plan_of`.
    """
    from merit.hf.base import BaseFacts, open_base

    assert recipe.prepare is not None
    if recipe.prepare.assemble is None:
        info: BaseFacts = open_base(recipe.model)
        headers = checkpoint.read_headers(info.folder)
        return info, {name: tensor.size for name, tensor in headers.tensors.items()}
    from merit.prepare.assemble import parameter_sizes

    plan = plan_of(recipe)
    sizes = parameter_sizes(plan)
    dtypes = {name: plan.dtypes[0 if plan.family.role(name) == "language" else 1] for name in sizes}
    info = BaseFacts(
        folder=prepared_base(run),
        model_type=str(plan.config.model_type),
        architecture=f"{plan.config.model_type}, to be assembled",
        parameters=sum(sizes.values()),
        dtypes=dtypes,
        context=int(plan.config.text_config.max_position_embeddings),
        family=plan.family,
    )
    return info, sizes


# ---- stages --------------------------------------------------------------------------------------------------------


def assemble_stage(recipe: Recipe, run: Path, content: dict[str, str] | None = None) -> Stage:
    """The joining of two checkpoints; ``content`` are their fingerprints."""
    assert recipe.prepare is not None
    assert recipe.prepare.assemble is not None
    projector = recipe.prepare.assemble.projector
    return Stage(
        "assemble", stage_folder(run, "assemble"), {"projector": projector, "seed": recipe.seed}, content or {}
    )


def prepared_stage(recipe: Recipe, run: Path, model: str = "") -> Stage:
    """The prepared base: the last step's model under its final name."""
    assert recipe.prepare is not None
    settings: dict[str, Any] = {"seed": recipe.seed}
    if recipe.prepare.assemble is not None:
        settings["assemble"] = {"projector": recipe.prepare.assemble.projector}
    for place, stage in enumerate(recipe.prepare.stages, start=1):
        inner = stage_recipe(recipe, stage, "")
        mixture = stages.mixture_stage(inner, run, tokenizer="", sources={}).settings
        settings[f"stage {place}"] = {"name": stage.name, **mixture, **stages.training_settings(inner)}
    return Stage("prepared", run / "prepared", settings, {"model": model} if model else {})


def status_rows(recipe: Recipe, run: Path, row: Any, rows: Any) -> Iterable[dict[str, Any]]:
    """What `merit status` shows of a preparation.

    Args:
        recipe: The recipe, with a ``prepare`` block.
        run: The run folder.
        row: Makes one row of (name, folder, stage to compare with).
        rows: Makes all rows of an inner run (folder, recipe).
    """
    assert recipe.prepare is not None
    if recipe.prepare.assemble is not None:
        yield row("prepare assemble", stage_folder(run, "assemble"), partial(assemble_stage, recipe, run))
    for stage in recipe.prepare.stages:
        for found in rows(stage_folder(run, stage.name), stage_recipe(recipe, stage, "")):
            if found["stage"] in ("mixture", "branch 0"):
                yield {**found, "stage": f"prepare {stage.name}" + (" mixture" if found["stage"] == "mixture" else "")}
    final = row("prepare", run / "prepared", partial(prepared_stage, recipe, run))
    yield {**final, "bytes": sum(file.stat().st_size for file in prepared_base(run).glob("*"))}


def _link(source: Path, target: Path) -> None:
    """The files of ``source`` under another name: hard links where the disk has them, copies where not."""
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
