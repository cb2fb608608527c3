"""Evaluating a run: which models there are, what they were trained on, and how they differ from the plain merge.

The measuring is done by :mod:`merit.evaluation`. A stale or damaged model is refused here, before it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from merit.evaluation.halves import halves_of, row_digest
from merit.evaluation.results import Evaluation
from merit.evaluation.stage import About, Candidate, HeldOut, ModelSet, evaluate
from merit.hf import checkpoint
from merit.mixture import EncodedDataset, load_split
from merit.progress import count
from merit.run import key
from merit.run.branches import branch_stages
from merit.run.merging import how_far
from merit.run.record import Output, damaged
from merit.run.scope import Scope
from merit.run.session import Session
from merit.run.spreading import spread
from merit.run.step import Step, Work, run_step
from merit.run.store import Stage, split_of


def evaluate_run(session: Session) -> Evaluation:
    """Measure every model of the run on held-out rows.

    If only the models have changed since the last time, the stage is rerun automatically: figures are cached by content,
    so nothing is lost. Changed settings are refused as in every stage.

    Raises:
        RunFolderError: A model is stale or damaged, or the evaluation was made with other settings.
    """
    models, missing = find_models(session)
    for name, why in missing.items():
        session.reporter.note(f"{name} is not measured: {why}")
    held_out = held_out_rows(session.run / "mixture")
    if session.recipe.merge.weights == "auto":
        held_out = reporting_rows(held_out, session.recipe.seed)
    fingerprints = {name: value for name, (_, value) in models.items()}

    def make(work: Work) -> Evaluation:
        others = [name for name in models if name != "base"]
        spread(session, "evaluate", [["base"], others], work.folder, work.progress)
        found = evaluate(
            model_set(session, models, missing),
            held_out,
            session.recipe.evaluate,
            seed=session.recipe.seed,
            folder=work.folder,
            device=session.device,
            progress=work.progress,
        )
        work.facts.update(
            models=list(found.summary.models),
            reused=list(found.reused),
            seconds_by_model=found.seconds,
            verdict=list(found.verdict.sentences),
        )
        joint = models["joint"][0] if "joint" in models else None
        if joint is not None and session.recipe.split.method != "joint":  # else its merge was measured
            work.facts.update(displacements={"joint": asdict(how_far(session, (), joint))})
        return found

    step = Step(
        "evaluate",
        key.evaluation_stage(session.recipe, session.run, fingerprints),
        make,
        load=Evaluation.load,
        seed=session.recipe.seed,
        describe=lambda found: f"{count(len(models), 'model')}: {', '.join(found.summary.models)}",
        begin=f"{count(len(models), 'model')} on held-out rows",
        unit="models",
        keep=("models",),
        follows_inputs=True,
    )
    return run_step(step, session)


def held_out_rows(mixture: Path) -> HeldOut:
    """Test, kept and unseen rows of a run, compared with what the mixture stage wrote: an answer that changed is noticed.

    Raises:
        RunFolderError: A file is missing or has other content.
    """
    for name, facts in Stage("mixture", mixture).record().outputs.items():
        path = mixture / name
        if name.startswith(key.HELD_OUT) and (not path.is_file() or Output.of(path) != facts):
            raise damaged(
                path, "its content is not what the mixture stage wrote" if path.is_file() else "it is missing"
            )
    return HeldOut(*(load_split(mixture, split) for split in ("test", "kept", "unseen")))


def reporting_rows(held_out: HeldOut, seed: int) -> HeldOut:
    """The rows that did not choose the merge's weights (``merge.weights: auto``)."""
    sets = {"test": held_out.test, "kept": held_out.kept}
    halves = halves_of(sets["test"], sets["kept"], seed)
    chose = {
        row_digest(sets[part][name][i], 0)
        for part in sets
        for name, rows in halves[part].choosing.items()
        for i in rows
    }

    def take(part: str) -> dict[str, EncodedDataset]:
        return {name: sets[part][name].take(rows) for name, rows in halves[part].reporting.items() if rows}

    unseen = {
        name: rows.take(i for i in range(len(rows)) if row_digest(rows[i], 0) not in chose)
        for name, rows in held_out.unseen.items()
    }
    return HeldOut(take("test"), take("kept"), unseen)


