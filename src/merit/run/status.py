"""What is done in a run folder: read from records alone, so it is quick and changes nothing.

A stage is *done* (its record matches the recipe), *stale* (made with other settings, or from an earlier stage's results that
are no longer there), *running* (a live process holds it), *partial* (begun, to be gone on from) or *missing*. Source files
and the base are not read here, so a change of theirs shows when a stage command or `merit run` meets it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merit.errors import RunFolderError
from merit.files import differences, read_json
from merit.prepare.stage import status_rows
from merit.progress import duration, size
from merit.recipe.schema import Recipe
from merit.run import key as stages
from merit.run.store import Stage, is_locked

COMMANDS = ("prepare", "mixture", "gradients", "split", "branch", "merged", "evaluation")
"""The last word of a row's name before its number, in the order of the chain."""


def rank(row: Mapping[str, Any]) -> int:
    """Place of a row's stage in the chain."""
    return next(place for place, word in enumerate(COMMANDS) if word in row["stage"].split())


def run_status(
    folder: Path, recipe: Recipe, *, base: str = "", tokenizer: str = "", sources: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """State of every stage.

    Args:
        folder: The run folder.
        recipe: The recipe to compare the records with.
        base: Content of the base, where it is known; an empty string compares without.
        tokenizer: The same of the tokenizer.
        sources: The same of every dataset's source files.

    Returns:
        ``{run, name, running, stages: [{stage, state, changed, seconds, finished, bytes, detail}]}``.
    """
    inputs: dict[str, Any] = {"tokenizer": tokenizer, "sources": sources or {}}
    rows: list[dict[str, Any]] = []
    if recipe.prepare is not None:
        rows += status_rows(recipe, folder, _row, lambda inner, stage: run_status(inner, stage)["stages"])
    rows += [_row("mixture", folder / "mixture", lambda: stages.mixture_stage(recipe, folder, **inputs))]
    rows.append(_row("gradients", folder / "conflict", lambda: stages.conflict_stage(recipe, folder, base=base)))
    for method in [None, *recipe.baselines]:
        chosen = recipe
        if method:
            split = recipe.split.model_copy(update={"method": method})
            chosen = recipe.model_copy(update={"split": split, "baselines": []})
        root = folder / "baselines" / method if method else folder
        rows += _branch_rows(folder, root, chosen, f"{method} " if method else "", base)
    rows.append(_row("evaluation", folder / "evaluation", lambda: stages.evaluation_stage(recipe, folder, {})))
    return {"run": str(folder), "name": recipe.name, "running": is_locked(folder), "stages": rows}


def _branch_rows(folder: Path, root: Path, recipe: Recipe, prefix: str, base: str) -> list[dict[str, Any]]:
    rows = [_row(f"{prefix}split", root / "split", lambda: stages.split_stage(recipe, folder, root, conflict=None))]
    groups: list[list[str]] = [[] for _ in range(recipe.group_count)]
    with contextlib.suppress(RunFolderError):
        groups = read_json(root / "split" / "split.json")["groups"]
    branches = {}
    for k, group in enumerate(groups):
        path = root / "branches" / str(k)
        rows.append(
            _row(
                f"{prefix}branch {k}",
                path,
                lambda k=k, group=group: stages.branch_stage(recipe, folder, root, k, group, base=base),
            )
        )
        branches[k] = Stage(f"branch {k}", path, {})
    if not prefix or recipe.split.method != "joint":  # a joint baseline's branch is its model
        rows.append(
            _row(f"{prefix}merged", root / "merged", lambda: stages.merged_as_made(recipe, root, branches, base=base))
        )
    return rows


def _row(name: str, path: Path, wanted: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "stage": name,
        "state": "missing",
        "changed": [],
        "seconds": None,
        "finished": None,
        "bytes": 0,
    }
    row["detail"] = ""
    if not path.is_dir():
        return row
    record = path / "record.json"
    row["bytes"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if is_locked(path):
        row["state"] = "running"
        row["detail"] = _progress(path)
    elif not record.is_file():
        row["state"] = "partial" if any(child.name != ".lock" for child in path.iterdir()) else "missing"
    else:
        facts = read_json(record)
        row |= {key: facts.get(key) for key in ("seconds", "finished")} | {"state": "done", "detail": _detail(facts)}
        with contextlib.suppress(RunFolderError, KeyError):
            stage = wanted()
            changed = differences(facts["settings"], json.loads(json.dumps(dict(stage.settings))))
            changed += _changed_inputs(facts["inputs"], stage.inputs)
            row |= {"changed": changed, "state": "stale" if changed else "done"}
    return row


def _changed_inputs(old: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Differences among the inputs that are known now; where one dataset's is known, all of them are."""
    new = {key: value for key, value in wanted.items() if value}
    families = {key.partition(" of ")[0] for key in new if " of " in key}
    held = {key: value for key, value in old.items() if key in new or key.partition(" of ")[0] in families}
    return differences(held, new, "input")


def _progress(path: Path) -> str:
    from merit.launch.local import read_progress

    facts = read_progress(path / "progress.json")
    return f"step {facts['step']:,} of {facts['steps']:,}" if facts else ""


def _detail(record: dict[str, Any]) -> str:
    if "steps" in record:
        return f"{record['steps']:,} steps, {record['target_tokens']:,} target tokens"
    return ""


def render_status(facts: dict[str, Any]) -> list[Any]:
    """The status as something that rich can print."""
    from rich.table import Table

    colours = {"done": "green", "stale": "red", "running": "cyan", "partial": "yellow", "missing": "dim"}
    state = " (running)" if facts["running"] else ""
    table = Table(
        "stage", "state", "time", "size", "", title=f"{facts['name']}: {facts['run']}{state}", title_justify="left"
    )
    for row in facts["stages"]:
        taken = duration(row["seconds"]) if row["seconds"] is not None else ""
        held = size(row["bytes"]) if row["bytes"] else ""
        what = "; ".join(row["changed"]) if row["changed"] else row["detail"]
        table.add_row(row["stage"], f"[{colours[row['state']]}]{row['state']}[/]", taken, held, what)
    return [table]


def watch_status(folder: Path, recipe: Recipe) -> None:
    """Show the status again every two seconds, until interrupted or nothing is running and all is done."""
    from rich.console import Group
    from rich.live import Live

    with Live(refresh_per_second=4, transient=False) as live:
        while True:
            facts = run_status(folder, recipe)
            live.update(Group(*render_status(facts)))
            if not facts["running"] and all(row["state"] == "done" for row in facts["stages"]):
                return
            time.sleep(2)
