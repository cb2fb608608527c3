"""Commands around the whole chain: run, demo, init, schema, check, status."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merit.cli.options import (
    AsJson,
    Jobs,
    Launch,
    Output,
    Overrides,
    Quiet,
    Redo,
    Target,
    open_session,
    open_target,
    out,
    print_json,
)
from merit.errors import RecipeError, nearest
from merit.files import write_text

if TYPE_CHECKING:
    from merit.run.session import Session


def run(
    recipe: Target,
    output: Output = None,
    until: Annotated[
        str, typer.Option(metavar="STAGE", help="Stop after prepare, mixture, gradients, split, train or merge.")
    ] = "evaluate",
    launch: Launch = None,
    jobs: Jobs = 1,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole chain in one run folder; run it again to resume.

    check → (prepare) → mixture → gradients → split → train (one branch per group) → merge → evaluate → report

    Example: `merit run recipe.yaml --jobs 2 --set train.learning_rate=2e-5`
    """
    session = open_session(recipe, output, overrides, quiet=quiet, jobs=jobs, redo=redo, launch=launch)
    from merit.run.chain import STAGES, run_chain

    if until not in STAGES:
        raise RecipeError(f"--until {until}: no such stage.{nearest(until, STAGES)} Stages: {', '.join(STAGES)}.")
    run_chain(session, until)
    finish(session)
    show_results(session, as_json=as_json)


def demo(
    output: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/demo, with --vision runs/demo-vision.")
    ] = None,
    vision: Annotated[
        bool, typer.Option("--vision", help="Use a vision-language base and a mixture with images.")
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Seed of the run: order of training, calibration sample, random split. The rows stay the same."
        ),
    ] = 0,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Branches trained in parallel. Default: one per core, at most 4.")
    ] = None,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole chain on the built-in default: a tiny base and a small mixture, offline, on two cores, in minutes.

    It trains joint, random-split and conflict-split branches at the same budget and prints how they compare.

    Example: `merit demo --output runs/demo`, or `merit demo --vision`
    """
    from merit.demo import write_demo
    from merit.recipe.load import load_recipe
    from merit.run.chain import run_chain
    from merit.run.store import claim

    name = "demo-vision" if vision else "demo"
    output = output or Path("runs") / name
    claim(output)
    recipe = output / name / "recipe.yaml"
    if not recipe.is_file() or load_recipe(recipe).seed != seed:
        write_demo(output / name, seed, vision=vision)
    jobs = jobs or max(1, min(4, os.cpu_count() or 1))
    session = open_session(recipe, output, overrides, quiet=quiet, jobs=jobs, redo=redo)
    run_chain(session)
    finish(session)
    show_results(session, as_json=as_json)


def finish(session: Session) -> None:
    """The page of a run, and its figures for the trackers that the recipe names."""
    from merit.report.page import write_page

    write_page(session.run)
    if names := session.recipe.train.report_to:
        from merit.report.page.data import read_run
        from merit.report.tracked import tracked_figures
        from merit.train.trackers import send

        data = read_run(session.run)
        settings = {"recipe": data.recipe.name, "base": data.recipe.model.base, "split": data.recipe.split.method}
        send(names, session.run / "trackers", session.run.name, tracked_figures(data), settings)


def show_results(session: Session, *, as_json: bool) -> None:
    """Results and verdict of a run, as far as it has got."""
    from merit.report.run import render, result_facts

    if as_json:
        print_json(result_facts(session.run, session.recipe))
    else:
        out(*render(session.run))


def init(
    path: Annotated[Path, typer.Argument(metavar="[FILE]", help="File to write.")] = Path("recipe.yaml"),
    vision: Annotated[bool, typer.Option("--vision", help="For a vision-language base and rows with images.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a commented starter recipe.

    Example: `merit init recipe.yaml`, `merit init --vision recipe.yaml`
    """
    if path.exists() and not force:
        raise RecipeError(
            f"{path} exists.", "Choose another name, or use --force to overwrite it. Nothing was written."
        )
    if not path.resolve().parent.is_dir():
        raise RecipeError(f"{path}: its folder does not exist.")
    starter = resources.files("merit") / ("starter_vision_recipe.yaml" if vision else "starter_recipe.yaml")
    write_text(path, starter.read_text(encoding="utf-8"))
    if as_json:
        print_json({"recipe": str(path)})
    elif not quiet:
        out(f"Wrote {path}. Next: set model.base and mixture in it, then `merit check {shlex.quote(str(path))}`.")


def schema(as_json: AsJson = True, quiet: Quiet = False) -> None:
    """Print the JSON schema of recipes, for editors and scripts.

    Example: `merit schema > recipe.schema.json`, and `# yaml-language-server: $schema=recipe.schema.json` in the recipe.
    """
    from merit.recipe.load import recipe_schema

    print_json(recipe_schema())


def check(
    recipe: Target,
    output: Output = None,
    offline: Annotated[
        bool, typer.Option(help="Use only what is on this machine: names, fields, plan, memory and disk.")
    ] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Like --offline, but ask the hub whether its ids exist.")] = False,
    images: Annotated[
        bool,
        typer.Option("--images", help="Also decode every image of every dataset, and list those that cannot be used."),
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Validate everything that can be validated before the first expensive step, and print the plan. Trains nothing.

    Hub ids are looked up before anything is downloaded; what the check reads (base, data) is downloaded as for a run.

    Example: `merit check recipe.yaml`, and `merit check recipe.yaml --images` before a long run on images
    """
    session = open_session(recipe, output, overrides, quiet=quiet)  # first: a recipe's error needs no ML library
    from merit.hf.hub import resolve_ids
    from merit.report import images as image_report
    from merit.report import plan as report
    from merit.run.check import check_images, make_plan

    found = check_images(session, offline=offline) if images else None
    if found is not None and not as_json:
        out(*image_report.render(found))
    if found is not None and found.fatal:
        if as_json:
            print_json({"images": found.facts()})
        raise typer.Exit(2)
    notes = resolve_ids(session.given) if ids or not offline else []
    plan = make_plan(session, offline=offline or ids)
    plan = replace(plan, notes=(*notes, *plan.notes))
    if as_json:
        print_json(plan.facts() | ({"images": found.facts()} if found else {}))
    else:
        out(*report.render(plan))


def status(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN|STUDY", help="A run folder or its study/ folder.")],
    watch: Annotated[bool, typer.Option(help="Refresh every two seconds until interrupted.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what is done, stale, running or missing in a run or a study, with sizes and times.

    Example: `merit status runs/my-run --watch`
    """
    from merit.report import status as report
    from merit.run.overview import folder_status

    if (run_folder / "study.json").is_file():
        run_folder = run_folder.resolve().parent
    if not run_folder.is_dir():
        raise RecipeError(f"{run_folder} is not a run folder.", "Give the folder that `merit run` wrote (runs/<name>).")
    recipe, folder = open_target(run_folder, None, overrides)
    if as_json:
        print_json(folder_status(folder, recipe).facts())
    elif watch:
        report.watch(lambda: folder_status(folder, recipe))
    elif not quiet:
        out(*report.render(folder_status(folder, recipe)))


COMMANDS = (demo, init, check, run)
