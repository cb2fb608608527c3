"""What determines each stage's result: recipe and fingerprints of its inputs in, :class:`Stage` objects out.

Left out on purpose, because they change how a result is computed and not what it is: paths, host, device, threads, batch
sizes of measurement, checkpoint intervals. Those are only recorded. Keys never depend on live objects: the same recipe and
files give the same key in every process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merit.files import differences, fingerprint
from merit.hf.checkpoint import SECOND_MOMENTS
from merit.merge.operators import MOMENTS
from merit.recipe.schema import DatasetSettings, PreparationStageSettings, Recipe
from merit.run.scope import Scope
from merit.run.store import Stage

ROWS, SOURCE, BRANCH = "rows of ", "source of ", "branch "
"""Prefixes of the names of inputs of which there are several."""


HELD_OUT = ("test/", "kept/", "unseen/")
"""Prefixes of the mixture stage's files that hold rows of the evaluation."""


def _without(block: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key not in keys}


def _dataset(item: DatasetSettings) -> dict[str, Any]:
    return _without(item.model_dump(mode="json"), "path", "test", "images")


def mixture_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that determine the rows and their tokens."""
    mixture = _without(recipe.mixture.model_dump(mode="json"), "folder", "path", "test", "datasets", "added")
    mixture["images"] = _without(mixture["images"], "folder")
    if recipe.mixture.datasets is not None:
        mixture["datasets"] = [_dataset(item) for item in recipe.mixture.datasets]
    if recipe.mixture.added:
        mixture["added"] = [_dataset(item) for item in recipe.mixture.added]
    return {
        "mixture": mixture,
        "model": {"max_pixels": recipe.model.max_pixels},
        "train": {"max_length": recipe.train.max_length},
        "evaluate": {"kept": [_dataset(item) for item in recipe.evaluate.kept]},
        "seed": recipe.seed,
    }


def mixture_stage(recipe: Recipe, run: Path, *, tokenizer: str, sources: Mapping[str, str]) -> Stage:
    """Rows → tokens.

    Args:
        recipe: The recipe.
        run: The run folder.
        tokenizer: :attr:`merit.hf.base.Base.input_fingerprint`.
        sources: Content of every dataset's source files, by dataset name.
    """
    inputs = {"tokenizer": tokenizer, **{f"{SOURCE}{name}": value for name, value in sources.items()}}
    return Stage("mixture", run / "mixture", mixture_settings(recipe), inputs)


def _model(recipe: Recipe) -> dict[str, Any]:
    block = recipe.model.model_dump(mode="json")
    names = ("base", "revision", "max_pixels", "chat_template", "trust_remote_code")
    return _without(block, *names, *(() if recipe.model.trainable == "lora" else ("lora",)))


def _rows_of(rows: Mapping[str, str]) -> dict[str, str]:
    return {f"{ROWS}{name}": value for name, value in rows.items()}


def conflict_stage(recipe: Recipe, run: Path, *, base: str, rows: Mapping[str, str]) -> Stage:
    """Gradients and geometry at the base; ``rows`` are the fingerprints of the encoded training rows by dataset."""
    conflict = _without(recipe.conflict.model_dump(mode="json"), "batch_tokens", "cache")
    if conflict["representation"] != "sketch":
        del conflict["sketch_size"]
    if conflict["representation"] != "stride":
        del conflict["stride"]
    if conflict["examples"] != "auto":
        conflict = _without(conflict, "target_reliability", "max_examples")
    settings = {"conflict": conflict, "model": _model(recipe), "seed": recipe.seed}
    return Stage("gradients", run / "conflict", settings, {"base": base, **_rows_of(rows)})


def split_stage(recipe: Recipe, scope: Scope, *, rows: Mapping[str, str], geometry: str | None) -> Stage:
    """Groups of datasets. ``geometry`` is the content of the gradients' geometry; None if no gradients are used."""
    settings: dict[str, Any] = {"split": recipe.split.model_dump(mode="json")}
    if recipe.split.method == "joint":
        settings["split"] = {"method": "joint"}
    if recipe.split.groups is None:
        settings["split"].pop("groups", None)
    if recipe.split.method in ("random", "kmeans"):
        settings["seed"] = recipe.seed
    inputs = _rows_of(rows) | ({} if geometry is None else {"conflict": geometry})
    return Stage("split", scope.root / "split", settings, inputs, scope.name("split"))


