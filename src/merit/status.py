"""What is done in a run folder: read from records alone, so it is quick and changes nothing.

A stage is *done* (its record matches the recipe), *stale* (made with other settings, or from inputs that changed since),
*running* (a live process holds it), *partial* (begun, to be gone on from) or *missing*. Hashes of big files are not
computed again here; `merit run` does that.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from merit import stages
from merit.errors import RunFolderError
from merit.progress import duration, size
from merit.recipe import Recipe
from merit.run_folder import Stage, differences, is_locked, read_json


def run_status(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """State of every stage.

    Returns:
        ``{run, name, running, stages: [{stage, state, changed, seconds, finished, bytes, detail}]}``.
    """
    rows = [_row("mixture", folder / "mixture", lambda: stages.mixture_stage(recipe, folder, tokenizer="", sources=""))]
    rows.append(_row("gradients", folder / "conflict", lambda: stages.conflict_stage(recipe, folder, base="")))
    for method in [None, *recipe.baselines]:
        chosen = recipe
        if method:
            split = recipe.split.model_copy(update={"method": method})
            chosen = recipe.model_copy(update={"split": split, "baselines": []})
        root = folder / "baselines" / method if method else folder
        rows += _branch_rows(folder, root, chosen, f"{method} " if method else "")
    rows.append(_row("evaluation", folder / "evaluation", lambda: stages.evaluation_stage(recipe, folder, {})))
    return {"run": str(folder), "name": recipe.name, "running": is_locked(folder), "stages": rows}


def _branch_rows(folder: Path, root: Path, recipe: Recipe, prefix: str) -> list[dict[str, Any]]:
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
                lambda k=k, group=group: stages.branch_stage(recipe, folder, root, k, group, base=""),
            )
        )
        branches[k] = Stage(f"branch {k}", path, {})
    if not prefix or recipe.split.method != "joint":  # a joint baseline's branch is its model
        rows.append(
            _row(f"{prefix}merged", root / "merged", lambda: stages.merged_stage(recipe, root, branches, base=""))
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
        row |= {"state": "done", "seconds": facts["seconds"], "finished": facts["finished"], "detail": _detail(facts)}
        with contextlib.suppress(RunFolderError, KeyError):
            stage = wanted()
            changed = differences(facts["settings"], json.loads(json.dumps(dict(stage.settings))))
            known = {key: value for key, value in stage.inputs.items() if value and key in facts["inputs"]}
            changed += differences({key: facts["inputs"][key] for key in known}, known, "input")
            row |= {"changed": changed, "state": "stale" if changed else "done"}
    return row


def _progress(path: Path) -> str:
    try:
        facts = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        return f"step {facts['done']:,} of {facts['total']:,}"
    except (OSError, ValueError, KeyError):
        return ""


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
