"""`merit check` on the terminal: the plan of a run."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from merit.progress import count, size
from merit.run.check import NOT_CHECKED, Plan
from merit.run.machines import fits
from merit.run.needs import branch_count, items

_LARGE = 24 * 10**9
"""Bytes of memory per branch from which it is told which GPUs can train it."""


def render(plan: Plan) -> list[RenderableType]:
    """The plan as a table, and its notes."""
    recipe, base = plan.recipe, plan.base
    table = Table(show_header=False, title=f"{recipe.name} → {plan.run}", title_justify="left")
    found = f"{base.architecture}, context {base.context}" if base else "not checked"
    weights = plan.weights
    counts = f", {weights.parameters:,} parameters, {weights.trainable:,} trained" if weights else ""
    table.add_row("base", f"{recipe.model.base}\n{found}{counts}; trained: {' + '.join(items(recipe.model.trainable))}")
    for step in plan.preparation:
        table.add_row("prepare", f"{step.name}: {step.does}")
    formats = sorted({item.format for item in plan.datasets})
    tested = sum(item.test is not None for item in plan.datasets)
    what = f"{count(len(plan.datasets), 'dataset')} ({', '.join(formats)}), {tested} with held-out rows"
    table.add_row("mixture", what if plan.datasets else NOT_CHECKED)
    if plan.kept:
        kept = count(len(plan.kept), "dataset")
        table.add_row("kept", f"{kept} for measuring what is kept of the base, not trained on")
    if plan.unseen:
        unseen = count(len(plan.unseen), "task")
        table.add_row("unseen", f"{unseen} for measuring what carries over, not trained on")
    conflict = recipe.conflict
    table.add_row("gradients", f"{conflict.examples} examples per dataset, {conflict.representation}")
    groups, branches = count(recipe.group_count, "group"), count(branch_count(recipe), "branch")
    table.add_row("split", f"{recipe.split.method}: {groups}, balanced by {recipe.split.balance}")
    train = recipe.train
    steps = f"{count(train.epochs, 'epoch')}, batch {train.batch_size}, "
    steps += f"{train.scheduler} learning rate {train.learning_rate:g}"
    steps += f", {count(recipe.rounds, 'round')} with a merge after each" if recipe.rounds > 1 else ""
    table.add_row("train", f"{branches}, each {steps}, at most {train.max_length} tokens per row")
    if plan.steps is not None:
        each = f"; about {plan.steps // recipe.group_count:,} in each of {recipe.group_count} branches"
        most = count(plan.steps, "optimizer step")
        table.add_row("", f"at most {most} in all{each if recipe.group_count > 1 else ''}")
    if recipe.baselines:
        table.add_row("baselines", f"{', '.join(recipe.baselines)}, at the same budget")
    table.add_row("merge", f"{recipe.merge.operator}, weights: {recipe.merge.weights}, scale: {recipe.merge.scale}")
    if plan.disk_bytes is not None and plan.memory_bytes is not None:
        need = f"{size(plan.disk_bytes)} of disk; {size(plan.memory_bytes)} of memory per branch, without activations"
        table.add_row("needs", need)
        if weights is not None and plan.memory_bytes > _LARGE:
            table.add_row("GPUs", "\n".join(map(str, fits(recipe, weights))))
    return [table, *(f"[yellow]note:[/] {note}" for note in plan.notes)]
