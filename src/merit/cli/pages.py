"""Commands for people to look at a finished run: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merit.cli.options import AsJson, Quiet, out, print_json
from merit.errors import RecipeError


def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    output: Annotated[Path | None, typer.Option(help="File to write. Default: report.html in the run folder.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a run as one self-contained HTML page: verdict, conflicts, groups, training, merge, evaluation, provenance.

    The page loads nothing from elsewhere; every figure saves as SVG and PNG, every table as CSV. `merit run` writes it too.

    Example: `merit report runs/my-run`, or `merit report runs/my-run --output my-run.html`
    """
    from merit.report.page import write_page
    from merit.run.store import is_run_folder

    if not (run_folder.is_dir() and is_run_folder(run_folder) and (run_folder / "recipe.yaml").is_file()):
        raise RecipeError(f"{run_folder} is not a run folder.", "Give the folder that `merit run` wrote (runs/<name>).")
    if output is not None and not output.resolve().parent.is_dir():
        raise RecipeError(f"--output {output}: its folder does not exist.")
    written = write_page(run_folder, output)
    if as_json:
        print_json({"report": str(written.path), "bytes": written.bytes})
    elif not quiet:
        out(f"Report: {written.path}")


COMMANDS = (report,)
