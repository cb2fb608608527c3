"""The command that compares methods over seeds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from merit.cli.options import AsJson, Jobs, Output, Overrides, Quiet, Redo, Target, open_session, out, print_json
from merit.errors import RecipeError

if TYPE_CHECKING:
    from merit.study.cost import Cost


def study(
    recipe: Target,
    output: Output = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start without asking.")] = False,
    jobs: Jobs = 1,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Methods × seeds on one mixture and base: is splitting and merging better than joint training here?

    The recipe's `study` block says which methods and seeds; without one, six methods and five seeds. Everything that
    methods share is done once. The cost is shown first. Run it again to resume.

    Example: `merit study recipe.yaml --set study.seeds=3 --jobs 2`
    """
    from merit.report.page import write_page
    from merit.report.study import cost_tables, facts, render, write
    from merit.study.stage import run_study

    session = open_session(recipe, output, overrides, quiet=quiet, jobs=jobs, redo=redo)

    def agree(cost: Cost) -> bool:
        if not as_json:
            out(*cost_tables(cost))
        if yes:
            return True
        if not sys.stdin.isatty():
            raise RecipeError(
                "the study's cost is to be agreed to, and there is no terminal to ask.", "Add --yes to start."
            )
        return typer.confirm("Start?", err=True)

    result = run_study(session, agree)
    if result is None:
        return
    folder = session.run / "study"
    write(result, folder, session.reporter.note)
    written = write_page(session.run)
    if as_json:
        print_json(facts(result, folder))
    else:
        out(*render(result), f"Tables and plots: {folder}", f"Report: {written.path}")
