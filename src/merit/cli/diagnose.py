"""The command `merit diagnose`: of a run, of any base and checkpoints, or of a recipe before it is trained."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merit.cli.options import AsJson, Output, Overrides, Quiet, Redo, open_session, out, print_json
from merit.errors import RecipeError, install_hint

if TYPE_CHECKING:
    from merit.diagnostics.result import Diagnosis


def diagnose(
    target: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN|RECIPE]", help="A run whose branches are trained; omit it with --base."),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Pre-flight of a recipe: a few dozen steps per group, before it is trained.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="This diagnostic only; may be repeated.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Outside a run: folder or hub id of the base.")] = None,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option("--checkpoint", metavar="DIR[=WEIGHT]", help="Outside a run: one model trained from the base."),
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Outside a run: a file of rows, or a folder with a sub-folder per dataset.")
    ] = None,
    trainable: Annotated[
        str, typer.Option(help="Outside a run: the weights that may move, as model.trainable.")
    ] = "language",
    figures: Annotated[
        Path | None,
        typer.Option(help="Folder for the figures. Default: RUN/diagnostics; outside a run, none are drawn."),
    ] = None,
    output: Output = None,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Look at whether the base was ready to be merged on: one verdict per diagnostic, with figures.

    Examples: `merit diagnose runs/my-run`, `merit diagnose --probe recipe.yaml`,
    `merit diagnose --base BASE --checkpoint A --checkpoint B --rows data/`
    """
    from merit.report.diagnose import render, render_probe

    if probe:
        if target is None or only or base or checkpoints or rows:
            raise RecipeError("diagnose --probe: give a recipe and no other models (diagnose --probe recipe.yaml).")
        from merit.run.diagnose_command import probe_alone

        forecast = probe_alone(open_session(target, output, overrides, quiet=quiet, redo=redo))
        if as_json:
            print_json(json.loads(json.dumps(forecast.facts())))
        else:
            out(*render_probe(forecast))
        return

    if target is None:
        from merit.report.terminal import Terminal
        from merit.run.diagnose_checkpoints import Checkpoints, diagnose_checkpoints

        if overrides or redo or output:
            raise RecipeError("diagnose: --set, --redo and --output need a recipe or run folder.")
        given = Checkpoints.parse(base, checkpoints or [], rows, trainable)
        found = diagnose_checkpoints(Terminal(quiet), given, only or [])
    else:
        if base or checkpoints or rows:
            raise RecipeError("diagnose: give either a run folder, or --base, --checkpoint and --rows; not both.")
        from merit.run.diagnose_command import diagnose_alone

        found = diagnose_alone(open_session(target, output, overrides, quiet=quiet, redo=redo), only or [])
    place = figures or found.folder
    drawn = _draw(found.results, place) if place is not None else ""
    if as_json:
        print_json(json.loads(json.dumps(found.facts())))
        return
    out(*render(found.results, found.left_out))
    if drawn and not quiet:
        out(drawn)


def _draw(results: Mapping[str, Diagnosis], place: Path) -> str:
    """Draw the figures; where they are, or what is missing for them."""
    if importlib.util.find_spec("matplotlib") is None:
        from rich.markup import escape

        return (
            "No figures: they are drawn by matplotlib, which is not installed. Install it "
            f"({escape(install_hint('plots'))}) and run the same command again; a "
            "run's diagnostics are not measured anew for it."
        )
    from merit.report.figures import draw_all

    return draw_all(results, place)


COMMANDS = (diagnose,)
