"""What a run folder holds, read once into typed results for the page. A stage that is not done is None."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from merit.conflict.result import Geometry
from merit.diagnostics.registry import DIAGNOSTICS
from merit.diagnostics.result import Diagnosis
from merit.evaluation.results import MODELS, Evaluation, answers_file
from merit.merge import MergeResult
from merit.mixture.result import DatasetCounts, read_counts
from merit.recipe.load import load_recipe
from merit.recipe.schema import Recipe
from merit.run.record import Record
from merit.run.round_stages import RoundLine, round_lines
from merit.run.scope import Scope, scopes_of
from merit.run.store import Stage
from merit.split.result import Split
from merit.study.figures import FILE, StudyResult
from merit.train.result import BranchResult

__all__ = ["Branch", "Method", "RunData", "Step", "read_run"]


@dataclass(frozen=True)
class Step:
    """One line of ``log.jsonl``: summed loss and target tokens by dataset beside the step's mean loss (nats)."""

    step: int
    loss: float
    target_tokens: int
    datasets: dict[str, tuple[float, int]]


@dataclass(frozen=True)
class Branch:
    """A trained branch: its number, record, result and folder."""

    k: int
    folder: Path
    record: Record
    result: BranchResult

    @cached_property
    def log(self) -> list[Step]:
        """Every optimizer step; empty if the log cannot be read."""
        try:
            text = (self.folder / "log.jsonl").read_text(encoding="utf-8")
            return [_step(json.loads(line)) for line in text.splitlines() if line]
        except (OSError, ValueError, KeyError, TypeError):
            return []


def _shown(name: str) -> bool:
    """Whether the page may show what a stage's file says; weights and encoded rows it does not read."""
    return not name.endswith((".safetensors", ".parquet", ".bin"))


def _step(line: dict[str, object]) -> Step:
    parts = line.get("datasets")
    found = (
        {str(name): (float(pair[0]), int(pair[1])) for name, pair in parts.items()} if isinstance(parts, dict) else {}
    )
    return Step(int(str(line["step"])), float(str(line["loss"])), int(str(line["target_tokens"])), found)


@dataclass(frozen=True)
class Method:
    """The run's own split, branches and merge, or those of a baseline (``name`` is its split method)."""

    name: str
    scope: Scope
    split: Split | None
    branches: tuple[Branch, ...]
    merge: MergeResult | None


@dataclass(frozen=True)
class RunData:
    """Everything that the page shows of a run.

    Attributes:
        run: The folder.
        recipe: As resolved in it.
        counts: The mixture's datasets.
        geometry: The gradients' geometry.
        methods: The run's own, then its baselines.
        evaluation: Figures and verdict.
        diagnoses: Finished diagnostics by name, in the registry's order.
        rounds: What each round of the run's own branches moved; empty for a run of one round.
        study: Methods over seeds, if a study lies in the folder.
        records: Finished stages by display name, in the order of the chain.
    """

    run: Path
    recipe: Recipe
    counts: tuple[DatasetCounts, ...]
    geometry: Geometry | None
    methods: tuple[Method, ...]
    evaluation: Evaluation | None
    diagnoses: dict[str, Diagnosis]
    study: StudyResult | None
    rounds: tuple[RoundLine, ...]
    records: dict[str, Record]

    @property
    def own(self) -> Method:
        """The run's own split, branches and merge."""
        return self.methods[0]

    def answers(self, model: str) -> list[dict[str, object]]:
        """A model's greedy answers next to the references; empty if there are none."""
        try:
            text = (self.run / "evaluation" / MODELS / answers_file(model)).read_text(encoding="utf-8")
            return [json.loads(line) for line in text.splitlines() if line]
        except (OSError, ValueError):
            return []


def read_run(run: Path, recipe: Recipe | None = None) -> RunData:
    """Read what is finished in a run folder; ``recipe`` replaces the one in it.

    Raises:
        RunFolderError: A finished stage's file is damaged.
        RecipeError: The recipe in the folder cannot be read.
    """
    recipe = recipe or load_recipe(run / "recipe.yaml")
    records: dict[str, Record] = {}

    def done(kind: str, path: Path, title: str = "") -> bool:
        stage = Stage(kind, path, title=title or kind)
        if not stage.begun:
            return False
        records[stage.name] = stage.record()
        stage.verify(only=[name for name in records[stage.name].outputs if _shown(name)])
        return True

    counts = tuple(read_counts(run / "mixture")) if done("mixture", run / "mixture") else ()
    geometry = Geometry.load(run / "conflict") if done("gradients", run / "conflict") else None
    methods = []
    for scope in scopes_of(recipe, run):
        split = Split.load(scope.root / "split") if done("split", scope.root / "split", scope.name("split")) else None
        branches = []
        for k in range(len(split.groups) if split else 0):
            folder = scope.root / "branches" / str(k)
            title = scope.name(f"branch {k}")
            if done("branch", folder, title):
                branches.append(Branch(k, folder, records[title], BranchResult.load(folder)))
        merge = None
        if done("merged", scope.root / "merged", scope.name("merged")):
            merge = MergeResult.load(scope.root / "merged" / "model")
        methods.append(Method(scope.method or recipe.split.method, scope, split, tuple(branches), merge))
    evaluation = Evaluation.load(run / "evaluation") if done("evaluation", run / "evaluation") else None
    diagnoses = {
        name: entry.result.load(run / "diagnostics" / name)
        for name, entry in DIAGNOSTICS.items()
        if done("diagnostic", run / "diagnostics" / name, f"diagnostic {name}")
    }
    rounds = tuple(round_lines(Scope(run)))
    study = StudyResult.load(run / "study") if (run / "study" / FILE).is_file() else None
    own = (evaluation, diagnoses, study, rounds)
    return RunData(run, recipe, counts, geometry, tuple(methods), *own, records)
