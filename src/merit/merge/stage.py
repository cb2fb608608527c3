"""Merging branches of one base into one checkpoint, inside or outside a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from merit.errors import MergeError
from merit.files import scratch
from merit.merge.coefficients import refuse_unused_weights
from merit.merge.lora import plan_adapter_merge
from merit.merge.operators import operator_and_options, uses_weights
from merit.merge.plan import DEFAULT, MergePlan, plan_merge
from merit.merge.result import MergeResult
from merit.merge.searched import WeightSearch
from merit.merge.stream import run_merge
from merit.merge.weights import Branch, Judge, Losses, ScaleSearch, Trained, lopsided, search_scale, weigh
from merit.progress import Progress, silent
from merit.recipe.schema import MergeSettings

if TYPE_CHECKING:
    from merit.hf.base import Base

__all__ = ["Judging", "are_adapters", "merge_branches"]


@dataclass(frozen=True)
class Judging:
    """How a run judges what is searched for on held-out data.

    Attributes:
        scales: (folder of the plain merge, scratch folder) → how a λ is judged.
        weights: (branches weighted by tokens, output, progress) → the searched weights.
    """

    scales: Callable[[Path, Path], Judge]
    weights: Callable[[Sequence[Branch], Path, Progress], WeightSearch]


def merge_branches(
    base: Base | str | os.PathLike[str],
    branches: Sequence[Branch] | Sequence[Trained],
    folder: str | os.PathLike[str],
    settings: MergeSettings = DEFAULT,
    *,
    excluded: Sequence[str] = (),
    judge: Judging | None = None,
    progress: Progress = silent,
) -> MergeResult:
    """Merge branches once into a checkpoint folder; LoRA adapters are merged by their full update.

    With ``scale: auto`` the plain merge is made first, λ is searched along the line from the base to it, and the chosen λ
    is then merged from the branches. With ``weights: auto`` the weights are searched together with λ.

    Args:
        base: θ0.
        branches: Results of training, weighted by ``settings.weights``; or checkpoints with their own weights.
        folder: To be created; it appears only when complete, and contains its record (``merge.json``).
        settings: Operator, weights, scale ...
        excluded: Names of branches that were left out on purpose: for card and record.
        judge: For ``scale: auto`` and ``weights: auto``.
        progress: In bytes.

    Raises:
        MergeError: The branches are not compatible, or a setting is invalid.
        CheckpointError: A folder is missing or damaged.
        ResourceError: The disk is too full.
    """
    parts = [part for part in branches if isinstance(part, Branch)]
    if not parts:
        trained = dict(enumerate(part for part in branches if not isinstance(part, Branch)))
        parts = weigh(settings.weights, trained, len(trained))
    refuse_unused_weights(*operator_and_options(settings.operator, settings.options), settings.weights)
    adapters = are_adapters([part.path for part in parts])
    known = None if isinstance(base, str | os.PathLike) else base.fingerprint
    source = Path(base) if isinstance(base, str | os.PathLike) else base.folder

    def plan(output: Path, chosen: MergeSettings) -> MergePlan:
        if adapters:
            made = plan_adapter_merge(source, parts, output, chosen, excluded=excluded)
        else:
            made = plan_merge(source, parts, output, chosen, excluded=excluded, base_fingerprint=known)
        notes = lopsided(parts, made.shares) if uses_weights(made.operator, made.options) else []
        return replace(made, warnings=(*made.warnings, *notes))

    output = Path(folder)
    search: ScaleSearch | WeightSearch | None = None
    by_weight = settings.weights == "auto"
    if by_weight or settings.scale == "auto":
        plain = settings.model_copy(update={"scale": 1.0})
        plan(output, plain)  # finds problems with the output before the search
        if judge is None:
            what, instead = ("weights", "weights") if by_weight else ("scale", "a number")
            raise MergeError(
                f"{what}: auto needs held-out data, which only a run has.", f"Give {instead}, or merge a run."
            )
        if by_weight:
            search = judge.weights(parts, output, progress)
            parts, chosen = search.weigh(parts), search.scale
        else:
            with scratch(output) as place:
                run_merge(plan(place / "model", plain))
                search = _search(judge.scales(place / "model", place), settings, progress)
            chosen = search.chosen
        settings = settings.model_copy(update={"scale": chosen})
    final = plan(output, settings)
    if isinstance(search, WeightSearch):
        final = replace(final, warnings=(*final.warnings, *search.warnings))
    return run_merge(final, progress, search)


def _search(judge: Judge, settings: MergeSettings, progress: Progress) -> ScaleSearch:
    grid, measured = len({0.0, 1.0, *settings.scales}), count()

    def losses(scale: float) -> Losses:
        progress(next(measured), grid, f"λ = {scale:g}")
        return judge.losses(scale)

    search = search_scale(losses, settings.scales, settings.rule)
    return replace(search, kept=judge.kept, rows_shared_with_evaluation=judge.shared)


def are_adapters(folders: Sequence[Path]) -> bool:
    """Whether the folders hold LoRA adapters.

    Raises:
        MergeError: Some do and some do not.
    """
    found = [(folder / "adapter_config.json").is_file() for folder in folders]
    if any(found) and not all(found):
        raise MergeError(
            "merge: some checkpoints are LoRA adapters and some are full models; merge one kind at a time.",
            "Fold each adapter into its base first (merit merge --base BASE --checkpoint ADAPTER=1 --output FULL).",
        )
    return any(found)
