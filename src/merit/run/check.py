"""The check before a run: it finds what it can before the first expensive step, and makes the plan to print.

It reads small files and headers, the first rows of every dataset, and free disk space. It does not load weights, encode
datasets or write anything. Offline it uses only what is on this machine: sizes of published models come from
:mod:`merit.hf.published`, and missing data is listed as not checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merit.errors import RecipeError, UserError
from merit.evaluation.statistics import MIN_UNITS
from merit.files import require_space
from merit.hf.base import Base, BaseFacts
from merit.hf.hub import hub_ids
from merit.hf.models import pick_device
from merit.hf.published import PUBLISHED
from merit.mixture import image_check
from merit.mixture.found import SourceSummary, find_datasets, refuse_images
from merit.mixture.sources import Role, cached_bytes
from merit.mixture.template import ChatTemplate
from merit.prepare import stage_recipe
from merit.progress import count, size
from merit.recipe.schema import DatasetSettings, Recipe
from merit.run.machines import fits
from merit.run.merge_check import check_merge, check_patterns
from merit.run.needs import Weights, branch_count, file_sizes, items, needs, published_weights, weigh
from merit.run.preparation import planned_base
from merit.run.session import Session
from merit.run.sizes import meant, notes_on_sizes, stated_steps, steps_of
from merit.run.status import run_status
from merit.run.store import Stage, is_run_folder
from merit.run.suites import check_run_suites
from merit.train.requirements import check_requirements

NOT_CHECKED = "not checked"
"""Format of a dataset that an offline check did not find on this machine."""


@dataclass(frozen=True)
class StagePlan:
    """One step of a preparation, for printing: its name, what it does, what it reads."""

    name: str
    does: str
    datasets: tuple[SourceSummary, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a run will do and need.

    Attributes:
        recipe: The recipe.
        run: The run folder.
        datasets: Datasets of the mixture, in order.
        kept: Datasets that only evaluation reads: what the base can do.
        unseen: Datasets that only evaluation reads: tasks that nobody trains on.
        base: Facts about the base; None if it was not checked (offline).
        weights: Its size, counted or published; None when neither is known.
        steps: Optimizer steps of joint training at most; None where rows are not counted and a dataset has no budget.
        preparation: Steps that make the base first.
        disk_bytes: Disk for preparation, branches, baselines, merges, the training checkpoints that exist at once and the
            images that lie in rows; None if the base's size is unknown.
        memory_bytes: Memory for one branch's weights, gradients and optimizer state, without activations; likewise.
        notes: What the user should know.
    """

    recipe: Recipe
    run: Path
    datasets: tuple[SourceSummary, ...]
    kept: tuple[SourceSummary, ...]
    unseen: tuple[SourceSummary, ...]
    base: BaseFacts | None
    weights: Weights | None
    steps: int | None
    preparation: tuple[StagePlan, ...]
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
                "parameters": self.weights.parameters if self.weights else None,
                "trainable": self.weights.trainable if self.weights else None,
                "context": base.context if base else None,
            },
            "datasets": [
                {"name": item.name, "path": item.path, "test": item.test, "format": item.format}
                for item in self.datasets
            ],
            "kept": [item.name for item in self.kept],
            "unseen": [item.name for item in self.unseen],
            "split": {"method": recipe.split.method, "groups": recipe.group_count},
            "baselines": recipe.baselines,
            "branches": branch_count(recipe),
            "steps": self.steps,
            "preparation": [
                {"name": step.name, "does": step.does, "datasets": [item.name for item in step.datasets]}
                for step in self.preparation
            ],
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "gpus": [asdict(fit) for fit in fits(recipe, self.weights)] if self.weights else None,
            "notes": list(self.notes),
        }


