"""Hub ids of a recipe: do they exist, are they accessible, do they have the requested subsets? Nothing is downloaded.

`merit check` asks before it downloads anything, so that a misspelt id among sixty is found in seconds. If the hub cannot be
reached nothing is refused: what is in the local cache can still be used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import DatasetInfo, HfApi, ModelInfo, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from merit.errors import RecipeError, nearest
from merit.hf.side_files import reason
from merit.progress import count
from merit.recipe.load import is_hub_id
from merit.recipe.schema import MixtureSettings, Recipe

_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


@dataclass(frozen=True)
class HubId:
    """One id, and where it is in the recipe.

    Attributes:
        kind: model or dataset.
        id: The id, such as ``Qwen/Qwen2.5-3B``.
        where: Key of the recipe.
        revision: Branch, tag or commit, if one is given.
        subset: Configuration of a dataset, if one is given.
    """

    kind: Literal["model", "dataset"]
    id: str
    where: str
    revision: str | None = None
    subset: str | None = None


def hub_ids(recipe: Recipe) -> list[HubId]:
    """Every hub id of a recipe, in order: what is not a local file or folder and looks like an id."""
    found = [HubId("model", recipe.model.base, "model.base", recipe.model.revision)]
    mixtures = [("mixture", recipe.mixture)]
    if recipe.prepare is not None:
        joined = recipe.prepare.assemble
        if joined is not None:
            found.append(HubId("model", joined.vision_from, "prepare.assemble.vision_from", joined.revision))
        mixtures[:0] = [(f"prepare.stages.{stage.name}.mixture", stage.mixture) for stage in recipe.prepare.stages]
    for key, mixture in mixtures:
        found += _of_mixture(key, mixture)
    found += [
        HubId("dataset", item.path, f"evaluate.kept: {item.name}", None, item.subset) for item in recipe.evaluate.kept
    ]
    return [item for item in found if is_hub_id(item.id) and not _here(item)]


def _of_mixture(key: str, mixture: MixtureSettings) -> Iterator[HubId]:
    for item in mixture.datasets or []:
        yield HubId("dataset", item.path, f"{key}: {item.name}", None, item.subset)
    if mixture.path is not None:
        yield HubId("dataset", mixture.path, f"{key}.path")


def _here(item: HubId) -> bool:
    return Path(item.id).exists() or (item.kind == "dataset" and Path(item.id).suffix in _SUFFIXES)


def resolve_ids(recipe: Recipe) -> list[str]:
    """Ask the hub about every id of a recipe.

    Returns:
        Notes: gated ids, or that the hub could not be reached.

    Raises:
        RecipeError: Ids, revisions or subsets do not exist: all of them in one message.
    """
    ids, wrong, notes = hub_ids(recipe), [], []
    if constants.HF_HUB_OFFLINE or not ids:
        return [f"not resolved: {count(len(ids), 'hub id')}; the hub is switched off (HF_HUB_OFFLINE)."] if ids else []
    api, known = HfApi(), {}
    for item in ids:
        place = (item.kind, item.id, item.revision)
        try:
            if place not in known:
                ask = api.model_info if item.kind == "model" else api.dataset_info
                known[place] = ask(item.id, revision=item.revision)
                if getattr(known[place], "gated", False):
                    notes.append(
                        f"{item.where}: {item.id} is gated: accept its terms on its page before it can be read."
                    )
        except RevisionNotFoundError:
            wrong.append(f"{item.where}: the {item.kind} {item.id} has no revision {item.revision!r}.")
        except RepositoryNotFoundError:
            wrong.append(
                f"{item.where}: the hub has no {item.kind} {item.id} (or it is private, and you are not signed in)."
            )
        except Exception as error:  # the libraries' network errors have no common base class
            notes.append(f"hub ids were not resolved, since the hub could not be reached: {reason(error)[:200]}")
            break
        else:
            wrong += _missing_subset(item, known[place])
    if wrong:
        wrong = list(dict.fromkeys(wrong))
        raise RecipeError(
            wrong[0] if len(wrong) == 1 else f"{len(wrong)} hub ids cannot be used:",
            *(wrong if len(wrong) > 1 else []),
            "A path that does not exist is taken for a hub id: also check the spelling of paths. Nothing was downloaded.",
        )
    return notes


def _missing_subset(item: HubId, info: ModelInfo | DatasetInfo) -> list[str]:
    """What is wrong with the requested subset, if the dataset's card lists its subsets."""
    configs = (getattr(info, "card_data", None) or {}).get("configs") or []
    names = [str(config["config_name"]) for config in configs if isinstance(config, dict) and "config_name" in config]
    if item.subset is None or not names or item.subset in names:
        return []
    return [f"{item.where}: {item.id} has no subset {item.subset!r}.{nearest(item.subset, names)}"]