def training_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that determine a branch's weights, apart from its group."""
    train = recipe.train.model_copy(update={"rounds": recipe.rounds})
    return {"train": train.deciding(), "model": recipe.model.deciding(), "seed": recipe.seed}


def branch_stage(
    recipe: Recipe, scope: Scope, k: int, group: Sequence[str], *, base: str, rows: Mapping[str, str]
) -> Stage:
    """Branch ``k``: fine-tuning on ``group`` only; it does not depend on other groups."""
    settings = {**training_settings(recipe), "group": sorted(group)}
    inputs = {"base": base, **_rows_of({name: rows[name] for name in sorted(group)})}
    return Stage("branch", scope.root / "branches" / str(k), settings, inputs, scope.name(f"branch {k}"))


def round_stage(recipe: Recipe, scope: Scope, number: int, *, start: str, branches: Mapping[int, str]) -> Stage:
    """The merge of a round that is not the last.

    Args:
        recipe: The scope's recipe.
        scope: Whose.
        number: Of the round, from 1.
        start: Content of the model that the round started from.
        branches: Content of every branch that is merged.
    """
    merge = {key: getattr(recipe.merge, key) for key in ("operator", "weights", "options")}
    outer = recipe.train.between.outer.model_dump(mode="json")
    settings = {"merge": merge, "outer": outer, "round": number, "rounds": recipe.rounds}
    inputs = {"start": start, **{f"{BRANCH}{k}": content for k, content in branches.items()}}
    folder = scope.root / "rounds" / str(number) / "merged"
    return Stage("round", folder, settings, inputs, scope.name(f"round {number} merged"))


def merged_stage(
    recipe: Recipe, scope: Scope, branches: Mapping[int, Stage], *, base: str, excluded: Sequence[int] = ()
) -> Stage:
    """The merge of ``branches``; ``excluded`` are the run's other branches, left out."""
    merge = recipe.merge.model_dump(mode="json")
    if merge["scale"] != "auto":
        merge = _without(merge, "scales", "rule")
    if merge["weights"] != "auto":
        del merge["search"]
    settings = {"merge": merge, "excluded": sorted(excluded)}
    if merge["scale"] == "auto" and merge["weights"] != "auto" and scope.reports_half(recipe):
        settings["rows"] = "choosing half"
    inputs = {"base": base, **{f"{BRANCH}{k}": model_content(stage) for k, stage in branches.items()}}
    if recipe.merge.operator in MOMENTS:
        file = f"{SECOND_MOMENTS}.safetensors"
        found = {k: stage.record().outputs.get(file) for k, stage in branches.items()}
        inputs |= {f"second moments of {BRANCH}{k}": facts.xxh3 for k, facts in found.items() if facts is not None}
    return Stage("merged", scope.root / "merged", settings, inputs, scope.name("merged"))


def merged_as_made(recipe: Recipe, scope: Scope, branches: Mapping[int, Stage], *, base: str) -> Stage:
    """:func:`merged_stage` for the branches that an existing merge recorded, of the run's ``branches``."""
    taken = {k: branch for k, branch in branches.items() if k not in left_out(scope)}
    return merged_stage(recipe, scope, taken, base=base, excluded=left_out(scope))


def left_out(scope: Scope) -> list[int]:
    """Numbers of the branches that a scope's merge left out; none if there is no merge."""
    stage = Stage("merged", scope.root / "merged")
    return [int(k) for k in stage.record().settings.get("excluded", [])] if stage.begun else []


def model_content(stage: Stage) -> str:
    """Content of the model written by a finished stage (weights, config, tokenizer; not its card)."""
    return str(stage.record().facts["model_fingerprint"])


