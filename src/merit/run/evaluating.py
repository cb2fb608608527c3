"""Evaluating a run: which models there are, what they were trained on, and in what they differ from the plain merge.

The figures themselves are :mod:`merit.evaluation`'s. A model that is stale or damaged is refused here, before it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from merit.errors import RunFolderError
from merit.files import read_json, write_text
from merit.run import key as stages
from merit.run.store import Stage

if TYPE_CHECKING:
    from merit.evaluation.stage import ModelSet
    from merit.run.chain import Pipeline


def evaluate_run(pipeline: Pipeline) -> Stage:
    """Measure every model of the run on held-out rows.

    Where only the models have changed since the last time, the stage is made again unasked: figures are kept by content,
    so nothing is lost. Changed settings are refused like everywhere.

    Raises:
        RunFolderError: A model is stale or damaged, or the evaluation was made with other settings.
    """
    from merit.mixture.stage import load_split

    recipe, reporter = pipeline.recipe, pipeline.reporter
    models = find_models(pipeline)
    fingerprints = {name: value for name, (_, value) in models.items()}
    stage = stages.evaluation_stage(recipe, pipeline.run_folder, fingerprints)
    if stage.record_file.is_file() and stage.settings_match() and not stage.matches():
        stage.clear(keep=("models",))
    if pipeline.done(stage):
        reporter.stage("evaluate", f"{len(models)} models (done before)")
        return stage
    from merit.evaluation.stage import HeldOut, evaluate
    from merit.report.evaluation import markdown

    reporter.stage("evaluate", f"{len(models)} models on held-out rows")
    mixture = pipeline.run_folder / "mixture"
    with stage.writing(seed=recipe.seed, keep=("models",)) as record, reporter.progress("models") as tick:
        found = evaluate(
            model_set(pipeline, models),
            HeldOut(load_split(mixture, "test"), load_split(mixture, "kept")),
            recipe.evaluate,
            seed=recipe.seed,
            folder=stage.path,
            device=pipeline.device,
            progress=tick,
        )
        write_text(stage.path / "table.md", markdown(found))
        record |= {
            "models": list(found.summary.models),
            "reused": list(found.reused),
            "seconds_by_model": found.seconds,
            "verdict": list(found.verdict.sentences),
        }
    return stage


def model_set(pipeline: Pipeline, models: Mapping[str, tuple[Path | None, str]]) -> ModelSet:
    """The models of a run as the evaluation takes them, with how they were made."""
    from merit.evaluation.stage import About, Candidate, ModelSet

    method = read_json(pipeline.root / "split" / "split.json")["method"]
    about = About(method=method, trained_tokens=trained_tokens(pipeline), remarks=remarks(pipeline))
    return ModelSet(pipeline.base, {name: Candidate(*facts) for name, facts in models.items()}, about)


def find_models(pipeline: Pipeline) -> dict[str, tuple[Path | None, str]]:
    """Every model there is: name → (folder, content fingerprint); the base has no folder of its own here.

    Raises:
        RunFolderError: A model is stale, or its files are not what was recorded.
    """
    recipe = pipeline.recipe
    found: dict[str, tuple[Path | None, str]] = {"base": (None, pipeline.base.fingerprint)}
    wanted: dict[str, Stage] = {}
    for method in recipe.baselines:
        other = pipeline.baseline(method)
        wanted[method] = other.branch_stages()[0] if method == "joint" else _merge_as_made(other)
    wanted["merged"] = _merge_as_made(pipeline)
    if recipe.split.method == "joint":
        wanted["joint"] = wanted["merged"]
    if recipe.evaluate.branches and recipe.group_count > 1:
        wanted |= {f"branch-{k}": stage for k, stage in pipeline.branch_stages().items()}
    return found | {name: _checked(pipeline, stage) for name, stage in wanted.items() if stage.is_done()}


def _merge_as_made(owner: Pipeline) -> Stage:
    return stages.merged_as_made(owner.recipe, owner.root, owner.branch_stages(), base=owner.base.fingerprint)


def _checked(pipeline: Pipeline, stage: Stage) -> tuple[Path, str]:
    from merit.hf import checkpoint

    stage.verify()
    with pipeline.hashes() as memo:
        found = checkpoint.fingerprint(stage.path / "model", memo)
    if found != stages.model_content(stage):
        raise RunFolderError(
            f"{stage.path / 'model'} is not what the {stage.name} stage wrote: its content has changed since.",
            f"Remove {stage.path} and run the stage again.",
        )
    return stage.path / "model", found


def trained_tokens(pipeline: Pipeline) -> dict[str, int]:
    """Target tokens that each model was trained on, by its name in the results."""
    branches = {f"branch-{k}": count for k, count in _branch_tokens(pipeline).items()}
    found = {"base": 0, "merged": _merged_tokens(pipeline), **branches}
    if pipeline.recipe.split.method == "joint":
        found["joint"] = found["merged"]
    return found | {method: _merged_tokens(pipeline.baseline(method)) for method in pipeline.recipe.baselines}


def _branch_tokens(owner: Pipeline) -> dict[int, int]:
    done = {k: stage for k, stage in owner.branch_stages().items() if stage.record_file.is_file()}
    return {k: int(stage.record()["target_tokens"]) for k, stage in done.items()}


def _merged_tokens(owner: Pipeline) -> int:
    stage = Stage("merged", owner.root / "merged", {})
    left_out = stage.record()["settings"]["excluded"] if stage.record_file.is_file() else []
    return sum(count for k, count in _branch_tokens(owner).items() if k not in left_out)


def remarks(pipeline: Pipeline) -> dict[str, str]:
    """In what way each merged model is not the plain token-weighted average of all its branches."""
    owners = {"merged": pipeline}
    owners |= {name: pipeline.baseline(name) for name in pipeline.recipe.baselines if name != "joint"}
    found = {}
    for name, owner in owners.items():
        stage = Stage("merged", owner.root / "merged", {})
        if not stage.record_file.is_file():
            continue
        record = stage.record()
        weights = record["settings"]["merge"]["weights"]
        said = [f"operator {record['operator']}"] if record["operator"] != "average" else []
        said += [f"scale {record['scale']:g}"] if record["scale"] != 1 else []
        said += [f"weights {weights}"] if weights != "tokens" else []
        said += [f"without {branch}" for branch in record["excluded"]]
        if said:
            found[name] = ", ".join(said)
    return found
