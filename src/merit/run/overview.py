"""What `merit status` shows: the chain's stages, and those next to it, which no other stage depends on.

These are diagnostics and benchmark suites, listed once they are begun, and a study, all of it once its folder is there. As
everywhere in the status, records alone are read; what they cannot tell (whether a line's model has changed since) is
found out by the command that makes the stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from merit.progress import count
from merit.recipe.methods import methods_of
from merit.recipe.schema import Recipe
from merit.run import key
from merit.run.scope import StudyScope, merge_scope, recipe_of, study_scopes
from merit.run.status import Row, Status, encoded_rows, row_of, run_status, trained_rows
from merit.run.store import Stage
from merit.split.view import needs_conflict

__all__ = ["folder_status"]


def folder_status(run: Path, recipe: Recipe) -> Status:
    """State of everything in a run folder, a study's included.

    Args:
        run: The run folder.
        recipe: The recipe to compare the records with.
    """
    status = run_status(run, recipe)
    rows = status.stages
    if (run / "study").is_dir():
        if not (run / "split").is_dir():  # the recipe was studied, not run: the rest of the chain is not wanted
            rows = [row for row in rows if row.kind in ("assemble", "prepared", "mixture") or row.state != "missing"]
        rows = [*rows, *_study(run, recipe)]
    return Status(status.run, status.name, status.running, [*rows, *_suites(run), *_diagnostics(run, recipe)])


def _diagnostics(run: Path, recipe: Recipe) -> Iterator[Row]:
    for folder in _folders(run / "diagnostics"):
        stage = Stage("diagnostic", folder, title=f"diagnostic {folder.name}")
        wanted = partial(_diagnostic, recipe, run, folder.name)
        yield row_of(stage, wanted)


def _diagnostic(recipe: Recipe, run: Path, name: str) -> Stage:
    """A diagnostic as requested now, with the content of what it looked at, as far as records tell it."""
    if name == "probe":
        return key.probe_stage(recipe, run, {})
    inputs = {f"{key.ROWS}{dataset}": value for dataset, value in encoded_rows(run).items()}
    models = {f"branch-{folder.name}": folder for folder in _folders(run / "branches")}
    models |= {"merged": run / "merged", "joint": run / "baselines" / "joint" / "branches" / "0"}
    stages = {model: Stage("branch", folder) for model, folder in models.items()}
    inputs |= {model: key.model_content(stage) for model, stage in stages.items() if stage.begun}
    return key.diagnostic_stage(recipe, run, name, inputs)


def _suites(run: Path, root: str = "suites") -> Iterator[Row]:
    for folder in _folders(run / root):
        yield row_of(Stage("suites", folder, title=f"suites of {folder.name}"), None)


# ---- a study --------------------------------------------------------------------------------------------------------


def _study(run: Path, recipe: Recipe) -> Iterator[Row]:
    """What is done as it should be in few rows, the rest stage by stage."""
    encoded = encoded_rows(run)
    scopes = list(study_scopes(recipe, run))
    yield row_of(Stage("rate", run / "study" / "rate", title="study rate"), None)
    for seed in recipe.study.seeds_from(recipe.seed):
        mine = [scope for scope in scopes if scope.seed == seed]
        measured = {scope.shared: scope for scope in mine if needs_conflict(recipe_of(recipe, scope).split.method)}
        for folder, scope in measured.items():
            stage = Stage(
                "gradients", folder / "conflict", title=f"s{seed} gradients" if folder != run else "gradients"
            )
            if folder != run or not stage.path.is_dir():  # the run's own is in the chain
                wanted = partial(key.conflict_stage, recipe_of(recipe, scope), folder, base="", rows=encoded)
                yield row_of(stage, wanted)
        for scope in mine:
            rows = list(trained_rows(recipe_of(recipe, scope), scope, encoded, ""))
            yield from _together(rows, scope.name("").strip(), "branch", scope.root)
        yield from _together(list(_merges(run, recipe, seed)), f"s{seed} merges", "merge", _of(run, seed) / "merges")
        lines = [
            row_of(Stage("line", _of(run, seed) / "lines" / name, title=f"s{seed} line of {name}"), None)
            for name in _with_lines(recipe)
        ]
        yield from _together(lines, f"s{seed} lines", "line", _of(run, seed) / "lines")
    evaluation = Stage("evaluation", run / "study" / "evaluation", title="study evaluation")
    yield row_of(evaluation, lambda: key.evaluation_stage(recipe, run, {}))
    yield from _together(list(_suites(run, "study/suites")), "study suites", "model", run / "study" / "suites")


def _merges(run: Path, recipe: Recipe, seed: int) -> Iterator[Row]:
    for method in methods_of(recipe):
        if method.sources and method.merge is not None:
            scope = merge_scope(recipe, run, method, seed)
            stage = Stage("merged", scope.root / "merged", title=f"s{seed} merge {method.name}")
            # the scale of a matched method follows from the models
            wanted = None if method.matched else partial(_merge, recipe_of(recipe, scope), scope)
            yield row_of(stage, wanted)


def _merge(recipe: Recipe, scope: StudyScope) -> Stage:
    """A merge as requested now, of the branches that are there."""
    branches = [Stage("branch", folder) for source in scope.sources for folder in _folders(source.root / "branches")]
    return key.merged_as_made(recipe, scope, dict(enumerate(branches)), base="")


def _with_lines(recipe: Recipe) -> list[str]:
    """Methods whose line is measured: those that are not a point on another's."""
    methods = [method for method in methods_of(recipe) if method.sources and not method.matched]
    return [m.name for m in methods if dict(m.merge or ()).get("merge.scale", 1.0) in (1.0, "auto")]


def _together(rows: Sequence[Row], name: str, unit: str, folder: Path) -> Iterator[Row]:
    """One row if all are done; else each."""
    if not rows or any(row.state != "done" for row in rows):
        yield from rows
        return
    kind = next(row.kind for row in reversed(rows))
    detail = count(sum(row.kind == kind for row in rows), unit)
    seconds = sum(row.seconds or 0.0 for row in rows)
    finished = max(row.finished or "" for row in rows)
    yield Row(name, kind, str(folder), "done", [], seconds, finished, sum(row.bytes for row in rows), detail)


def _of(run: Path, seed: int) -> Path:
    return run / "study" / f"s{seed}"


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []
