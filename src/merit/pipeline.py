"""The chain of stages, top to bottom: check → mixture → conflict → split → branches → merged → evaluation.

One short method per stage: load the inputs, compute, save. It joins modules that do not know each other and holds no
maths. Everything a stage needs comes from the recipe and from earlier stages' folders.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from merit import stages
from merit.errors import RecipeError, ResourceError, RunFolderError
from merit.plan import Plan, make_plan
from merit.progress import Reporter, duration, size
from merit.recipe import Recipe, dump_recipe
from merit.run_folder import Stage, StaleStageError, fingerprint, lock, read_json, write_json, write_text

STAGES = ("mixture", "gradients", "split", "train", "merge", "evaluate")
"""Names of the stages as commands, in order."""


@dataclass(frozen=True)
class BranchId:
    """One branch of the run (``root`` is None) or of a baseline (``root`` is its split method)."""

    root: str | None
    k: int

    def __str__(self) -> str:
        return f"{self.root}/{self.k}" if self.root else str(self.k)

    @classmethod
    def parse(cls, text: str) -> BranchId:
        """Read ``3`` or ``random/3``."""
        root, _, k = text.rpartition("/")
        if not k.isdigit():
            raise RecipeError(
                f"--branch {text}: expected a branch number such as 0, or baseline/number such as random/0."
            )
        return cls(root or None, int(k))


class Pipeline:
    """One run: a recipe and its run folder.

    Args:
        recipe: The resolved recipe.
        run: The run folder; made when the first stage writes.
        reporter: Where progress is shown.
        jobs: Processes side by side, for gradients and branches.
        redo: Make stages again whose record no longer matches, in place of stopping.
    """

    def __init__(
        self, recipe: Recipe, run: Path, reporter: Reporter | None = None, *, jobs: int = 1, redo: bool = False
    ) -> None:
        self.recipe = recipe
        self.run_folder = run
        self.reporter = reporter or Reporter(quiet=True)
        self.jobs = max(1, jobs)
        self.redo = redo

    # ---- what several stages need ------------------------------------------------------------------------------------

    @cached_property
    def base(self) -> Any:
        """Facts of the base (:class:`merit.models.BaseInfo`), from its small files."""
        from merit.models import inspect_base

        return inspect_base(self.recipe.model)

    @cached_property
    def base_fingerprint(self) -> str:
        """Content of the base; its files are read once per change."""
        from merit import checkpoint

        with self._hashes() as memo:
            return checkpoint.fingerprint(self.base.folder, memo)

    @contextmanager
    def _hashes(self) -> Iterator[dict[str, str]]:
        """Known hashes of big files by path, size and modification time, kept in the run folder."""
        file = self.run_folder / ".hashes.json"
        memo: dict[str, str] = read_json(file) if file.is_file() else {}
        known = len(memo)
        yield memo
        if len(memo) != known:
            write_json(file, memo)

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer, chat template set."""
        from merit.models import load_tokenizer

        return load_tokenizer(self.recipe.model)

    @cached_property
    def device(self) -> Any:
        """Where this process computes."""
        from merit.models import pick_device

        return pick_device(self.recipe.train.device)

    def held(self) -> AbstractContextManager[None]:
        """Hold the run folder for this process."""
        return lock(self.run_folder, "this run")

    def done(self, stage: Stage) -> bool:
        """Whether a stage stands as asked; a stale one is refused, or removed with ``redo``."""
        try:
            if not stage.is_done():
                return False
        except StaleStageError:
            if not self.redo:
                raise
            self.reporter.note(f"{stage.name}: made with other settings; made again (--redo)")
            shutil.rmtree(stage.path)
            return False
        stage.verify()
        return True

    def write_recipe(self) -> None:
        """Write the resolved recipe into the run folder."""
        write_text(self.run_folder / "recipe.yaml", dump_recipe(self.recipe))

    def baseline(self, method: str) -> Pipeline:
        """The same run with another split method: its stages after the gradients lie in baselines/<method>/."""
        recipe = self.recipe.model_copy(
            update={"split": self.recipe.split.model_copy(update={"method": method}), "baselines": []}
        )
        other = Pipeline(recipe, self.run_folder, self.reporter, jobs=self.jobs, redo=self.redo)
        for name in ("base", "base_fingerprint", "tokenizer", "device"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        other.__dict__["root"] = self.run_folder / "baselines" / method
        return other

    @cached_property
    def root(self) -> Path:
        """Folder of split, branches and merge: the run folder, or a baseline's."""
        return self.run_folder

    def _methods(self) -> list[str]:
        return [self.recipe.split.method, *self.recipe.baselines]

    # ---- check -------------------------------------------------------------------------------------------------------

    def check(self, *, offline: bool = False) -> Plan:
        """Everything that can be checked before the first expensive step; returns the plan that is printed.

        Raises:
            UserError: The first thing that is wrong.
        """
        return make_plan(
            self.recipe, self.run_folder, base=None if offline else self.base, tokenizer=lambda: self.tokenizer
        )

    # ---- mixture -----------------------------------------------------------------------------------------------------

    def mixture(self) -> Stage:
        """Read, encode and count every dataset."""
        from merit.mixture.fingerprint import source_fingerprint
        from merit.mixture.prepare import prepare_mixture

        with self._hashes() as memo:
            sources = source_fingerprint(self.recipe, memo)
        tokenizer = tokenizer_fingerprint(self.tokenizer)
        stage = stages.mixture_stage(self.recipe, self.run_folder, tokenizer=tokenizer, sources=sources)
        if self.done(stage):
            self._say_mixture(stage, again=False)
            return stage
        self.reporter.stage("mixture", "reading and tokenising")
        with stage.writing(seed=self.recipe.seed) as record, self.reporter.progress("datasets") as tick:
            prepare_mixture(self.recipe, self.tokenizer, stage.path, progress=tick)
            record["chat_template"] = self.tokenizer.merit_template
        self._say_mixture(stage, again=True)
        return stage

    def _say_mixture(self, stage: Stage, *, again: bool) -> None:
        counts = read_json(stage.path / "datasets.json")
        rows, targets = sum(item["rows"] for item in counts), sum(item["target_tokens"] for item in counts)
        dropped = sum(sum(item["rows_dropped"].values()) for item in counts)
        detail = f"{len(counts)} datasets, {rows:,} rows, {targets:,} target tokens"
        detail += f", {dropped:,} rows dropped" if dropped else ""
        self.reporter.stage("mixture", detail + self._ending(stage, again))
        for item in counts:
            for warning in item["warnings"]:
                self.reporter.note(f"{item['name']}: {warning}")
        left_out = read_json(stage.path / "encoding.json")["left_out"]
        if left_out:
            names = ", ".join(item["name"] for item in left_out)
            self.reporter.note(f"left out, since the tokenizer cannot represent their text: {names}")

    def _ending(self, stage: Stage, again: bool) -> str:
        return f" ({duration(stage.record()['seconds'])})" if again else " (done before)"

    # ---- conflict ----------------------------------------------------------------------------------------------------

    def gradients(self) -> Stage:
        """One gradient sketch per dataset at the base, and their geometry."""
        stage = stages.conflict_stage(self.recipe, self.run_folder, base=self.base_fingerprint)
        if self.done(stage):
            self.reporter.stage("gradients", f"{self.recipe.conflict.representation}{self._ending(stage, False)}")
            return stage
        from merit.conflict import measure_conflict
        from merit.mixture.prepare import load_split

        rows = load_split(self.run_folder / "mixture", "train")
        self.reporter.stage("gradients", f"{len(rows)} datasets at the base")
        with (
            stage.writing(seed=self.recipe.seed, keep=("partial",)) as record,
            self.reporter.progress("gradients") as tick,
        ):
            record |= measure_conflict(
                self.recipe,
                rows,
                stage.path,
                base_fingerprint=self.base_fingerprint,
                tokenizer=self.tokenizer,
                device=self.device,
                jobs=self.jobs,
                progress=tick,
            )
            shutil.rmtree(stage.path / "partial", ignore_errors=True)
        self.reporter.stage("gradients", f"measured{self._ending(stage, True)}")
        return stage

    # ---- split -------------------------------------------------------------------------------------------------------

    def split(self) -> Stage:
        """Groups of datasets, for the run (or, on a baseline's pipeline, for that baseline)."""
        import numpy as np

        from merit.split import needs_conflict, split_mixture

        recipe, method = self.recipe, self.recipe.split.method
        conflict = stages.conflict_stage(recipe, self.run_folder, base=self.base_fingerprint)
        measured = conflict if needs_conflict(method) else None
        if measured is not None and not self.done(measured):
            raise RunFolderError(f"split.method {method} needs the gradients, which are not measured yet.", _NEXT)
        stage = stages.split_stage(recipe, self.run_folder, self.root, conflict=measured)
        again = not self.done(stage)
        if again:
            counts = {item["name"]: item for item in read_json(self.run_folder / "mixture" / "datasets.json")}
            arrays: Mapping[str, Any] = np.load(conflict.path / "geometry.npz") if measured is not None else {}
            names = [str(name) for name in arrays["names"]] if measured is not None else list(counts)
            weight = "rows" if recipe.split.balance == "samples" else "target_tokens"
            with stage.writing(seed=recipe.seed) as record:
                split = split_mixture(
                    method,
                    recipe.split.axes,
                    names=names,
                    weights=[counts[name][weight] for name in names],
                    balance=recipe.split.balance,
                    cosine=arrays["cosine"] if measured is not None else None,
                    gram=arrays["gram"] if measured is not None else None,
                    seed=recipe.seed,
                )
                left_out = sorted(set(counts) - set(names))
                write_json(
                    stage.path / "split.json",
                    {
                        "method": split.method,
                        "axes": split.axes,
                        "balance": split.balance,
                        "groups": split.groups,
                        "weights": split.weights,
                        "left_out": left_out,
                        "warnings": split.warnings,
                    },
                )
                record["left_out"] = left_out
        facts = read_json(stage.path / "split.json")
        sizes = " + ".join(str(len(group)) for group in facts["groups"])
        self.reporter.stage(
            "split", f"{method}: {len(facts['groups'])} groups of {sizes} datasets{self._ending(stage, again)}"
        )
        for warning in facts["warnings"]:
            self.reporter.note(warning)
        return stage

    def groups(self) -> list[list[str]]:
        """Dataset names per group, as split."""
        return [list(group) for group in read_json(self.root / "split" / "split.json")["groups"]]

    # ---- branches ----------------------------------------------------------------------------------------------------

    def branch_stages(self) -> dict[int, Stage]:
        """The run's (or baseline's) branches."""
        return {
            k: stages.branch_stage(self.recipe, self.run_folder, self.root, k, group, base=self.base_fingerprint)
            for k, group in enumerate(self.groups())
        }

    def _owner(self, branch: BranchId) -> Pipeline:
        if branch.root is not None and branch.root not in self.recipe.baselines:
            raise RecipeError(
                f"--branch {branch}: the recipe has no baseline {branch.root!r}; it has {self.recipe.baselines or 'none'}."
            )
        owner = self.baseline(branch.root) if branch.root else self
        if branch.k >= len(owner.groups()):
            raise RecipeError(f"--branch {branch}: the split has {len(owner.groups())} groups, numbered from 0.")
        return owner

    def train(self, branches: Sequence[BranchId] | None = None) -> None:
        """Train the named branches, or all of the run and its baselines, one after another or ``jobs`` side by side."""
        if branches is None:
            branches = [
                BranchId(method if index else None, k)
                for index, method in enumerate(self._methods())
                for k in range(len((self.baseline(method) if index else self).groups()))
            ]
        waiting = [branch for branch in branches if not self.done(self._owner(branch).branch_stages()[branch.k])]
        if not waiting:
            self.reporter.stage("train", f"{len(branches)} branches (done before)")
            return
        self._check_disk(len(waiting))
        workers = min(self.jobs, len(waiting))
        self.reporter.stage("train", f"{len(waiting)} branches" + (f", {workers} side by side" if workers > 1 else ""))
        if workers > 1:
            self._train_side_by_side(waiting, workers)
        else:
            for branch in waiting:
                self._owner(branch).train_branch(branch)

    def train_branch(self, branch: BranchId) -> Stage:
        """Train one branch in this process."""
        from merit.launch.local import ProgressFile
        from merit.mixture.prepare import load_split
        from merit.train import train_branch

        stage = self.branch_stages()[branch.k]
        if self.done(stage):
            return stage
        rows = load_split(self.run_folder / "mixture", "train")
        group = self.groups()[branch.k]
        threads = self.recipe.train.threads or max(1, (os.cpu_count() or 1) // self.jobs)
        with (
            stage.writing(seed=self.recipe.seed, keep=("checkpoints",)) as record,
            self.reporter.progress(f"branch {branch}") as show,
        ):
            progress = ProgressFile(stage.path / "progress.json")

            def tick(done: int, total: int, info: Mapping[str, Any]) -> None:
                progress(done, total, info)
                show(done, total, info)

            record |= train_branch(
                self.recipe,
                {name: rows[name] for name in group},
                stage.path,
                base=self.base,
                tokenizer=self.tokenizer,
                device=self.device,
                threads=threads,
                progress=tick,
                provenance={"branch": stage.fingerprint},
            )
            shutil.rmtree(stage.path / "checkpoints", ignore_errors=True)
        facts = stage.record()
        self.reporter.say(
            f"  branch {branch}: {facts['steps']:,} steps, {facts['target_tokens']:,} target tokens, "
            f"loss {facts['final_loss']:.4f}, {duration(facts['seconds'])}"
        )
        return stage

    def _train_side_by_side(self, waiting: Sequence[BranchId], workers: int) -> None:
        from merit.launch.local import BranchJob, run_branches

        work = {branch: self._target_tokens(branch) for branch in waiting}
        lists: list[list[BranchId]] = [[] for _ in range(workers)]
        for branch in sorted(waiting, key=lambda branch: -work[branch]):  # longest first, to the least loaded worker
            min(lists, key=lambda held: sum(work[one] for one in held)).append(branch)
        threads = self.recipe.train.threads or max(1, (os.cpu_count() or 1) // workers)
        jobs = [
            BranchJob(
                name=", ".join(map(str, held)),
                argv=[
                    *(sys.executable, "-m", "merit", "train", str(self.run_folder.resolve()), "--quiet"),
                    *(word for branch in held for word in ("--branch", str(branch))),
                    *("--set", f"train.threads={threads}"),
                    *(("--redo",) if self.redo else ()),
                ],
                log_path=self.run_folder / "logs" / f"train-{held[0]}.txt".replace("/", "-"),
                work=sum(work[branch] for branch in held),
                progress_paths=[
                    self._owner(branch).branch_stages()[branch.k].path / "progress.json" for branch in held
                ],
            )
            for held in lists
            if held
        ]
        with self.reporter.progress("branches") as tick:
            run_branches(jobs, workers, progress=tick)
        for branch in waiting:
            stage = self._owner(branch).branch_stages()[branch.k]
            if not self.done(stage):
                raise RunFolderError(f"branch {branch} ended without a record.", f"See {self.run_folder / 'logs'}.")
            facts = stage.record()
            self.reporter.say(
                f"  branch {branch}: {facts['steps']:,} steps, {facts['target_tokens']:,} target tokens, "
                f"loss {facts['final_loss']:.4f}, {duration(facts['seconds'])}"
            )

    def _target_tokens(self, branch: BranchId) -> int:
        counts = {
            item["name"]: item["target_tokens"] for item in read_json(self.run_folder / "mixture" / "datasets.json")
        }
        return sum(counts[name] for name in self._owner(branch).groups()[branch.k])

    def _check_disk(self, branches: int) -> None:
        """Weights of every branch still to come, and the training checkpoint of those that run at once."""
        stored = sum(2 if dtype in ("BF16", "F16") else 4 for dtype in self.base.dtypes.values()) / len(
            self.base.dtypes
        )
        need = int(self.base.parameters * (stored * (branches + 1) + 12 * min(self.jobs, branches)))
        free = shutil.disk_usage(self.run_folder).free
        if free < need:
            raise ResourceError(
                f"{self.run_folder}: {branches} branches need about {size(need)} here, {size(free)} are free.",
                "Free space, use another disk (--output DIR), or train fewer branches (split.axes, baselines).",
                "Nothing was trained.",
            )

    # ---- merged ------------------------------------------------------------------------------------------------------

    def merge(self) -> Stage:
        """One model from the branches that are there."""
        from merit.merging import merge_run

        return merge_run(self)

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def models(self) -> dict[str, tuple[Path | None, str]]:
        """Every model there is: name → (folder, content fingerprint); base first, branches last."""
        found: dict[str, tuple[Path | None, str]] = {"base": (None, self.base_fingerprint)}
        for method in self.recipe.baselines:
            other = self.baseline(method)
            stage = Stage("merged", other.root / "merged", {})
            if stage.record_file.is_file():
                found[method] = (stage.path / "model", stages.model_content(stage))
        merged = Stage("merged", self.root / "merged", {})
        if merged.record_file.is_file():
            if self.recipe.split.method == "joint":
                found["joint"] = (merged.path / "model", stages.model_content(merged))
            found["merged"] = (merged.path / "model", stages.model_content(merged))
        if self.recipe.evaluate.branches and self.recipe.group_count > 1:
            for k, stage in self.branch_stages().items():
                if stage.record_file.is_file():
                    found[f"branch-{k}"] = (stage.path / "model", stages.model_content(stage))
        return found

    def evaluate(self) -> Stage:
        """Held-out figures of every model, and what they say."""
        from merit.mixture.prepare import load_split

        models = self.models()
        stage = stages.evaluation_stage(
            self.recipe, self.run_folder, {name: value for name, (_, value) in models.items()}
        )
        if self.done(stage):
            self.reporter.stage("evaluate", f"{len(models)} models{self._ending(stage, False)}")
            return stage
        from merit.evaluation import evaluate_models

        self.reporter.stage("evaluate", f"{len(models)} models on held-out rows")
        with stage.writing(seed=self.recipe.seed, keep=("models",)) as record, self.reporter.progress("models") as tick:
            record |= evaluate_models(
                self.recipe,
                {name: folder for name, (folder, _) in models.items()},
                load_split(self.run_folder / "mixture", "test"),
                load_split(self.run_folder / "mixture", "kept"),
                stage.path,
                tokenizer=self.tokenizer,
                device=self.device,
                fingerprints={name: value for name, (_, value) in models.items()},
                progress=tick,
            )
        self.reporter.stage("evaluate", f"{len(models)} models measured{self._ending(stage, True)}")
        return stage

    # ---- all of it ---------------------------------------------------------------------------------------------------

    def run(self, until: str = "evaluate") -> None:
        """The whole chain up to and including ``until``, going on from what is done."""
        from merit.split import needs_conflict

        last = STAGES.index(until)
        self.check()
        with self.held():
            self.write_recipe()
            self.mixture()
            if last >= 1 and any(needs_conflict(method) for method in self._methods()):
                self.gradients()
            if last >= 2:
                self.split_all()
            if last >= 3:
                self.train()
            if last >= 4:
                self.merge_all()
            if last >= 5:
                self.evaluate()

    def split_all(self) -> None:
        """The run's split and every baseline's."""
        self.split()
        for method in self.recipe.baselines:
            self.baseline(method).split()

    def merge_all(self) -> None:
        """The run's merge and every baseline's."""
        self.merge()
        for method in self.recipe.baselines:
            self.baseline(method).merge()


_NEXT = "`merit run` does every stage in order; `merit status RUN` shows what is done."


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Content of a tokenizer and of the chat template in force."""
    return fingerprint({"tokenizer": tokenizer.backend_tokenizer.to_str(), "template": tokenizer.chat_template})


__all__ = ["STAGES", "BranchId", "Pipeline"]