def model_set(session: Session, models: Mapping[str, tuple[Path | None, str]], missing: Mapping[str, str]) -> ModelSet:
    """The models of a run as the evaluation expects them, with how they were made."""
    method = split_of(session.run).method
    about = About(method=method, trained_tokens=trained_tokens(session), remarks=remarks(session), missing=missing)
    return ModelSet(session.base, {name: Candidate(*facts) for name, facts in models.items()}, about)


def find_models(session: Session) -> tuple[dict[str, tuple[Path | None, str]], dict[str, str]]:
    """Every model to evaluate, as name → (folder or None for the base, content); and why others are left out.

    Raises:
        RunFolderError: A model is stale, or its files are not what was recorded.
    """
    recipe = session.recipe
    found: dict[str, tuple[Path | None, str]] = {"base": (None, session.base.fingerprint)}
    wanted: dict[str, Stage] = {}
    for scope in session.scopes[1:]:
        wanted[scope.method or ""] = (
            branch_stages(session, scope)[0] if scope.method == "joint" else merge_as_made(session, scope)
        )
    wanted["merged"] = merge_as_made(session, session.scope)
    if recipe.split.method == "joint":
        wanted["joint"] = wanted["merged"]
    if recipe.evaluate.branches and recipe.group_count > 1:
        wanted |= {f"branch-{k}": stage for k, stage in branch_stages(session, session.scope).items()}
    done = {name: stage for name, stage in wanted.items() if stage.is_done()}
    missing = {name: _why_missing(stage) for name, stage in wanted.items() if name not in done}
    return found | {name: checked_model(stage) for name, stage in done.items()}, missing


def _why_missing(stage: Stage) -> str:
    begun = stage.path.is_dir() and any(stage.path.iterdir())
    return f"unfinished: {stage.path} holds no record.json; make it again" if begun else f"{stage.name} is not made yet"


def merge_as_made(session: Session, scope: Scope) -> Stage:
    """A scope's merge, of the branches that it was made from."""
    branches = branch_stages(session, scope)
    return key.merged_as_made(session.recipe_of(scope), scope, branches, base=session.base.fingerprint)


def checked_model(stage: Stage) -> tuple[Path, str]:
    """Folder and content of a model, read and compared with its record."""
    stage.verify(weights=False)
    folder = stage.path / "model"
    found = checkpoint.fingerprint(folder)
    if found != key.model_content(stage):
        raise damaged(folder, f"its content is not what {stage.name} wrote", stage.path)
    return folder, found


def trained_tokens(session: Session) -> dict[str, int]:
    """Target tokens that each model was trained on, by its name in the results."""
    branches = {f"branch-{k}": count for k, count in _branch_tokens(session, session.scope).items()}
    found = {"base": 0, "merged": _merged_tokens(session, session.scope), **branches}
    if session.recipe.split.method == "joint":
        found["joint"] = found["merged"]
    return found | {scope.method or "": _merged_tokens(session, scope) for scope in session.scopes[1:]}


def _branch_tokens(session: Session, scope: Scope) -> dict[int, int]:
    done = {k: stage for k, stage in branch_stages(session, scope).items() if stage.begun}
    return {k: int(stage.record().facts["target_tokens"]) for k, stage in done.items()}


def _merged_tokens(session: Session, scope: Scope) -> int:
    left_out = key.left_out(scope)
    return sum(count for k, count in _branch_tokens(session, scope).items() if k not in left_out)


def remarks(session: Session) -> dict[str, str]:
    """How each merged model differs from the plain token-weighted average of all its branches."""
    found = {}
    for scope in session.scopes:
        stage = Stage("merged", scope.root / "merged")
        if scope.method == "joint" or not stage.begun:
            continue
        record = stage.record()
        facts, weights = record.facts, record.settings["merge"]["weights"]
        said = [f"operator {facts['operator']}"] if facts["operator"] != "average" else []
        said += [f"scale {facts['scale']:g}"] if facts["scale"] != 1 else []
        said += [f"weights {weights}"] if weights != "tokens" else []
        said += [f"without {branch}" for branch in facts["excluded"]]
        said += [f"{session.recipe_of(scope).rounds} rounds"] if session.recipe_of(scope).rounds > 1 else []
        if said:
            found[scope.method or "merged"] = ", ".join(said)
    return found
