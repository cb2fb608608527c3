"""Benchmark suites on every model of a run, one stage per model; the harnesses are in :mod:`merit.evaluation`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from merit.evaluation.harness import HarnessFacts, Scores, check_harness, evaluate_suites, harness_facts
from merit.evaluation.lmms import check_lmms, run_lmms
from merit.evaluation.suites import check_suites, expand, local_tasks
from merit.files import content_hash, read_as, write_json
from merit.hf.models import autocast, load_model
from merit.recipe.schema import Recipe
from merit.run import key
from merit.run.evaluating import find_models
from merit.run.session import Session
from merit.run.step import Step, Work, run_step
from merit.run.store import Stage

__all__ = ["SCORES", "SuiteScores", "check_run_suites", "measure_suites", "run_suites", "suite_scores"]

SCORES = "scores.json"


@dataclass(frozen=True)
class SuiteScores:
    """One model's scores.

    Attributes:
        scores: {task: {metric: value}}.
        facts: What they depend on besides the model.
    """

    scores: Scores
    facts: HarnessFacts

    @classmethod
    def load(cls, folder: Path) -> SuiteScores:
        """Read ``scores.json``.

        Raises:
            RunFolderError: It is missing or damaged.
        """
        return read_as(folder / SCORES, cls)


def check_run_suites(recipe: Recipe) -> None:
    """Refuse suites that cannot run here, before anything is trained.

    Raises:
        UserError: The message says what is missing for which task.
    """
    suites, harness = recipe.evaluate.suites, recipe.evaluate.harness
    if not suites:
        return
    check_suites(suites)
    check_harness(suites, harness)
    _, vision = expand(suites)
    if vision:
        check_lmms(vision, harness)


def run_suites(session: Session) -> dict[str, SuiteScores]:
    """Scores of every model but single branches; none if the recipe names no suites.

    Raises:
        UserError: A suite cannot be run.
    """
    if not session.recipe.evaluate.suites:
        return {}
    check_run_suites(session.recipe)
    models, _ = find_models(session)
    wanted = {name: model for name, model in models.items() if not name.startswith("branch-")}
    return measure_suites(session, wanted, session.run / "suites")


def measure_suites(
    session: Session, models: Mapping[str, tuple[Path | None, str]], folder: Path
) -> dict[str, SuiteScores]:
    """Scores of some models, each a stage of its own.

    Args:
        session: The command's session.
        models: By name: folder (None: the base) and content.
        folder: Of the stages.

    Raises:
        UserError: A suite cannot be run.
    """
    return {name: _measure(session, name, *model, folder / name) for name, model in models.items()}


def _measure(session: Session, name: str, folder: Path | None, content: str, place: Path) -> SuiteScores:
    recipe, base = session.recipe, session.base
    suites, harness = recipe.evaluate.suites, recipe.evaluate.harness
    inputs = {"base": base.input_fingerprint, "model": content}
    inputs |= {f"task {path.name}": content_hash(path) for path in local_tasks(suites)}

    def make(work: Work) -> SuiteScores:
        with tempfile.TemporaryDirectory() as scratch:
            model = load_model(base, session.device, folder)
            with autocast(base.settings, session.device):
                scores = evaluate_suites(model, base.tokenizer, suites, harness, Path(scratch))
        facts = harness_facts(harness)
        _, vision = expand(suites)
        if vision:
            found, version = run_lmms(
                folder or base.folder, model.config.model_type, vision, harness, work.folder / "lmms"
            )
            scores |= found
            facts = HarnessFacts({**facts.versions, "lmms_eval": version}, *list(vars(facts).values())[1:])
        result = SuiteScores(scores, facts)
        write_json(work.folder / SCORES, asdict(result))
        work.facts.update(asdict(facts))
        return result

    def describe(found: SuiteScores) -> str:
        return f"{name}: " + ", ".join(f"{task} {_first(values)}" for task, values in list(found.scores.items())[:6])

    step = Step(
        "suites",
        replace(key.suites_stage(recipe, session.run, name, inputs), path=place),
        make,
        SuiteScores.load,
        recipe.seed,
        describe=describe,
        begin=f"{name}: {', '.join(suites)}",
        follows_inputs=True,
    )
    return run_step(step, session)


def _first(values: dict[str, float]) -> str:
    plain = [f"{value:.3f}" for metric, value in values.items() if not metric.endswith("_stderr")]
    return plain[0] if plain else "no score"


def suite_scores(run: Path) -> dict[str, SuiteScores]:
    """Scores of every model in a run folder; empty if no suites were run.

    Raises:
        RunFolderError: A file is damaged.
    """
    found = {}
    for folder in sorted((run / "suites").glob("*")):
        stage = Stage("suites", folder)
        if stage.begun:
            stage.verify(only=(SCORES,))
            found[folder.name] = SuiteScores.load(folder)
    return found