def evaluation_stage(recipe: Recipe, run: Path, models: Mapping[str, str]) -> Stage:
    """Figures of every model in ``models`` (name → content) on held-out rows."""
    evaluate = _without(
        recipe.evaluate.model_dump(mode="json"),
        "kept",
        "kept_folder",
        "unseen_folder",
        "batch_tokens",
        "suites",
        "harness",
    )
    outputs = Stage("mixture", run / "mixture").record().outputs
    rows = {name: facts.xxh3 for name, facts in outputs.items() if name.startswith(HELD_OUT)}
    settings = {"evaluate": evaluate, "model": {"dtype": recipe.model.dtype}, "seed": recipe.seed}
    if recipe.merge.weights == "auto":  # the other half of the rows chose the weights
        settings["rows"] = "reporting half"
    return Stage("evaluation", run / "evaluation", settings, {**models, "held-out rows": fingerprint(rows)})


def suites_stage(recipe: Recipe, run: Path, name: str, inputs: Mapping[str, str]) -> Stage:
    """One model's scores on benchmark suites."""
    harness = recipe.evaluate.harness.model_dump(mode="json", exclude={"lmms_python", "judge_url"})
    suites = [Path(suite).name for suite in recipe.evaluate.suites]  # own tasks are files: their content is an input
    settings = {"suites": suites, "harness": harness, "dtype": recipe.model.dtype}
    return Stage("suites", run / "suites" / name, settings, inputs, f"suites of {name}")


def diagnostic_stage(recipe: Recipe, run: Path, name: str, inputs: Mapping[str, str]) -> Stage:
    """One diagnostic; ``inputs`` are the content of models, rows, split and geometry."""
    diagnose = _without(recipe.diagnose.model_dump(mode="json"), "batch_tokens")
    settings = {"diagnose": diagnose, "model": _model(recipe), "seed": recipe.seed}
    return Stage("diagnostic", run / "diagnostics" / name, settings, inputs, f"diagnostic {name}")


def probe_stage(recipe: Recipe, run: Path, inputs: Mapping[str, str]) -> Stage:
    """The pre-flight of a recipe; ``inputs`` are the content of base, rows and split."""
    stage = diagnostic_stage(recipe, run, "probe", inputs)
    return Stage(stage.kind, stage.path, {**stage.settings, "train": recipe.train.deciding()}, inputs, stage.title)


def deciding_changes(old: Recipe, new: Recipe, run: Path) -> list[str]:
    """Settings that decide rows, gradients, split, branches or merge and differ, as ``a.b: old -> new``."""

    def settings(recipe: Recipe) -> list[Mapping[str, Any]]:
        scope = Scope(run)
        stages = (
            mixture_stage(recipe, run, tokenizer="", sources={}),
            conflict_stage(recipe, run, base="", rows={}),
            split_stage(recipe, scope, rows={}, geometry=None),
            branch_stage(recipe, scope, 0, (), base="", rows={}),
            merged_stage(recipe, scope, {}, base=""),
        )
        return [stage.settings for stage in stages]

    pairs = zip(settings(old), settings(new), strict=True)
    return sorted({line for one, other in pairs for line in differences(one, other)})


# ---- making the base ------------------------------------------------------------------------------------------------


def assemble_stage(recipe: Recipe, folder: Path, content: Mapping[str, str]) -> Stage:
    """The joining of two checkpoints; ``content`` are their fingerprints."""
    assert recipe.prepare is not None
    assert recipe.prepare.assemble is not None
    settings = {"projector": recipe.prepare.assemble.projector, "seed": recipe.seed}
    return Stage("assemble", folder, settings, content)


def prepared_stage(
    recipe: Recipe, run: Path, stages: Sequence[tuple[PreparationStageSettings, Recipe]], model: str | None = None
) -> Stage:
    """The prepared base: the last step's model under its final name. ``stages`` come with their recipes."""
    assert recipe.prepare is not None
    settings: dict[str, Any] = {"seed": recipe.seed}
    if recipe.prepare.assemble is not None:
        settings["assemble"] = {"projector": recipe.prepare.assemble.projector}
    for place, (stage, inner) in enumerate(stages, start=1):
        settings[f"stage {place}"] = {"name": stage.name, **mixture_settings(inner), **training_settings(inner)}
    return Stage("prepared", run / "prepared", settings, {} if model is None else {"model": model})