def make_plan(session: Session, *, offline: bool = False) -> Plan:
    """Check a recipe against data, base and disk.

    Args:
        session: The command's session; its base is opened if it exists.
        offline: Use only what is on this machine.

    Raises:
        UserError: The first problem found.
    """
    recipe, run = session.given, session.run
    if is_run_folder(run):
        run_status(run, recipe)  # a run of another version is refused here
    summaries = _sources(recipe, offline=True) if offline else session.found.check()
    datasets = tuple(item for item in summaries if item.role == "mixture")
    kept = tuple(item for item in summaries if item.role == "kept")
    unseen = tuple(item for item in summaries if item.role == "unseen")
    _check_settings(recipe, len(datasets), offline=offline)
    opened = session.base if session.base_stands and not offline else None
    base, sizes = _base_facts(session, opened, offline=offline)
    preparation = _preparation(recipe, base, offline=offline or opened is not None)
    weights, embedded = _weights(recipe, base, sizes), _embedded_bytes(session, summaries, preparation)
    check_patterns(recipe, sizes)
    if base is not None and base.family is None:
        refuse_images(summaries)
    if opened is not None:  # a template that cannot be used for training is refused here, not after a preparation
        ChatTemplate(opened.tokenizer, opened.images.place if opened.images else None)
    notes = [
        *_notes_on_tests(recipe, datasets),
        *_notes_on_base(opened, weights, looked_at=base is not None),
        *_notes_on_unseen(summaries, preparation if opened is None else ()),
        *_notes_on_embedded_images(embedded),
        *(_notes_on_hub_datasets(recipe, base, summaries, preparation) if offline else ()),
    ]
    disk, memory = needs(recipe, weights, embedded=embedded) if weights is not None else (None, None)
    begun = any((run / "branches").glob("*/record.json")) or (run / "preparation").is_dir()
    if disk is not None and not begun and not offline:
        ways_out = "Free space, use another disk (--output DIR), or train fewer branches (split.axes, baselines)."
        require_space(run, disk, "the run's files", ways_out)
    rows = None if offline else session.found.most_rows()
    steps = stated_steps(recipe) if rows is None else steps_of(recipe, sum(rows.values()))
    notes += notes_on_sizes(recipe, rows or {})
    return Plan(recipe, run, datasets, kept, unseen, base, weights, steps, preparation, disk, memory, tuple(notes))


def _check_settings(recipe: Recipe, datasets: int, *, offline: bool) -> None:
    """Check what depends only on settings and the number of datasets."""
    if datasets or not offline:
        check_groups(recipe, datasets)
    check_requirements(recipe.train, recipe.model)
    check_merge(recipe)
    if not offline:
        check_run_suites(recipe)
    if recipe.train.device == "cuda" and not offline:
        pick_device("cuda")


def _base_facts(session: Session, opened: Base | None, *, offline: bool) -> tuple[BaseFacts | None, Mapping[str, int]]:
    """Facts of the base and the sizes of its tensors: as it is, or as a preparation will make it; none offline."""
    if opened is not None:
        return opened, file_sizes(opened)
    return (None, {}) if offline else planned_base(session.given, session.run)


def _weights(recipe: Recipe, base: BaseFacts | None, sizes: Mapping[str, int]) -> Weights | None:
    """Number of weights: counted, or as published for a base that was not looked at."""
    if base is None:
        return published_weights(recipe)
    _check_length(recipe, base, "train.max_length")
    return weigh(recipe, base, sizes)


def _notes_on_tests(recipe: Recipe, datasets: Sequence[SourceSummary]) -> Iterator[str]:
    without = [item.name for item in datasets if item.test is None and item.format != NOT_CHECKED]
    if without and recipe.evaluate.heldout:
        share = f"{len(without)} of {count(len(datasets), 'dataset')}"
        yield f"not scored, for lack of held-out rows: {share}, {_list(without)}."
    tested = sum(item.test is not None for item in datasets)
    if recipe.evaluate.heldout and 0 < tested < MIN_UNITS and all(item.format != NOT_CHECKED for item in datasets):
        yield (
            f"{count(tested, 'dataset')} with held-out rows: the report will show every figure, but no difference between "
            f"models can be called with fewer than {MIN_UNITS}."
        )


