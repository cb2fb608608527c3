"""Branches that other people's tools train: the rows and a config for the tool, and its checkpoint taken back.

The rows are handed over as token ids with their targets, so the tool trains on exactly what MERIT would: the same template,
the same cuts, loss on answers only, the same budget. Optimizer, order and arithmetic are the tool's own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from merit.errors import CheckpointError, MergeError, RecipeError, RunFolderError
from merit.files import building, differences, publish, read_json, require_space, scratch, write_text, writing
from merit.hf import checkpoint
from merit.hf.side_files import copy_files, input_files
from merit.launch.tools import TOOLS
from merit.launch.tools.job import ToolJob
from merit.merge import Branch, merge_branches
from merit.mixture import Datasets, load_split
from merit.recipe.schema import MergeSettings, Recipe
from merit.run.branches import BranchId, scope_of, stage_of
from merit.run.exporting import Export, manifest_of, refuse_full
from merit.run.manifest import Manifest
from merit.run.record import shown
from merit.run.session import Session
from merit.train.result import BranchResult

OUTPUT = "output"
"""Where the tool writes its model, inside the exported folder."""


def export_for_tool(session: Session, branch: BranchId, folder: Path, tool: str) -> Export:
    """Write a branch's rows and a ready config for another trainer into a new folder.

    Raises:
        RecipeError: There is no such tool, or it cannot train this branch as the recipe says.
        RunFolderError: ``folder`` is not empty.
    """
    if tool not in TOOLS:
        raise RecipeError(f"--format {tool}: expected merit, {', '.join(TOOLS)}.")
    refuse_full(folder)
    recipe = session.recipe_of(scope_of(session, branch))
    _check(session, recipe, tool)
    trainer = TOOLS[tool]
    manifest = replace(manifest_of(session, branch), tool=tool, data="data")
    rows = load_split(session.run / "mixture", "train").only(manifest.group)
    require_space(folder, 24 * manifest.tokens, f"branch {branch}")
    title = f"{recipe.name}, branch {branch}"
    base = str(session.base.folder.resolve())
    job = ToolJob(title, base, recipe.train, recipe.model, recipe.seed, manifest.samples)
    files = trainer.files(job)
    with building(folder) as place:
        manifest.save(place)
        if trainer.data == "jsonl":
            with writing(place / "data" / "train.jsonl") as out:
                out.writelines((json.dumps(row) + "\n").encode() for row in _rows(rows))
        else:
            DatasetDict({"train": Dataset.from_list(list(_rows(rows)))}).save_to_disk(str(place / "data"))
        for name, text in files.items():
            write_text(place / name, text)
        write_text(place / "README.md", _readme(manifest, title, tool))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Export(folder, manifest, size, False)


def _check(session: Session, recipe: Recipe, tool: str) -> None:
    if session.base.family is not None:
        raise RecipeError(
            f"--format {tool}: rows with images are not written for other tools.", "Export it without --format."
        )
    if recipe.model.trainable not in ("all", "language", "lora"):
        raise RecipeError(
            f"--format {tool}: model.trainable: {recipe.model.trainable} is not written for other tools; all, language "
            "and lora are.",
            "Export it without --format.",
        )
    for key, value, plain in (
        ("scheduler: finch", recipe.train.scheduler == "finch", "another scheduler"),
        (f"balancing: {recipe.train.balancing}", recipe.train.balancing != "none", "balancing: none"),
        ("momentum", recipe.train.optimizer == "sgd" and recipe.train.momentum > 0, "momentum: 0"),
        ("save_second_moments: true", recipe.train.save_second_moments, "save_second_moments: false"),
    ):
        if value:
            raise RecipeError(
                f"--format {tool}: train.{key} is not written for other tools.",
                f"Export it without --format, or train with {plain}.",
            )


def _rows(rows: Datasets) -> Iterator[dict[str, list[int]]]:
    for dataset in rows.values():
        for row in dataset:
            ids = row.input_ids.tolist()
            labels = [token if target else -100 for token, target in zip(ids, row.targets.tolist(), strict=True)]
            yield {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _readme(manifest: Manifest, title: str, tool: str) -> str:
    trainer = TOOLS[tool]
    return f"""# {title}, for {trainer.name}

{manifest.samples:,} rows of {len(manifest.group)} datasets ({manifest.tokens:,} tokens, {manifest.target_tokens:,} in the
loss), tokenized with the base's tokenizer and chat template; labels are -100 outside the answers. Train
{manifest.epochs:g} passes:

    {trainer.command}

The base is `{manifest.base_path}` (hash `{manifest.base[:16]}…`). Change its path in the config where it lies elsewhere;
optimizer, order of rows and arithmetic are {trainer.name}'s own. The config follows {trainer.source}.

