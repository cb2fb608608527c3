"""`merit study`: methods × seeds in one run folder, from the stages of the chain; nothing is made twice.

::

    mixture/                         encoded once
    study/s0/conflict/               gradients of one seed (study.gradients: once uses the run's own)
    study/s0/<source>/               split and branches, shared by every merge of them
    study/s0/merges/<method>/        a merge
    study/s0/lines/<method>/         losses along θ0 + λ(θ̄ − θ0)
    study/evaluation/                all models on the same rows
    study/suites/<model>/            benchmark suites, if the recipe names any
    study/study.json                 the result

Every folder is a stage of its own, so that a study can be stopped anywhere and goes on from there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from merit.errors import RecipeError
from merit.evaluation.forward import Forward
from merit.evaluation.results import Evaluation
from merit.evaluation.stage import Candidate, HeldOut, ModelSet, evaluate
from merit.evaluation.suites import headline
from merit.mixture import EncodedDataset, Mixture, draw
from merit.recipe.methods import Method, baseline_of, methods_of, own_of
from merit.recipe.schema import Recipe
from merit.run import key
from merit.run.branches import branch_stages
from merit.run.chain import begun, gradients, mixture, run_chain, split
from merit.run.check import make_plan
from merit.run.evaluating import checked_model, held_out_rows, merge_as_made, reporting_rows
from merit.run.merging import merge_run
from merit.run.needs import estimate, file_sizes, weigh
from merit.run.preparation import prepare
from merit.run.rounds import train_rounds
from merit.run.scope import StudyScope, merge_scope, searches_weights, source_scope, study_scopes
from merit.run.session import Session
from merit.run.step import Step, Work, run_step
from merit.run.store import Stage
from merit.run.suites import measure_suites
from merit.split.view import needs_conflict
from merit.study.check import check_study
from merit.study.compare import compare_methods
from merit.study.cost import Cost, item_of, surgery_of
from merit.study.figures import Column, Line, Run, StudyResult, Surgery, values_of
from merit.study.line import Rows, measure_line, rows_by_part
from merit.study.verdict import judge_study
from merit.train.balancing import refuse_large
from merit.train.branch import train_branch
from merit.train.result import BranchResult

__all__ = ["run_study"]

_RATE_STEPS = 4
"""Optimizer steps that the training rate is measured on."""
_FURTHEST = 10.0
"""Largest scale that a merge may have."""


def run_study(session: Session, agree: Callable[[Cost], bool]) -> StudyResult | None:
    """Train, merge, measure and compare every method with every seed; what is done is not done again.

    Args:
        session: The command's session.
        agree: Is shown the cost before anything is trained; False ends the study there.

    Returns:
        The result, also in ``study/study.json``; None if it was not agreed to.

    Raises:
        UserError: A method cannot be run, or a stage was made with other settings.
        Interrupted: Stopped from outside; the same command resumes.
    """
    plan = make_plan(session)
    check_study(session.given, len(plan.datasets))
    for note in plan.notes:
        session.reporter.note(note)
    with begun(session, "mixture"):
        if session.given.prepare is not None:
            prepare(session, run_chain)
            session = session.reopened()
        encoded = mixture(session)
        check_study(session.recipe, len(encoded.counts))
        study = _Study(session, encoded)
        if not agree(study.cost()):
            return None
        study.train()
        result = study.result(study.models())
        result.save(session.run / "study")
    return result


@dataclass(frozen=True, eq=False)
class _Study:
    """The work of one study."""

    session: Session
    mixture: Mixture

    @cached_property
    def recipe(self) -> Recipe:
        return self.session.recipe

    @cached_property
    def methods(self) -> list[Method]:
        return methods_of(self.recipe)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        return self.recipe.study.seeds_from(self.recipe.seed)

    @cached_property
    def own(self) -> str:
        return own_of(self.recipe).name

    @cached_property
    def scopes(self) -> list[StudyScope]:
        return list(study_scopes(self.recipe, self.session.run))

    # ---- before and during training ---------------------------------------------------------------------------------

    def cost(self) -> Cost:
        """What is left to do, and at which rate."""
        session, recipe = self.session, self.recipe
        rate = self._rate()
        counts = {item.name: (item.rows, item.tokens) for item in self.mixture.counts}
        items = []
        for name in dict.fromkeys((scope.method or "").partition("/")[2] for scope in self.scopes):
            scopes = [scope for scope in self.scopes if (scope.method or "").partition("/")[2] == name]
            done = sum(self._trained(scope) for scope in scopes)
            items.append(item_of(name, [session.recipe_of(scope) for scope in scopes], counts, done))
        merges = len(self.seeds) * sum(method.merge is not None and bool(method.sources) for method in self.methods)
        branches = sum(item.branches for item in items)
        disk, _ = estimate(recipe, session.base, branches=branches, merges=merges, at_once=session.jobs)
        return Cost(
            items=tuple(items),
            seeds=len(self.seeds),
            gradient_tokens=self._gradient_tokens(),
            seconds_per_token=rate.seconds / max(1, rate.tokens),
            jobs=session.jobs,
            disk_bytes=disk,
            models=1 + len(self.seeds) * sum(bool(method.sources) for method in self.methods),
            points=len({0.0, 1.0, *recipe.study.scales}),
            note=f"{rate.steps} steps of joint training on this machine ({rate.device}, {rate.threads} threads)",
            surgery=self.surgery,
            searches=len(self.seeds) * sum("auto" in dict(method.merge or ()).values() for method in self.methods),
        )

    @cached_property
    def surgery(self) -> Surgery | None:
        """What gradient surgery takes here, if the study has any; refused where a step of it does not fit."""
        parameters = weigh(self.recipe, self.session.base, file_sizes(self.session.base)).trainable
        recipes, datasets = [self.session.recipe_of(scope) for scope in self.scopes], len(self.mixture.counts)
        for recipe in recipes:  # adapters are counted when they are made
            refuse_large(recipe.train, datasets, 0 if recipe.model.trainable == "lora" else parameters)
        return surgery_of(recipes, datasets, parameters)

    def _trained(self, scope: StudyScope) -> int:
        found = (scope.root / "branches").glob("*/record.json")
        return sum(BranchResult.load(file.parent).tokens for file in found)

    def _gradient_tokens(self) -> int:
        wanted = self.recipe.conflict.examples
        most = self.recipe.conflict.max_examples if wanted == "auto" else wanted
        once = sum(min(1.0, most / max(1, item.rows)) * item.tokens for item in self.mixture.counts)
        folders = {scope.shared for scope in self._measured()}
        return round(once * sum(not (folder / "conflict" / "record.json").is_file() for folder in folders))

    def _measured(self) -> list[StudyScope]:
        """Scopes whose split needs gradients."""
        return [scope for scope in self.scopes if needs_conflict(self.session.recipe_of(scope).split.method)]

    def _rate(self) -> BranchResult:
        """A few steps of training on rows of all datasets, to know how fast it is here."""
        session, recipe = self.session, self.recipe
        rows = {f"rows of {name}": value for name, value in self.mixture.fingerprints.items()}
        stage = Stage(
            "rate",
            session.run / "study" / "rate",
            key.training_settings(recipe),
            {"base": session.base.fingerprint, **rows},
        )

        def make(work: Work) -> BranchResult:
            parts = self.mixture.train
            share = max(1, _RATE_STEPS * recipe.train.batch_size // len(parts))
            few = {
                name: EncodedDataset(name, [part[int(i)] for i in draw(len(part), share, recipe.seed, name, "rate")])
                for name, part in parts.items()
            }
            settings = recipe.train.model_copy(update={"epochs": 1.0, "report_to": []})
            result = train_branch(few, session.base, work.folder, settings, seed=recipe.seed, progress=work.progress)
            shutil.rmtree(work.folder / "model")
            return result

        step = Step("rate", stage, make, BranchResult.load, recipe.seed, describe=lambda found: f"{found.steps} steps")
        return run_step(step, session)

    def train(self) -> None:
        """Gradients, splits and branches of every seed."""
        session = self.session
        for scope in {scope.shared: scope for scope in self._measured()}.values():
            gradients(session, self.mixture, scope)
        for scope in self.scopes:
            split(session, scope, self.mixture)
        train_rounds(session, self.mixture, self.scopes)

    # ---- merges and figures -----------------------------------------------------------------------------------------

    def models(self) -> list[_Model]:
        """Every method with every seed, merged and with its line measured."""
        found = []
        for seed in self.seeds:
            plain = [self._merged(method, seed) for method in self.methods if method.sources and not method.matched]
            lines = {model.method.name: model for model in map(self._with_line, plain)}
            for method in self.methods:
                if method.matched:
                    scale = self._matched_scale(lines, method)
                    lines[method.name] = self._merged(method, seed, scale)
            found += [lines[method.name] for method in self.methods if method.sources]
        return found

    def _merged(self, method: Method, seed: int, scale: float | None = None) -> _Model:
        session = self.session
        if method.merge is None:
            scope = source_scope(self.recipe, session.run, method.sources[0], seed)
            branches = branch_stages(session, scope)
            return _Model(method, seed, branches[0], list(branches.values()))
        extra = () if scale is None else (("merge.scale", scale),)
        scope = merge_scope(self.recipe, session.run, method, seed, extra)
        merge_run(session, scope)
        return _Model(method, seed, merge_as_made(session, scope), list(branch_stages(session, scope).values()))

    def _with_line(self, model: _Model) -> _Model:
        """Methods that only choose another scale lie on the line of the one with scale 1."""
        scale = dict(model.method.merge or ()).get("merge.scale", 1.0)
        return replace(model, line=self._line(model)) if scale in (1.0, "auto") else model

    def _line(self, model: _Model) -> Line:
        session, name = self.session, f"{model.method.name}, seed {model.seed}"
        asked = self._measuring_stage({"base": session.base.fingerprint, "model": key.model_content(model.stage)})
        scales = sorted({0.0, 1.0, *self.recipe.study.scales})
        folder = session.run / "study" / f"s{model.seed}" / "lines" / model.method.name
        stage = Stage("line", folder, {**asked.settings, "scales": scales}, asked.inputs, f"line of {name}")

        def make(work: Work) -> Line:
            found, _ = checked_model(model.stage)
            forward = Forward(session.base.batcher, session.device, self.recipe.evaluate.batch_tokens)
            line = measure_line(session.base, found, self.rows, scales, forward, work.progress)
            line.save(work.folder)
            return line

        step = Step("line", stage, make, Line.load, self.recipe.seed, describe=lambda line: f"{name}: {len(scales)} λ")
        return run_step(step, session)

    @cached_property
    def held_out(self) -> HeldOut:
        """What all models are measured on: without the rows that chose some method's weights."""
        rows = held_out_rows(self.session.run / "mixture")
        return reporting_rows(rows, self.recipe.seed) if self.searches else rows

    @cached_property
    def searches(self) -> bool:
        """Whether some rows chose weights; the others report."""
        return searches_weights(self.recipe)

    @cached_property
    def rows(self) -> Rows:
        return rows_by_part(self.held_out, self.recipe.evaluate, self.recipe.seed)

    def _measuring_stage(self, models: Mapping[str, str]) -> Stage:
        """What determines the figures of ``models`` (name → content)."""
        stage = key.evaluation_stage(self.recipe, self.session.run, models)
        return replace(stage, settings={**stage.settings, "rows": "reporting half"}) if self.searches else stage

    def _matched_scale(self, models: Mapping[str, _Model], method: Method) -> float:
        """λ at which joint training has moved as far as the own method.

        Raises:
            RecipeError: It would have to be extended too far.
        """
        own, joint = models[self.own].line, models["joint"].line if "joint" in models else None
        if own is None or joint is None or not joint.displacement:
            raise RecipeError(f"study.methods: {method.name} needs joint and {self.own} at scale 1 among the methods.")
        scale = own.displacement / joint.displacement
        if scale > _FURTHEST:
            raise RecipeError(
                f"study.methods: {method.name}: joint training moved {joint.displacement:.3g}, {self.own} "
                f"{own.displacement:.3g}: a scale of {scale:.3g} is beyond {_FURTHEST:g}. Leave {method.name} out."
            )
        return scale

    def result(self, models: list[_Model]) -> StudyResult:
        """Measure all models on the same rows and compare them."""
        found: dict[str, tuple[Path | None, str]] = {"base": (None, self.session.base.fingerprint)}
        found |= {model.name: checked_model(model.stage) for model in models}
        evaluation, scores = self._evaluate(found), self._scores(found)
        values = {name: values_of(evaluation, name) | scores.get(name, {}) for name in found}
        runs = [Run("base", seed, values["base"], 0, 0, 0.0) for seed in self.seeds]
        runs += [model.run(values[model.name]) for model in models]
        order = {method.name: place for place, method in enumerate(self.methods)}
        if "base" not in order:
            runs = [run for run in runs if run.method != "base"]
        runs.sort(key=lambda run: (order[run.method], run.seed))
        baseline, parameters = baseline_of(self.recipe).name, self.session.base.parameters
        differences = compare_methods(runs, baseline, self.own)
        result = StudyResult(
            *(self.recipe.name, self.own, baseline, self.seeds, tuple(order), tuple(runs), differences, (), parameters),
            surgery=self.surgery,
        )
        sentences = judge_study(result.difference, self.own, baseline, len(self.seeds), parameters)
        return replace(result, verdict=sentences)

    def _scores(self, models: Mapping[str, tuple[Path | None, str]]) -> dict[str, dict[Column, float]]:
        """Each model's scores on the recipe's benchmark suites, one per task."""
        if not self.recipe.evaluate.suites:
            return {}
        measured = measure_suites(self.session, models, self.session.run / "study" / "suites")
        return {name: headline(found.scores) for name, found in measured.items()}

    def _evaluate(self, models: Mapping[str, tuple[Path | None, str]]) -> Evaluation:
        session, recipe = self.session, self.recipe
        candidates = {name: Candidate(*model) for name, model in models.items()}
        fingerprints = {name: model.fingerprint for name, model in candidates.items()}
        stage = replace(self._measuring_stage(fingerprints), path=session.run / "study" / "evaluation")

        def make(work: Work) -> Evaluation:
            return evaluate(
                ModelSet(session.base, candidates),
                self.held_out,
                recipe.evaluate,
                seed=recipe.seed,
                folder=work.folder,
                device=session.device,
                progress=work.progress,
            )

        step = Step(
            "evaluate",
            stage,
            make,
            Evaluation.load,
            recipe.seed,
            describe=lambda found: f"{len(found.summary.models)} models",
            begin=f"{len(candidates)} models on held-out rows",
            unit="models",
            keep=("models",),
            follows_inputs=True,
        )
        return run_step(step, session)


@dataclass(frozen=True)
class _Model:
    """One method with one seed.

    Attributes:
        stage: Whose ``model`` folder it is.
        branches: What it was made from.
        line: None if it lies on another's.
    """

    method: Method
    seed: int
    stage: Stage
    branches: list[Stage]
    line: Line | None = None

    @property
    def name(self) -> str:
        """In the evaluation."""
        return f"{self.method.name}.s{self.seed}"

    @property
    def scale(self) -> float:
        """λ of its merge; 1 for a branch."""
        return float(self.stage.record().facts.get("scale", 1.0))

    def run(self, values: dict[Column, float]) -> Run:
        """As a line of the result."""
        facts = [stage.record().facts for stage in self.branches]
        targets, tokens = (sum(int(item[key]) for item in facts) for key in ("target_tokens", "tokens"))
        return Run(self.method.name, self.seed, values, targets, tokens, self.scale, self.line)
