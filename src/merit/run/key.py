"""Which settings and inputs decide each stage's answer: recipe and earlier records in, :class:`Stage` objects out.

What is left out on purpose, because it changes how an answer is made and not what it is: paths, host, device, threads,
batch sizes of measurement, checkpoint intervals. Those are recorded. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merit.files import fingerprint, read_json
from merit.recipe.schema import DatasetSettings, Recipe
from merit.run.store import Stage

MIXTURE, CONFLICT, SPLIT, MERGED, EVALUATION = "mixture", "conflict", "split", "merged", "evaluation"


def _without(block: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key not in keys}


def _dataset(item: DatasetSettings) -> dict[str, Any]:
    return _without(item.model_dump(mode="json"), "path", "test", "images")


def mixture_stage(recipe: Recipe, run: Path, *, tokenizer: str, sources: Mapping[str, str]) -> Stage:
    """Rows → tokens. Inputs: the tokenizer with its chat template, and every dataset's source files' content."""
    mixture = _without(recipe.mixture.model_dump(mode="json"), "folder", "path", "test", "datasets")
    mixture["images"] = _without(mixture["images"], "folder")
    if recipe.mixture.datasets is not None:
        mixture["datasets"] = [_dataset(item) for item in recipe.mixture.datasets]
    settings = {
        "mixture": mixture,
        "model": {"max_pixels": recipe.model.max_pixels},
        "train": {"max_length": recipe.train.max_length},
        "evaluate": {"kept": [_dataset(item) for item in recipe.evaluate.kept]},
        "seed": recipe.seed,
    }
    inputs = {"tokenizer": tokenizer, **{f"source of {name}": value for name, value in sources.items()}}
    return Stage(MIXTURE, run / "mixture", settings, inputs)


def _model(recipe: Recipe) -> dict[str, Any]:
    block: dict[str, Any] = {"trainable": recipe.model.trainable, "dtype": recipe.model.dtype}
    if recipe.model.trainable == "lora":
        block["lora"] = recipe.model.lora.model_dump(mode="json")
    return block


def train_rows(run: Path) -> dict[str, str]:
    """Content fingerprint of every dataset's encoded training rows, by name, in recipe order."""
    return {item["name"]: item["fingerprint"] for item in read_json(run / "mixture" / "datasets.json")}


def _rows_of(rows: Mapping[str, str]) -> dict[str, str]:
    return {f"rows of {name}": value for name, value in rows.items()}


def conflict_stage(recipe: Recipe, run: Path, *, base: str) -> Stage:
    """Gradients and geometry at the base."""
    conflict = _without(recipe.conflict.model_dump(mode="json"), "batch_tokens", "cache")
    if conflict["representation"] != "sketch":
        del conflict["sketch_size"]
    if conflict["representation"] != "stride":
        del conflict["stride"]
    if conflict["examples"] != "auto":
        conflict = _without(conflict, "target_reliability", "max_examples")
    settings = {"conflict": conflict, "model": _model(recipe), "seed": recipe.seed}
    return Stage(CONFLICT, run / "conflict", settings, {"base": base, **_rows_of(train_rows(run))})


def split_stage(recipe: Recipe, run: Path, root: Path, *, conflict: Stage | None) -> Stage:
    """Groups of datasets under ``root`` (the run folder, or a baseline's). Without ``conflict`` no gradient is read."""
    settings: dict[str, Any] = {"split": recipe.split.model_dump(mode="json")}
    if recipe.split.method == "joint":
        settings["split"] = {"method": "joint"}
    if recipe.split.method in ("random", "kmeans"):
        settings["seed"] = recipe.seed
    inputs = _rows_of(train_rows(run))
    if conflict is not None:
        inputs["conflict"] = conflict.record()["outputs"]["geometry.npz"]["sha256"]
    return Stage(SPLIT, root / "split", settings, inputs)


def training_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide a branch's weights, its group aside."""
    train = _without(recipe.train.model_dump(mode="json"), "device", "threads", "checkpoint_minutes", "max_length")
    return {"train": train, "model": _model(recipe), "seed": recipe.seed}


def branch_stage(recipe: Recipe, run: Path, root: Path, k: int, group: list[str], *, base: str) -> Stage:
    """Branch ``k``: fine-tuning on ``group`` alone; it depends on no other group."""
    rows = train_rows(run)
    settings = {**training_settings(recipe), "group": sorted(group)}
    inputs = {"base": base, **_rows_of({name: rows[name] for name in sorted(group)})}
    return Stage(f"branch {k}", root / "branches" / str(k), settings, inputs)


def merged_stage(
    recipe: Recipe, root: Path, branches: Mapping[int, Stage], *, base: str, excluded: Sequence[int] = ()
) -> Stage:
    """The merge of ``branches``; ``excluded`` are the run's other ones, left out."""
    merge = recipe.merge.model_dump(mode="json")
    if merge["scale"] != "auto":
        merge = _without(merge, "scales", "rule")
    settings = {"merge": merge, "excluded": sorted(excluded)}
    inputs = {"base": base, **{f"branch {k}": model_content(stage) for k, stage in branches.items()}}
    return Stage(MERGED, root / "merged", settings, inputs)


def merged_as_made(recipe: Recipe, root: Path, branches: Mapping[int, Stage], *, base: str) -> Stage:
    """:func:`merged_stage` for the branches that an existing merge says it took, of the run's ``branches``."""
    stage = Stage(MERGED, root / "merged", {})
    excluded = stage.record()["settings"]["excluded"] if stage.record_file.is_file() else []
    taken = {k: branch for k, branch in branches.items() if k not in excluded}
    return merged_stage(recipe, root, taken, base=base, excluded=excluded)


def model_content(stage: Stage) -> str:
    """Content fingerprint of the model that a done stage wrote (weights, config, tokenizer; not its card)."""
    return str(stage.record()["model_fingerprint"])


def evaluation_stage(recipe: Recipe, run: Path, models: Mapping[str, str]) -> Stage:
    """Figures of every model in ``models`` (name → content fingerprint) on held-out rows."""
    evaluate = _without(recipe.evaluate.model_dump(mode="json"), "kept", "kept_folder", "batch_tokens", "suites")
    outputs = Stage(MIXTURE, run / "mixture", {}).record()["outputs"]
    rows = {name: facts["sha256"] for name, facts in outputs.items() if name.startswith(("test/", "kept/"))}
    settings = {"evaluate": evaluate, "model": {"dtype": recipe.model.dtype}, "seed": recipe.seed}
    return Stage(EVALUATION, run / "evaluation", settings, {**models, "held-out rows": fingerprint(rows)})
