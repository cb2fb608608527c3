"""Diagnosing the merge-readiness of a run: which models and rows, and what is recorded.

Every diagnostic is a stage of its own in ``diagnostics/<name>``, so that a stopped command goes on where it was and one
can be made without the others. ``diagnostics/<name>.json`` is the same result for scripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merit.conflict.result import Geometry
from merit.diagnostics.lab import Lab, Subject
from merit.diagnostics.registry import DIAGNOSTICS, chosen, lacks
from merit.diagnostics.result import Diagnosis
from merit.errors import RecipeError, RunFolderError
from merit.files import write_json
from merit.mixture import load_split, read_counts
from merit.run import key
from merit.run.branches import branch_stages
from merit.run.evaluating import find_models
from merit.run.merging import choose_branches
from merit.run.scope import Scope
from merit.run.session import Session
from merit.run.step import Step, Work, run_step
from merit.run.store import Stage, split_of
from merit.train.result import BranchResult

__all__ = ["Diagnoses", "diagnose_run"]


@dataclass(frozen=True)
class Diagnoses:
    """What was looked at.

    Attributes:
        results: By name, in the registry's order.
        left_out: Why others are missing, by name.
        folder: Where the results are; None if they were not kept.
    """

    results: Mapping[str, Diagnosis]
    left_out: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None

    def facts(self) -> dict[str, object]:
        """Everything, as JSON values."""
        results = {name: result.facts() for name, result in self.results.items()}
        return {"diagnostics": results, "left_out": dict(self.left_out)}


def diagnose_run(session: Session, only: Sequence[str] = ()) -> Diagnoses:
    """Make or load every diagnostic of a run whose branches are trained.

    Args:
        session: The command's session.
        only: Names; all if empty.

    Raises:
        RecipeError: There is no such diagnostic, or it cannot be made for this run.
        RunFolderError: A stage before it is missing, stale or damaged.
    """
    names = chosen(only)
    subject, models = _subject(session)
    lab = Lab(subject, session.recipe.diagnose)
    results: dict[str, Diagnosis] = {}
    left_out: dict[str, str] = {}
    for name in names:
        why = lacks(name, subject)
        if why and only:
            raise RecipeError(f"--only {name}: {why}.")
        if why:
            left_out[name] = why
            continue
        results[name] = run_step(_step(session, lab, name, models), session)
        write_json(session.run / "diagnostics" / f"{name}.json", results[name].facts())
    return Diagnoses(results, left_out, session.run / "diagnostics")


def _step(session: Session, lab: Lab, name: str, models: Mapping[str, str]) -> Step[Diagnosis]:
    entry = DIAGNOSTICS[name]

    def make(work: Work) -> Diagnosis:
        lab.progress = work.progress
        result = entry.measure(lab)
        result.save(work.folder)
        work.facts.update(verdict=result.verdict, reason=result.reason, device=str(session.device))
        return result

    return Step(
        f"diagnose {name}",
        key.diagnostic_stage(session.recipe, session.run, name, models),
        make,
        load=entry.result.load,
        seed=session.recipe.seed,
        describe=lambda result: result.verdict,
        begin=entry.result.title,
        unit=name,
        follows_inputs=True,
    )


def _subject(session: Session) -> tuple[Subject, dict[str, str]]:
    """The run's models and rows, checked, and the content of each."""
    scope = session.scope
    excluded = key.left_out(scope)
    stages = branch_stages(session, scope)
    missing = [k for k, stage in stages.items() if k not in excluded and not stage.is_done()]
    if missing:
        few = "branch" if len(missing) == 1 else "branches"
        raise RunFolderError(
            f"diagnose: {few} {', '.join(map(str, missing))} of {len(stages)} not trained yet in {scope.root / 'branches'}.",
            f"Train what is missing (`merit train {session.run} --branch {missing[0]}`), or merge the others "
            f"(`merit merge {session.run} --allow-missing`): the diagnostics are then of those.",
        )
    taking, _ = choose_branches(session, scope, excluded, False)
    trained = {k: BranchResult.load(stage.path) for k, stage in taking.items()}
    found, _ = find_models(session)
    models = {f"branch-{k}": key.model_content(stage) for k, stage in taking.items()}
    models |= {name: content for name, (_, content) in found.items() if name in ("base", "merged", "joint")}
    mixture = session.run / "mixture"
    measured = Stage("gradients", session.run / "conflict")
    rows = {item.name: item.fingerprint for item in read_counts(mixture)}
    subject = Subject(
        base=session.base,
        branches={f"branch-{k}": stage.path / "model" for k, stage in taking.items()},
        weights=_weights(session, scope, trained),
        train=load_split(mixture, "train"),
        test=load_split(mixture, "test"),
        merged=found["merged"][0] if "merged" in found else None,
        joint=found["joint"][0] if "joint" in found and len(taking) > 1 else None,
        groups=split_of(scope.root).groups,
        geometry=(lambda: _geometry(measured)) if measured.begun else None,
        seed=session.recipe.seed,
        device=session.device,
    )
    inputs = models | {f"{key.ROWS}{name}": value for name, value in rows.items()}
    inputs["split"] = Stage("split", scope.root / "split").record().outputs["split.json"].xxh3
    if measured.begun:
        inputs["geometry"] = measured.record().outputs["geometry.npz"].xxh3
    return subject, inputs


def _geometry(stage: Stage) -> Geometry:
    stage.verify()
    return Geometry.load(stage.path)


def _weights(session: Session, scope: Scope, trained: Mapping[int, BranchResult]) -> list[float]:
    """Weights of the merge as it was made; before a merge, the branches' tokens."""
    stage = Stage("merged", scope.root / "merged")
    if stage.begun:
        weights = stage.record().facts.get("weights")
        if isinstance(weights, list) and len(weights) == len(trained):
            return [float(w) for w in weights]
    return [float(result.tokens) for result in trained.values()]
