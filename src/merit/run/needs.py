"""How much memory and disk a run needs, by counting weights: those in a base's files, or published figures.

Frozen weights need neither gradients nor optimizer state. Activations are not included: they depend on the batch and are
controlled by ``train.micro_batch_size``. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merit.hf import checkpoint
from merit.hf.base import BaseFacts
from merit.hf.models import trainable_names
from merit.hf.published import PUBLISHED
from merit.recipe.schema import Recipe

_WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_MOMENTS = {"sgd": 0, "adafactor": 0, "adamw_8bit": 2, "adamw_8bit_paged": 2}
"""Bytes of optimizer state per trained weight, if not Adam's 8; adafactor's rows and columns are negligible."""


@dataclass(frozen=True)
class Weights:
    """The numbers of a base that determine memory and disk.

    Attributes:
        parameters: Number of stored weights.
        trainable: Of these, trained.
        stored: Bytes per stored weight.
        stages: Weights that each stage of a preparation trains.
    """

    parameters: int
    trainable: int
    stored: int
    stages: tuple[int, ...] = ()


def state_bytes(optimizer: str) -> int:
    """Bytes of optimizer state per trained weight."""
    return _MOMENTS.get(optimizer, 8)


def branch_count(recipe: Recipe) -> int:
    """Branches to train, including baselines."""
    return recipe.group_count + sum(1 if method == "joint" else 2**recipe.split.axes for method in recipe.baselines)


def weigh(recipe: Recipe, base: BaseFacts, sizes: Mapping[str, int]) -> Weights:
    """Count a base's weights and those selected by ``model.trainable``.

    Args:
        recipe: The recipe.
        base: Its base.
        sizes: Number of weights by name in its files.

    Raises:
        RecipeError: ``model.trainable`` selects nothing in this base.
    """

    def count(trainable: str | list[str]) -> int:
        return sum(sizes.get(name, 0) for name in trainable_names(list(base.dtypes), trainable, base.family))

    stored = max(_WIDTHS.get(dtype, 4) for dtype in base.dtypes.values())
    return Weights(base.parameters, count(recipe.model.trainable), stored, tuple(map(count, _stage_subsets(recipe))))


def estimate(
    recipe: Recipe, base: BaseFacts, *, branches: int | None = None, merges: int | None = None, at_once: int = 1
) -> tuple[int, int]:
    """:func:`needs` of a base that exists, with its preparation done."""
    recipe = recipe.model_copy(update={"prepare": None})
    return needs(recipe, weigh(recipe, base, file_sizes(base)), branches=branches, merges=merges, at_once=at_once)


def needs(
    recipe: Recipe,
    weights: Weights,
    *,
    branches: int | None = None,
    merges: int | None = None,
    at_once: int = 1,
    embedded: int = 0,
) -> tuple[int, int]:
    """Disk and memory (bytes) that a run needs, by counting weights.

    Disk: branches, merges and what a preparation leaves in the stored dtype, and for each branch that trains at once one
    checkpoint (float32 weights, and the optimizer's state of the trained ones). With several rounds also a round's branches,
    the merges before and after it, in float32, and the optimizer states that go on. Memory: float32 weights of one branch,
    with gradients and optimizer state of the trained ones; a preparation may train more than the branches do. Images
    in separate files are read in place; those embedded in rows are copied to the run folder.

    Args:
        recipe: The recipe.
        weights: Its base's.
        branches: Branches to store. Default: the recipe's.
        merges: Merges to store. Default: the recipe's.
        at_once: Branches that train in parallel.
        embedded: Bytes of the images that lie in rows.
    """
    if merges is None:
        merges = 1 + sum(method != "joint" for method in recipe.baselines)
    total, stored = weights.parameters, 4 if recipe.train.save_dtype == "float32" else weights.stored
    models = 0
    trained = [(recipe.train.optimizer, 0 if recipe.model.trainable == "lora" else weights.trainable)]
    if recipe.prepare is not None:
        models += len(recipe.prepare.stages) + (recipe.prepare.assemble is not None)
        trained += zip([stage.train.optimizer for stage in recipe.prepare.stages], weights.stages, strict=True)
    if recipe.model.trainable == "lora":
        models, at_once = models + merges, 1 if recipe.prepare is not None and recipe.prepare.stages else 0
    else:
        models += (branch_count(recipe) if branches is None else branches) + merges
    moments = 4 * weights.trainable * (branch_count(recipe) if branches is None else branches)
    state = max(state_bytes(optimizer) * count for optimizer, count in trained)
    memory = 4 * total + max((4 + state_bytes(optimizer)) * count for optimizer, count in trained)
    disk = total * stored * models + (4 * total + state) * at_once + _rounds(recipe, weights, branches)
    return disk + embedded + moments * recipe.train.save_second_moments, memory


def _rounds(recipe: Recipe, weights: Weights, branches: int | None) -> int:
    """Disk (bytes) for what lies between rounds: at most two rounds' files at once, or all with ``keep_files``."""
    rounds, between = recipe.rounds if recipe.baselines == [] else recipe.train.rounds, recipe.train.between
    if rounds == 1:
        return 0
    count = branch_count(recipe) if branches is None else branches
    merges = 1 + sum(method != "joint" for method in recipe.baselines)
    kept = rounds - 1 if between.keep_files else 1
    carried = _MOMENTS.get(recipe.train.optimizer, 8) * weights.trainable if between.keeps_optimizer else 0
    momentum = 0 if between.outer.momentum == 0 else 1
    models = 4 * weights.parameters * (count * kept + merges * (1 + momentum) * (kept + 1))
    return models + carried * count * (kept + 1)


def file_sizes(base: BaseFacts) -> dict[str, int]:
    """Number of weights of every tensor in the base's files."""
    return {name: header.size for name, header in checkpoint.read_headers(base.folder).tensors.items()}


def published_weights(recipe: Recipe) -> Weights | None:
    """Size of the base by the published figures; None for a model that :mod:`merit.hf.published` does not list."""
    found = PUBLISHED.get(recipe.model.base)
    if found is None:
        return None
    sizes = {"language": found.language, "projector": found.projector, "vision": found.vision}
    if recipe.prepare is not None and recipe.prepare.assemble is not None:
        giver = PUBLISHED.get(recipe.prepare.assemble.vision_from)
        if giver is None:
            return None
        sizes |= {"projector": giver.projector, "vision": giver.vision}
    total = sum(sizes.values())

    def count(trainable: str | Sequence[str]) -> int:
        wanted = {"language" if item == "lora" else item for item in items(trainable)}
        return sum(sizes[role] for role in wanted) if wanted <= sizes.keys() else total  # all, or patterns: at most all

    return Weights(total, count(recipe.model.trainable), found.stored, tuple(map(count, _stage_subsets(recipe))))


def items(trainable: str | Sequence[str]) -> Sequence[str]:
    """``model.trainable`` as a list."""
    return [trainable] if isinstance(trainable, str) else trainable


def _stage_subsets(recipe: Recipe) -> list[str | list[str]]:
    return [stage.trainable for stage in recipe.prepare.stages] if recipe.prepare else []
