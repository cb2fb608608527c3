"""Options that several commands share, and what a command opens: recipe, run folder, session."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merit.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from merit.recipe.schema import Recipe
    from merit.run.session import Session

Target = Annotated[
    Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe (YAML file), or the folder of an existing run.")
]
Output = Annotated[
    Path | None, typer.Option("--output", help="Run folder. Default: runs/NAME, after the recipe's name.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a recipe key; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Parallel processes (at most one per core or GPU).")]
Redo = Annotated[
    bool, typer.Option("--redo", help="Rerun stages that no longer match the recipe, instead of stopping.")
]

Launch = Annotated[
    str | None,
    typer.Option(help="Where branches run: local (this machine), ray, slurm or detached. Default: the recipe's."),
]


def open_target(target: Path, output: Path | None, overrides: list[str] | None) -> tuple[Recipe, Path]:
    """Recipe and run folder for a RECIPE or RUN argument.

    Raises:
        RecipeError: It is neither, or --output conflicts with it.
    """
    from merit.recipe.load import load_recipe
    from merit.run.store import is_run_folder

    recipe_file = target / "recipe.yaml" if target.is_dir() else target
    if target.is_dir() and not (recipe_file.is_file() and is_run_folder(target)):
        raise RecipeError(
            f"{target} is a folder, but not a run folder (a run folder has recipe.yaml and the results of `merit run`).",
            "Give a recipe file, or the folder of a run started with one.",
        )
    recipe = load_recipe(recipe_file, overrides or ())
    if not target.is_dir():
        return recipe, output or Path("runs") / recipe.name
    if output is not None and output.resolve() != target.resolve():
        raise RecipeError(
            f"--output {output} cannot be combined with a run folder ({target}); give the recipe file instead."
        )
    return recipe, target


def open_session(
    target: Path,
    output: Path | None,
    overrides: list[str] | None,
    *,
    quiet: bool = False,
    jobs: int = 1,
    redo: bool = False,
    launch: str | None = None,
) -> Session:
    """The session of a command; library telemetry and tokenizer threads (which clash with worker processes) are off."""
    from merit.recipe.load import refuse_placeholders

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    where = [] if launch is None else [f"launch.where={launch}"]
    recipe, run = open_target(target, output, [*(overrides or ()), *where])
    refuse_placeholders(recipe)
    from merit.report.terminal import Terminal
    from merit.run.session import Session

    return Session(recipe, run, Terminal(quiet), jobs=max(1, jobs), redo=redo)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def out(*renderables: RenderableType) -> None:
    """Results on stdout."""
    from merit.report.terminal import Output as Console

    console = Console(highlight=False)
    for item in renderables:
        console.print(item, soft_wrap=isinstance(item, str))  # a command to copy stays on one line