def _notes_on_base(opened: Base | None, weights: Weights | None, *, looked_at: bool) -> Iterator[str]:
    if opened is not None and opened.template.origin == "default":
        yield (
            "the base has no chat template; a plain default one is used, and included in the merged model "
            "(docs/mixture.md). Set your own with model.chat_template."
        )
    if opened is not None and opened.images is not None:
        costs = ", ".join(f"{side} x {side} pixels: {opened.images.count(side, side)}" for side in (336, 784, 1536))
        yield f"image tokens per picture, at model.max_pixels {opened.settings.max_pixels}: {costs}."
    if not looked_at:
        said = "its published size is used" if weights else "memory and disk are not known"
        yield f"the base was not checked: neither its files nor its tokenizer were read; {said}."


def _notes_on_unseen(summaries: Sequence[SourceSummary], preparation: Sequence[StagePlan]) -> Iterator[str]:
    unseen = [item.name for item in summaries if item.format == NOT_CHECKED]
    unseen += [
        f"{step.name}/{item.name}" for step in preparation for item in step.datasets if item.format == NOT_CHECKED
    ]
    if unseen or not any(item.role == "mixture" for item in summaries):
        what = f"{count(len(unseen), 'dataset')}, {_list(unseen)}" if unseen else "the mixture"
        yield f"not here as files, so not checked: {what}."


def _notes_on_embedded_images(embedded: int) -> Iterator[str]:
    if embedded:
        yield f"images that lie in rows are copied to the run folder: about {size(embedded)} of the disk."


def _notes_on_hub_datasets(
    recipe: Recipe, base: BaseFacts | None, summaries: Sequence[SourceSummary], preparation: Sequence[StagePlan]
) -> Iterator[str]:
    everything = [*summaries, *(item for step in preparation for item in step.datasets)]
    cached = {item.path for item in everything if item.cached}
    away = sorted({item.id for item in hub_ids(recipe) if item.kind == "dataset"} - cached)
    if away:
        what = f"{count(len(away), 'hub dataset')}, {_list(away)}"
        images = ", nor do the images in the rows, which are copied to the run folder" if _sees(recipe, base) else ""
        yield f"not on this machine: {what}; the download does not count in the disk estimate{images}."


def _embedded_bytes(session: Session, summaries: Sequence[SourceSummary], preparation: Sequence[StagePlan]) -> int:
    """Size of the images in rows that are not in the run folder yet."""
    stages = [(session.run / "preparation" / step.name, step.datasets) for step in preparation]
    return sum(
        item.embedded_bytes
        for folder, datasets in ((session.run, summaries), *stages)
        if not Stage("mixture", folder / "mixture").begun
        for item in datasets
    )


# ---- data ----------------------------------------------------------------------------------------------------------


def _sources(recipe: Recipe, *, offline: bool) -> list[SourceSummary]:
    """The recipe's datasets, checked; offline only those on this machine, the others as not checked.

    Raises:
        MixtureError: A dataset cannot be used.
    """
    if not offline:
        return find_datasets(recipe.mixture, recipe.evaluate).check()
    mixture, evaluate = recipe.mixture, recipe.evaluate
    listed = meant(mixture)
    unseen = [_unchecked(item, item.test, "mixture", mixture.samples) for item in listed if not _here(item)]
    away = [_unchecked(item, item.path, "kept") for item in evaluate.kept if not _here(item)]
    if mixture.datasets is not None:
        if unseen:  # a pattern may mean datasets that are not here
            here = [item for item in listed if _here(item)]
            mixture = mixture.model_copy(update={"datasets": here, "include": ["*"], "exclude": []})
    elif mixture.test is not None and not Path(mixture.test).exists():
        mixture = mixture.model_copy(update={"test": None})
    source = mixture.folder or mixture.path
    if not mixture.datasets and (source is None or not Path(source).exists()):
        return [*unseen, *away]
    kept: dict[str, Any] = {"kept": [item for item in evaluate.kept if _here(item)]}
    folders = {name: getattr(evaluate, name) for name in ("kept_folder", "unseen_folder")}
    kept |= {name: None for name, path in folders.items() if path is not None and not Path(path).is_dir()}
    evaluate = evaluate.model_copy(update=kept)
    found = find_datasets(mixture, evaluate).check()
    places = {item.name: place for place, item in enumerate(recipe.mixture.datasets or [])}
    return sorted([*found, *unseen, *away], key=lambda item: (item.role != "mixture", places.get(item.name, 0)))


