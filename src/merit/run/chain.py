"""The chain of stages, top to bottom: check → (prepare) → mixture → conflict → split → branches → merged → evaluation.

One short method per stage: load the inputs, compute, save. It joins modules that do not know each other and holds no
maths. Everything a stage needs comes from the recipe and from earlier stages' folders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit.errors import ConflictError, MixtureError, RecipeError, RunFolderError
from merit.files import differences, read_json, write_json, write_text
from merit.prepare import with_prepared_base
from merit.prepare.stage import prepare
from merit.progress import duration
from merit.recipe.load import dump_recipe
from merit.recipe.schema import Recipe
from merit.report.terminal import Reporter
from merit.run import key as stages
from merit.run.branches import BranchId, train_branches
from merit.run.check import Plan, check_groups, check_preparation, make_plan
from merit.run.evaluating import evaluate_run
from merit.run.merging import merge_run
from merit.run.status import rank, run_status
from merit.run.store import Stage, StaleStageError, claim, is_run_folder, lock

if TYPE_CHECKING:
    from merit.mixture.found import Found
    from merit.split import Split

STAGES = ("prepare", "mixture", "gradients", "split", "train", "merge", "evaluate")
"""Names of the stages as commands, in order."""


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
        self.given = recipe
        self.recipe = with_prepared_base(recipe, run)
        self.run_folder = run
        self.reporter = reporter or Reporter(quiet=True)
        self.jobs = max(1, jobs)
        self.redo = redo

    # ---- what several stages need ------------------------------------------------------------------------------------

    @cached_property
    def base(self) -> Any:
        """The base (:class:`merit.hf.base.Base`), opened once per command.

        Raises:
            RunFolderError: The recipe prepares its base, and that has not been done.
        """
        from merit.hf.base import open_base

        self._require_base()
        with self.hashes() as memo:
            base = open_base(self.recipe.model, memo)
            _ = base.fingerprint
        return base

    @cached_property
    def found(self) -> Found:
        """The mixture's datasets, found once per command.

        Raises:
            MixtureError: A source is missing or cannot be used.
        """
        from merit.mixture.found import find_datasets

        return find_datasets(self.recipe.mixture, self.recipe.evaluate)

    @property
    def base_stands(self) -> bool:
        """Whether the base is there: always, unless the recipe prepares it."""
        return self.recipe.prepare is None or (self.run_folder / "prepared" / "record.json").is_file()

    def _require_base(self) -> None:
        if not self.base_stands:
            raise RunFolderError(
                f"{self.run_folder}: the base is not prepared yet.", "`merit prepare` makes it; `merit run` does all."
            )

    @contextmanager
    def hashes(self) -> Iterator[dict[str, str]]:
        """Known hashes of big files by path, size and modification time, kept in the run folder."""
        file = self.run_folder / ".hashes.json"
        memo: dict[str, str] = {}
        with suppress(RunFolderError):  # a mere cache: missing or damaged, it is made anew
            memo = dict(read_json(file))
        known = len(memo)
        yield memo
        if len(memo) != known and is_run_folder(self.run_folder):
            write_json(file, memo)

    @cached_property
    def device(self) -> Any:
        """Where this process computes."""
        from merit.hf.models import pick_device

        return pick_device(self.recipe.train.device)

    @contextmanager
    def begun(self, command: str, until: str | None = None) -> Iterator[None]:
        """Hold the run folder while a command works in it; what stands there is compared with the recipe first.

        Args:
            command: ``run`` or one of ``STAGES``.
            until: For ``run``: the last stage.

        Raises:
            RunFolderError: The folder is no run folder, is in use, or an earlier stage is stale.
        """
        claim(self.run_folder)
        with lock(self.run_folder, "this run"):
            self.refuse_stale(command, until)
            self.write_recipe()
            yield

    def refuse_stale(self, command: str, until: str | None = None, *, own: bool = True) -> None:
        """Refuse, before anything is changed, what was made by another recipe.

        With ``redo`` a stage command may make its own stage again, and ``run`` may make all again; earlier stages never.

        Args:
            command: ``run`` or one of ``STAGES``.
            until: For ``run``: the last stage.
            own: Look at the command's own stage, too.

        Raises:
            StaleStageError: A stage does not match; the changed fields are named.
        """
        if command == "run" and self.redo:
            return
        last = STAGES.index(until or command) if command == "run" else STAGES.index(command) - (self.redo or not own)
        known: dict[str, Any] = {"base": self.base.fingerprint} if self.base_stands else {}
        if command not in (
            "merge",
            "prepare",
        ):  # they need no tokenizer, and to load one takes longer than a small merge
            known |= {"tokenizer": self.base.input_fingerprint} if self.base_stands else {}
            known |= {"sources": self.sources()}
        for row in run_status(self.run_folder, self.recipe, **known)["stages"]:
            changed = row["changed"]
            if row["stage"] == "evaluation":  # made again unasked when only the models changed
                changed = [change for change in changed if not change.startswith("input.")]
            if changed and rank(row) <= last:
                shown = changed[:8] + [f"... and {len(changed) - 8} more"] * (len(changed) > 8)
                raise StaleStageError(
                    f"{self.run_folder}: {row['stage']} was made with other settings or inputs than those asked for now:",
                    *shown,
                    "Ways out: set these back; or use another run folder (--output DIR); or have it made again, with what "
                    "follows from it (--redo).",
                    "Nothing was changed.",
                )

    def sources(self) -> dict[str, str]:
        """Content of every dataset's source files; as recorded, where they are no longer there and the rows are.

        Raises:
            MixtureError: A source is missing, and no finished mixture stage stands in for it.
        """
        try:
            with self.hashes() as memo:
                return self.found.fingerprints(memo)
        except MixtureError:
            record = self.run_folder / "mixture" / "record.json"
            if not record.is_file():
                raise
            inputs = read_json(record)["inputs"]
            return {
                key.removeprefix("source of "): value for key, value in inputs.items() if key.startswith("source of ")
            }

    def done(self, stage: Stage) -> bool:
        """Whether a stage stands as asked; a stale one is refused, or removed with ``redo``."""
        try:
            if not stage.is_done():
                return False
        except StaleStageError:
            if not self.redo:
                raise
            self.reporter.note(f"{stage.name}: made with other settings or inputs; made again (--redo)")
            stage.clear(
                keep=("partial", "models")
            )  # gradients there are keyed by content: unchanged datasets' are used again
            return False
        stage.verify()
        return True

    def write_recipe(self) -> None:
        """Write the resolved recipe into the run folder."""
        file, text = self.run_folder / "recipe.yaml", dump_recipe(self.given)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write_text(file, text)

    def baseline(self, method: str) -> Pipeline:
        """The same run with another split method: its stages after the gradients lie in baselines/<method>/."""
        recipe = self.recipe.model_copy(
            update={"split": self.recipe.split.model_copy(update={"method": method}), "baselines": []}
        )
        other = Pipeline(recipe, self.run_folder, self.reporter, jobs=self.jobs, redo=self.redo)
        for name in ("base", "device", "found"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        other.__dict__["root"] = self.run_folder / "baselines" / method
        return other

    def inner(self, recipe: Recipe, folder: Path) -> Pipeline:
        """A run of its own inside this one: a stage of the preparation."""
        return Pipeline(recipe, folder, self.reporter, redo=self.redo)

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
        base = self.base if self.base_stands and not offline else None
        return make_plan(
            self.given, self.run_folder, opened=base, found=None if offline else self.found, offline=offline
        )

    # ---- prepare -----------------------------------------------------------------------------------------------------

    def prepare(self) -> Path:
        """Make the base that the later stages start from, where the recipe says how.

        Raises:
            RecipeError: It does not.
        """
        if self.given.prepare is None:
            raise RecipeError(
                f"{self.given.name}: the recipe has no prepare block, so there is nothing to prepare.",
                "model.base is the base as it stands; docs/preparation.md says when another one is needed.",
            )
        base = prepare(self)
        for name in ("base",):  # what is known of an earlier one counts no more
            self.__dict__.pop(name, None)
        return base

    def prepare_alone(self) -> None:
        """`merit prepare`: the preparation and nothing else; the recipe's own mixture need not be there yet."""
        if self.given.prepare is not None and not self.base_stands:
            check_preparation(self.given, self.run_folder)
        with self.begun("prepare"):
            self.prepare()

    # ---- mixture -----------------------------------------------------------------------------------------------------

    def mixture(self) -> Stage:
        """Read, encode and count every dataset."""
        from merit.mixture.stage import encode_mixture

        tokenizer = self.base.input_fingerprint
        stage = stages.mixture_stage(self.recipe, self.run_folder, tokenizer=tokenizer, sources=self.sources())
        if self.done(stage):
            self._say_mixture(stage, again=False)
            return stage
        self.reporter.stage("mixture", "reading and tokenising")
        with stage.writing(seed=self.recipe.seed) as record, self.reporter.progress("datasets") as tick:
            encode_mixture(
                self.found,
                self.base,
                stage.path,
                max_length=self.recipe.train.max_length,
                seed=self.recipe.seed,
                progress=tick,
            )
            record["chat_template"] = self.base.template.origin
        self._say_mixture(stage, again=True)
        return stage

    def _say_mixture(self, stage: Stage, *, again: bool) -> None:
        from merit.mixture.result import Mixture

        mixture = Mixture.load(stage.path)
        rows, targets = sum(mixture.rows.values()), sum(mixture.target_tokens.values())
        dropped = sum(sum(item.rows_dropped.values()) for item in mixture.counts)
        detail = f"{len(mixture.counts)} datasets, {rows:,} rows, {targets:,} target tokens"
        detail += f", {dropped:,} rows dropped" if dropped else ""
        self.reporter.stage("mixture", detail + self._ending(stage, again))
        said = mixture.warnings
        for warning in said[:_SHOWN]:
            self.reporter.note(warning)
        if len(said) > _SHOWN:
            self.reporter.note(f"and {len(said) - _SHOWN} more in {stage.path / 'datasets.json'}")

    def _ending(self, stage: Stage, again: bool) -> str:
        return f" ({duration(stage.record()['seconds'])})" if again else " (done before)"

    # ---- conflict ----------------------------------------------------------------------------------------------------

    def gradients(self) -> Stage:
        """One gradient sketch per dataset at the base, and their geometry."""
        stage = stages.conflict_stage(self.recipe, self.run_folder, base=self.base.fingerprint)
        if self.done(stage):
            self.reporter.stage("gradients", f"{self.recipe.conflict.representation}{self._ending(stage, False)}")
            return stage
        from merit.conflict.stage import measure_conflict
        from merit.mixture.stage import load_split

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
                base=self.base,
                device=self.device,
                jobs=self.jobs,
                progress=tick,
            )
        self.reporter.stage("gradients", f"measured{self._ending(stage, True)}")
        return stage

    def compare_gradients(self) -> list[dict[str, Any]]:
        """Cosines by sketch and stride against exact ones, on this base and mixture."""
        from merit.conflict.compare import compare_representations
        from merit.mixture.stage import load_split

        with self.reporter.progress("exact gradients") as tick:
            return compare_representations(
                self.recipe,
                load_split(self.run_folder / "mixture", "train"),
                self.run_folder / "conflict",
                base=self.base,
                device=self.device,
                jobs=self.jobs,
                progress=tick,
            )

    # ---- split -------------------------------------------------------------------------------------------------------

    def split(self) -> Stage:
        """Groups of datasets, for the run (or, on a baseline's pipeline, for that baseline)."""
        import numpy as np

        from merit.split import needs_conflict, split_mixture

        recipe, method = self.recipe, self.recipe.split.method
        conflict = stages.conflict_stage(recipe, self.run_folder, base=self.base.fingerprint)
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
            cut = partial(
                split_mixture,
                method,
                recipe.split.axes,
                names=names,
                weights=[counts[name][weight] for name in names],
                balance=recipe.split.balance,
                seed=recipe.seed,
            )
            with stage.writing(seed=recipe.seed) as record:
                split = cut(cosine=arrays["cosine"], gram=arrays["gram"]) if measured is not None else cut()
                left_out = sorted(set(counts) - set(names))
                stability = self._stability(cut, arrays) if measured is not None else None
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
                        "stability": stability,
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

    def _stability(self, cut: Callable[..., Split], arrays: Mapping[str, Any]) -> dict[str, float] | None:
        """Probability of every dataset to land in its group, had another calibration sample been drawn."""
        from merit.conflict.stability import split_stability

        replicates = 100 if len(arrays["names"]) <= 200 else 20
        try:
            return split_stability(
                arrays,
                lambda cosine, gram: cut(cosine=cosine, gram=gram).groups,
                replicates=replicates,
                seed=self.recipe.seed,
            ).probability
        except ConflictError as error:
            self.reporter.note(f"how stable the split is cannot be said: {error.message}")
            return None

    def groups(self) -> list[list[str]]:
        """Dataset names per group, as split."""
        return [list(group) for group in read_json(self.root / "split" / "split.json")["groups"]]

    # ---- branches ----------------------------------------------------------------------------------------------------

    def branch_stages(self) -> dict[int, Stage]:
        """The run's (or baseline's) branches."""
        return {
            k: stages.branch_stage(self.recipe, self.run_folder, self.root, k, group, base=self.base.fingerprint)
            for k, group in enumerate(self.groups())
        }

    def prepare_branches(self) -> None:
        """What training needs on this machine: encoded rows that are the ones the split was made from.

        Raises:
            RunFolderError: There is no split, or the rows here are others.
        """
        for method in self._methods():
            root = self.run_folder / "baselines" / method if method in self.recipe.baselines else self.run_folder
            if not (root / "split" / "record.json").is_file():
                raise RunFolderError(f"{root}: there is no split yet.", _NEXT)
        self.mixture()
        rows = {f"rows of {name}": value for name, value in stages.train_rows(self.run_folder).items()}
        inputs = Stage("split", self.root / "split", {}).record()["inputs"]
        made_from = {key: value for key, value in inputs.items() if key.startswith("rows of ")}
        if made_from != rows:
            raise RunFolderError(
                f"{self.run_folder}: the training rows here are not those that the split was made from:",
                *differences(made_from, rows)[:8],
                "Use the same data, base tokenizer, train.max_length and mixture settings as where the split was made, or "
                "split again.",
            )

    def owner(self, branch: BranchId) -> Pipeline:
        """The pipeline that a branch belongs to: this run's, or one of its baselines'.

        Raises:
            RecipeError: There is no such branch.
        """
        if branch.root is not None and branch.root not in self.recipe.baselines:
            raise RecipeError(
                f"--branch {branch}: the recipe has no baseline {branch.root!r}; it has {self.recipe.baselines or 'none'}."
            )
        owner = self.baseline(branch.root) if branch.root else self
        if branch.k >= len(owner.groups()):
            raise RecipeError(f"--branch {branch}: the split has {len(owner.groups())} groups, numbered from 0.")
        return owner

    def all_branches(self) -> list[BranchId]:
        """Every branch of the run and of its baselines."""
        owners = [(None, self), *((method, self.baseline(method)) for method in self.recipe.baselines)]
        return [BranchId(root, k) for root, owner in owners for k in range(len(owner.groups()))]

    def train(self, branches: Sequence[BranchId] | None = None) -> None:
        """Train the named branches, or all of the run and its baselines, one after another or ``jobs`` side by side."""
        train_branches(self, self.all_branches() if branches is None else branches)

    def train_alone(self, branches: Sequence[BranchId] | None) -> None:
        """`merit train`: as :meth:`train`, on whatever machine has recipe, split, data and base.

        Named branches take no hold of the whole run folder, so several processes can train different ones.
        """
        if branches is None:
            with self.begun("train"):
                self.prepare_branches()
                self.train()
            return
        claim(self.run_folder)
        self.refuse_stale("train", own=False)
        if not (self.run_folder / "recipe.yaml").is_file():
            self.write_recipe()
        self.prepare_branches()
        self.train(branches)

    # ---- merged ------------------------------------------------------------------------------------------------------

    def merge(self, *, exclude: Sequence[int] = (), allow_missing: bool = False) -> Stage:
        """One model from the branches that are there."""
        return merge_run(self, exclude=exclude, allow_missing=allow_missing)

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self) -> Stage:
        """Held-out figures of every model, and what they say."""
        return evaluate_run(self)

    # ---- all of it ---------------------------------------------------------------------------------------------------

    def run(self, until: str = "evaluate") -> None:
        """The whole chain up to and including ``until``, going on from what is done."""
        from merit.split import needs_conflict

        def wanted(stage: str) -> bool:
            return STAGES.index(stage) <= STAGES.index(until)

        if self._sources_here():
            for note in self.check().notes:
                self.reporter.note(note)
        else:
            self.reporter.note("the mixture's source files are gone; the rows that were encoded from them are used")
        with self.begun("run", until):
            if self.given.prepare is not None or until == "prepare":
                self.prepare()
            if wanted("mixture"):
                self.mixture()
                check_groups(self.recipe, len(stages.train_rows(self.run_folder)))
            if wanted("gradients") and any(needs_conflict(method) for method in self._methods()):
                self.gradients()
            if wanted("split"):
                self.split_all()
            if wanted("train"):
                self.train()
            if wanted("merge"):
                self.merge_all()
            if wanted("evaluate"):
                self.evaluate()

    def _sources_here(self) -> bool:
        """Whether the sources are there; False only where a finished mixture stage stands in for them."""
        try:
            _ = self.found
        except MixtureError:
            if not (self.run_folder / "mixture" / "record.json").is_file():
                raise
            return False
        return True

    def split_all(self) -> None:
        """The run's split and every baseline's."""
        self.split()
        for method in self.recipe.baselines:
            self.baseline(method).split()

    def merge_all(self) -> None:
        """The run's merge and every baseline's (joint has one branch and needs none)."""
        self.merge()
        for method in self.recipe.baselines:
            if method != "joint":
                self.baseline(method).merge()


_SHOWN = 8  # notes on datasets that are printed; all are in the files
_NEXT = "`merit run` does every stage in order; `merit status RUN` shows what is done."


__all__ = ["STAGES", "BranchId", "Pipeline"]