Afterwards, where the run is: `merit branch import RUN {"FOLDER"}`. It reads `{OUTPUT}/` (a checkpoint or a LoRA adapter;
`--checkpoint DIR` for another place), checks it against the base, and takes the number of trained tokens from the trainer's
`trainer_state.json`, or from `--tokens N`.
"""


# ---- back -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trained:
    tokens: int
    steps: int
    loss: float | None
    told_by: str


def import_foreign(
    session: Session, folder: Path, manifest: Manifest, made: Path | None = None, tokens: int | None = None
) -> BranchId:
    """Take a tool's checkpoint or adapter into the run.

    Args:
        session: The command's session; the run is split already.
        folder: What :func:`export_for_tool` wrote.
        manifest: Its manifest.
        made: Where the tool's model is. Default: ``folder/output``.
        tokens: Tokens really trained on. Default: by the trainer's own state.

    Raises:
        RunFolderError: It was exported from another run or recipe, or the branch is trained already.
        MergeError: It has other tensors or shapes than the base, or a kind of adapter that cannot be merged.
        CheckpointError: There is no model.
        RecipeError: The number of tokens is neither given nor known.
    """
    branch = BranchId.parse(manifest.branch)
    stage = stage_of(session, branch)
    now = manifest_of(session, branch)
    if manifest.answer != now.answer:
        old = {"base": manifest.base, "rows": dict(manifest.rows), "settings": dict(manifest.settings)}
        new = {"base": now.base, "rows": dict(now.rows), "settings": dict(now.settings)}
        raise RunFolderError(
            f"{folder}: this branch {branch} does not belong to the run; it was exported with (there -> here):",
            *shown(differences(old, new)),
            "Export it again from this run. Nothing was changed.",
        )
    if stage.begun and not session.redo:
        raise RunFolderError(
            f"{stage.path}: branch {branch} is trained already.",
            "Keep it, or replace it with --redo. Nothing was changed.",
        )
    source = made or folder / OUTPUT
    if not source.is_dir():
        raise CheckpointError(
            f"{source} does not exist: {TOOLS[manifest.tool].name} has not written its model there.",
            f"Train it ({TOOLS[manifest.tool].command}), or say where the model is: --checkpoint DIR.",
        )
    trained = _trained(source, manifest, tokens)
    with scratch(stage.path.parent / f"import-{branch.k}") as place:
        _convert(session, source, place / "model", manifest)  # before anything in the run is touched
        with stage.writing(session.recipe.seed) as record:
            publish(place / "model", stage.path / "model")
            result = _result(stage.path, manifest, trained)
            result.save(stage.path)
            manifest.save(stage.path)
            record |= result.facts()
            record |= {"merit": manifest.merit, "trained_by": manifest.tool, "tokens_told_by": trained.told_by}
            record["model_fingerprint"] = checkpoint.fingerprint(stage.path / "model")
    session.reporter.stage(
        "import", f"branch {branch} by {TOOLS[manifest.tool].name}: {trained.tokens:,} tokens ({trained.told_by})"
    )
    for warning in result.warnings:
        session.reporter.note(warning)
    return branch


def _trained(source: Path, manifest: Manifest, tokens: int | None) -> _Trained:
    state: dict[str, Any] = {}
    places = sorted(source.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in (source, *places):
        if (path / "trainer_state.json").is_file():
            state = dict(read_json(path / "trainer_state.json"))
            break
    steps = int(state.get("global_step") or 0)
    losses = [row["loss"] for row in state.get("log_history", ()) if isinstance(row.get("loss"), int | float)]
    loss = float(losses[-1]) if losses else None
    if tokens is not None:
        return _Trained(tokens, steps, loss, "--tokens")
    if not isinstance(state.get("epoch"), int | float):
        raise RecipeError(
            f"{source}: there is no trainer_state.json, so the number of tokens that it was trained on is not known.",
            f"Give it: --tokens N (one pass of this branch has {manifest.tokens:,}; its weight in the merge follows it).",
        )
    return _Trained(round(manifest.tokens * float(state["epoch"])), steps, loss, "trainer_state.json")


def _convert(session: Session, source: Path, target: Path, manifest: Manifest) -> None:
    """The tool's model as one of this run: an adapter as it is where the run has adapters, else a full checkpoint.

    A full checkpoint is written in the base's dtypes with the base's own side files, as every branch is; names, shapes and
    config are compared with the base on the way.
    """
    base, name = session.base, f"the {TOOLS[manifest.tool].name} checkpoint"
    adapter, wanted = (source / "adapter_config.json").is_file(), session.recipe.model.trainable == "lora"
    if wanted and not adapter:
        raise MergeError(
            f"{source} is a full checkpoint, but this run trains LoRA adapters (model.trainable: lora).",
            "Branches are merged in one form: give the adapter. Nothing was changed.",
        )
    settings = MergeSettings(dtype="base")
    merge_branches(base, [Branch(source, 1, name)], target, settings)
    if adapter and wanted:
        shutil.rmtree(target)  # it was made to check the adapter in full
        files = [path for path in source.iterdir() if path.name.startswith("adapter_") and path.suffix != ".bin"]
        copy_files({path.name: path for path in files} | input_files(base.folder), target)
    for extra in ("README.md", "merge.json"):
        (target / extra).unlink(missing_ok=True)


def _result(folder: Path, manifest: Manifest, trained: _Trained) -> BranchResult:
    share = trained.tokens / max(1, manifest.tokens)
    warnings: tuple[str, ...] = ()
    if abs(share - manifest.epochs) > 0.01 * manifest.epochs:
        warnings = (
            f"branch {manifest.branch}: {TOOLS[manifest.tool].name} trained {share:.2f} passes, not {manifest.epochs:g}; "
            "its weight in the merge follows the tokens really trained",
        )
    return BranchResult(
        folder=folder,
        target_tokens=round(manifest.target_tokens * share),
        tokens=trained.tokens,
        samples=round(manifest.samples * share),
        steps=trained.steps,
        epochs=share,
        rows=manifest.samples,
        seconds=0.0,
        peak_memory_bytes=0,
        final_loss=trained.loss,
        threads=0,
        processes=0,
        device=TOOLS[manifest.tool].name,
        warnings=warnings,
    )