def _unchecked(item: DatasetSettings, test: str | None, role: Role, samples: int | None = None) -> SourceSummary:
    found = cached_bytes(item, samples)
    return SourceSummary(
        item.name, item.path, test, NOT_CHECKED, role, embedded_bytes=found or 0, cached=found is not None
    )


def _here(item: DatasetSettings) -> bool:
    return Path(item.path).exists() and (item.test is None or Path(item.test).exists())


def check_images(session: Session, *, offline: bool) -> image_check.ImageReport:
    """Decode every image of every dataset (`merit check --images`)."""
    images = None if offline or not session.base_stands else session.base.images
    with session.reporter.progress("images") as progress:
        return image_check.check_images(session.found, progress, images)


# ---- preparation ---------------------------------------------------------------------------------------------------


def check_preparation(recipe: Recipe, run: Path) -> tuple[StagePlan, ...]:
    """Check a recipe's preparation alone: checkpoints, data, trainable subsets, lengths.

    Raises:
        UserError: The first problem found.
    """
    base, _ = planned_base(recipe, run)
    return _preparation(recipe, base, offline=False)


def _preparation(recipe: Recipe, base: BaseFacts | None, *, offline: bool) -> tuple[StagePlan, ...]:
    if recipe.prepare is None:
        return ()
    steps = []
    if recipe.prepare.assemble is not None:
        joined = recipe.prepare.assemble
        does = f"vision encoder of {joined.vision_from} and {recipe.model.base}; projector: {joined.projector}"
        steps.append(StagePlan("assemble", does))
    for stage in recipe.prepare.stages:
        where = f"prepare.stages: {stage.name}"
        inner = stage_recipe(recipe, stage, recipe.model.base)
        try:
            found = tuple(_sources(inner, offline=offline))
            if base is not None:
                weigh(inner, base, {})
                _check_length(inner, base, "train.max_length")
        except UserError as error:
            raise type(error)(f"{where}: {error.message}", *error.ways_out) from None
        train, most = stage.train, stated_steps(inner)
        data = count(len(found), "dataset") if found else "unseen data"
        does = (
            f"{' + '.join(items(stage.trainable))}; {data}, {count(train.epochs, 'epoch')}, batch {train.batch_size}, "
        )
        does += f"learning rate {train.learning_rate:g}" + (f", at most {count(most, 'step')}" if most else "")
        steps.append(StagePlan(stage.name, does, found))
    return tuple(steps)


def _sees(recipe: Recipe, base: BaseFacts | None) -> bool:
    """Whether the base is a vision-language model, as far as is known."""
    if base is not None:
        return base.family is not None
    known = PUBLISHED.get(recipe.model.base)
    return bool(recipe.prepare and recipe.prepare.assemble) or (known is not None and known.vision > 0)


def _check_length(recipe: Recipe, base: BaseFacts, key: str) -> None:
    if base.context is not None and recipe.train.max_length > base.context:
        raise RecipeError(
            f"{key} is {recipe.train.max_length} tokens, but the base supports at most {base.context}.",
            f"Set {key} to {base.context} or less, or choose a base with a longer context.",
        )


def check_groups(recipe: Recipe, datasets: int) -> None:
    """Refuse a split of ``datasets`` datasets into more groups than there are datasets.

    Raises:
        RecipeError: There are too few datasets for some method of the recipe or its baselines.
    """
    for method in (recipe.split.method, *recipe.baselines):
        groups = 1 if method == "joint" else 2**recipe.split.axes
        if datasets < groups:
            raise RecipeError(
                f"split: {count(datasets, 'dataset')} cannot fill {groups} groups (method {method}, "
                f"split.axes {recipe.split.axes} makes 2^{recipe.split.axes}).",
                "Datasets are never split. Use fewer axes, add datasets, or use split.method: joint.",
            )


def _list(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
