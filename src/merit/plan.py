"""The check before a run: everything that can be found wrong before the first expensive step, and the plan to print.

It reads small files and headers, the first rows of every dataset, and free disk space. It loads no weights, encodes no
dataset and writes nothing.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit.errors import MergeError, RecipeError, ResourceError
from merit.progress import size
from merit.recipe import Recipe

if TYPE_CHECKING:
    from merit.mixture.sources import SourceSummary
    from merit.models import BaseInfo


@dataclass(frozen=True)
class Plan:
    """What a run will do and need.

    Attributes:
        recipe: The recipe.
        run: The run folder.
        datasets: Datasets of the mixture, in order.
        kept: Datasets that only evaluation reads.
        base: Facts of the base; None when it was not looked at (offline).
        disk_bytes: Disk for branches, baselines, merges and the training checkpoints that exist at once; None offline.
        memory_bytes: Memory for one branch's weights, gradients and optimizer state, activations aside; None offline.
        notes: What a person should know.
    """

    recipe: Recipe
    run: Path
    datasets: tuple[SourceSummary, ...]
    kept: tuple[SourceSummary, ...]
    base: BaseInfo | None
    disk_bytes: int | None
    memory_bytes: int | None
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """The plan as JSON values."""
        recipe, base = self.recipe, self.base
        return {
            "name": recipe.name,
            "run": str(self.run),
            "base": {
                "path": recipe.model.base,
                "architecture": base.architecture if base else None,
                "parameters": base.parameters if base else None,
                "context": base.context if base else None,
            },
            "datasets": [
                {"name": item.name, "path": item.path, "test": item.test, "format": item.format}
                for item in self.datasets
            ],
            "kept": [item.name for item in self.kept],
            "split": {"method": recipe.split.method, "groups": recipe.group_count},
            "baselines": recipe.baselines,
            "branches": branch_count(recipe),
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "notes": list(self.notes),
        }

    def render(self) -> list[Any]:
        """The plan as something that rich can print."""
        from rich.table import Table

        recipe, base = self.recipe, self.base
        table = Table(show_header=False, title=f"{recipe.name} → {self.run}", title_justify="left")
        found = (
            f"{base.architecture}, {base.parameters:,} parameters, context {base.context}" if base else "not checked"
        )
        table.add_row("base", f"{recipe.model.base}\n{found}; trained: {recipe.model.trainable}")
        formats = sorted({item.format for item in self.datasets})
        tested = sum(item.test is not None for item in self.datasets)
        table.add_row("mixture", f"{len(self.datasets)} datasets ({', '.join(formats)}), {tested} with held-out rows")
        if self.kept:
            table.add_row("kept", f"{len(self.kept)} datasets that the base is measured on and nobody trains on")
        conflict = recipe.conflict
        table.add_row("gradients", f"{conflict.examples} examples per dataset, {conflict.representation}")
        table.add_row(
            "split", f"{recipe.split.method}: {recipe.group_count} groups, balanced by {recipe.split.balance}"
        )
        train = recipe.train
        steps = f"{train.epochs:g} epochs, batch {train.batch_size}, {train.scheduler} learning rate {train.learning_rate:g}"
        table.add_row(
            "train", f"{branch_count(recipe)} branches, each {steps}, at most {train.max_length} tokens a row"
        )
        if recipe.baselines:
            table.add_row("baselines", f"{', '.join(recipe.baselines)}, at the same budget")
        table.add_row("merge", f"{recipe.merge.operator}, weights: {recipe.merge.weights}, scale: {recipe.merge.scale}")
        if self.disk_bytes is not None and self.memory_bytes is not None:
            need = f"{size(self.disk_bytes)} of disk; {size(self.memory_bytes)} of memory per branch, activations aside"
            table.add_row("needs", need)
        return [table, *(f"[yellow]note:[/] {note}" for note in self.notes)]


def branch_count(recipe: Recipe) -> int:
    """Branches to train, baselines included."""
    groups = [1 if method == "joint" else 2**recipe.split.axes for method in (recipe.split.method, *recipe.baselines)]
    return sum(groups)


def make_plan(recipe: Recipe, run: Path, *, base: BaseInfo | None, tokenizer: Callable[[], Any]) -> Plan:
    """Check a recipe against data, base and disk.

    Args:
        recipe: The recipe.
        run: The run folder, which need not be there.
        base: Facts of the base, or None to check without it.
        tokenizer: Loads the tokenizer; called only with a base.

    Raises:
        UserError: The first thing that is wrong.
    """
    from merit.mixture.sources import check_sources
    from merit.train import check_trainer_options

    notes: list[str] = []
    summaries = check_sources(recipe)
    datasets = tuple(item for item in summaries if not item.kept)
    kept = tuple(item for item in summaries if item.kept)
    check_groups(recipe, len(datasets))
    if recipe.train.trainer:
        check_trainer_options(recipe)
    _check_merge(recipe)
    if recipe.train.device == "cuda":
        from merit.models import pick_device

        pick_device("cuda")
    without = [item.name for item in datasets if item.test is None]
    if without and recipe.evaluate.heldout:
        notes.append(
            f"{len(without)} of {len(datasets)} datasets have no held-out rows and are not scored: {_list(without)}."
        )
    if base is None:
        notes.append(
            "the base was not looked at: neither its weights nor its tokenizer nor memory and disk are checked."
        )
        return Plan(recipe, run, datasets, kept, None, None, None, tuple(notes))
    if base.context is not None and recipe.train.max_length > base.context:
        raise RecipeError(
            f"train.max_length is {recipe.train.max_length} tokens, but the base was made for at most {base.context}.",
            f"Set train.max_length to {base.context} or less, or choose a base with a longer context.",
        )
    _check_trainable(recipe, base)
    if tokenizer().merit_template == "default":
        notes.append(
            "the base has no chat template; a plain default one is used, and carried along into the merged model "
            "(docs/mixture.md). Give your own with model.chat_template."
        )
    disk, memory = estimate(recipe, base)
    parent = next(folder for folder in (run, *run.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if not any((run / "branches").glob("*/record.json")) and free < disk:
        raise ResourceError(
            f"{run}: the run needs about {size(disk)} of disk, {size(free)} are free.",
            "Free space, use another disk (--output DIR), or train fewer branches (split.axes, baselines).",
            "Nothing was written.",
        )
    return Plan(recipe, run, datasets, kept, base, disk, memory, tuple(notes))


def estimate(
    recipe: Recipe, base: BaseInfo, *, branches: int | None = None, merges: int | None = None, at_once: int = 1
) -> tuple[int, int]:
    """Disk and memory (bytes) that a run needs, by counting weights.

    Disk: branches and merges in the stored dtype, and for each branch that trains at once one checkpoint (float32 weights
    and two moments). Memory: float32 weights, gradients and two moments of one branch.

    Args:
        recipe: The recipe.
        base: Its base.
        branches: Branches to store. Default: the recipe's.
        merges: Merges to store. Default: the recipe's.
        at_once: Branches that train side by side.
    """
    if merges is None:
        merges = 1 + sum(method != "joint" for method in recipe.baselines)
    widths = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
    stored = 4 if recipe.train.save_dtype == "float32" else max(widths.get(dtype, 4) for dtype in base.dtypes.values())
    if recipe.model.trainable == "lora":
        return base.parameters * stored * merges, base.parameters * 4
    models = (branch_count(recipe) if branches is None else branches) + merges
    return base.parameters * (stored * models + 12 * at_once), base.parameters * 16


def check_groups(recipe: Recipe, count: int) -> None:
    """Refuse a split of ``count`` datasets into more groups than there are datasets.

    Raises:
        RecipeError: Some method of the recipe, baselines included, cannot be filled.
    """
    for method in (recipe.split.method, *recipe.baselines):
        groups = 1 if method == "joint" else 2**recipe.split.axes
        if count < groups:
            raise RecipeError(
                f"split: {count} datasets cannot fill {groups} groups (method {method}, split.axes {recipe.split.axes} "
                f"makes 2^{recipe.split.axes}).",
                "Datasets are never cut. Use fewer axes, add datasets, or use split.method: joint.",
            )


def _check_merge(recipe: Recipe) -> None:
    """Operator options, before any branch is trained for them."""
    from merit.merge.operators import operator_and_options

    try:
        operator, _ = operator_and_options(recipe.merge.operator, recipe.merge.options)
    except MergeError as error:
        raise RecipeError(f"merge.options: {error.message}", *error.ways_out) from None
    if recipe.model.trainable == "lora" and operator.kind == "block":
        raise RecipeError(
            f"merge.operator {operator.name} ranks all entries of a model and cannot work on LoRA adapters.",
            "Use average, task_arithmetic, star, tsv or iso_cts, or train full weights.",
        )


def _check_trainable(recipe: Recipe, base: BaseInfo) -> None:
    """Roles and patterns of ``model.trainable``, against the names in the base's files."""
    wanted = recipe.model.trainable
    if wanted in ("projector", "vision"):
        raise RecipeError(f"model.trainable: {wanted} is a role of vision-language models; this base is text-only.")
    if isinstance(wanted, str):
        return
    names = list(base.dtypes)
    for pattern in wanted:
        if not fnmatch.filter(names, pattern):
            raise RecipeError(
                f"model.trainable: pattern {pattern!r} matches none of the {len(names)} tensors of the base.",
                f"Names look like {names[0]} and {names[-1]}.",
            )


def _list(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
