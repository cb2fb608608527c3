"""The command line: one command per stage. Each parses, makes one call and prints.

Exit codes: 0 done; 1 our bug, with its traceback; 2 something that the user can fix, in one message on stderr; 75
interrupted, run the same command again to go on. ML libraries are imported inside commands, so that --help is quick.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from merit import __version__
from merit.errors import Interrupted, MeritError, RecipeError
from merit.signals import Stop, ignore_from_now_on, stop_on_sigterm

_PLACES = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}


def _closed_pipe(error: OSError) -> int:
    """Code 0 where the reader of our output (such as head) has seen enough; anything else is raised on."""
    if not isinstance(error, BrokenPipeError):
        raise error
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Commands(TyperGroup):
    """Turns the error tree into messages and exit codes; usage errors are Typer's own."""

    def invoke(self, ctx: Any) -> Any:
        stop_on_sigterm()
        try:
            return super().invoke(ctx)
        except MeritError as error:
            print(f"merit: {error}", file=sys.stderr)
            if isinstance(error, Interrupted):
                print("Run the same command again to go on.", file=sys.stderr)
            code = error.exit_code
        except KeyboardInterrupt as error:
            print(f"merit: {str(error) or 'interrupted'}. Run the same command again to go on.", file=sys.stderr)
            code = Interrupted.exit_code
        except OSError as error:
            if isinstance(error, BrokenPipeError) or error.errno not in _PLACES:
                code = _closed_pipe(error)
            else:
                where = f"{error.filename}: " if error.filename else ""
                print(f"merit: {where}{error.strerror}.", file=sys.stderr)
                print("  Check the place's permissions and free space, or use another (--output DIR).", file=sys.stderr)
                code = 2
        raise typer.Exit(code)


app = typer.Typer(
    name="merit",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Fine-tune on a heterogeneous instruction mixture without a coupled cluster: measure how the datasets' gradients "
    "conflict at a shared base, split the mixture along the main conflict axes, train one branch per group without any "
    "contact, and merge the branches once.\n\n"
    "Start with `merit demo`, or `merit init` and then `merit run recipe.yaml`.",
)

# ---- options that several commands share ----------------------------------------------------------------------------

Target = Annotated[
    Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe (YAML file), or the folder of a run that was begun.")
]
Output = Annotated[
    Path | None, typer.Option("--output", help="Run folder. Default: runs/NAME, after the recipe's name.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a recipe key; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Processes side by side (at most one per core or GPU).")]
Redo = Annotated[
    bool, typer.Option("--redo", help="Make stages again that no longer match the recipe, in place of stopping.")
]


def _open(target: Path, output: Path | None, overrides: list[str] | None) -> tuple[Any, Path]:
    """Recipe and run folder for a RECIPE or RUN argument."""
    from merit.recipe.load import load_recipe
    from merit.run.store import is_run_folder

    recipe_file = target / "recipe.yaml" if target.is_dir() else target
    if target.is_dir() and not (recipe_file.is_file() and is_run_folder(target)):
        raise RecipeError(
            f"{target} is a folder, but no run folder (a run folder holds recipe.yaml and what `merit` made of it).",
            "Give a recipe file, or the folder of a run that was begun with one.",
        )
    recipe = load_recipe(recipe_file, overrides or ())
    if target.is_dir():
        if output is not None and output.resolve() != target.resolve():
            raise RecipeError(
                f"--output {output} does not go with a run folder ({target}); give the recipe file instead."
            )
        return recipe, target
    return recipe, output or Path("runs") / recipe.name


def _pipeline(
    target: Path,
    output: Path | None,
    overrides: list[str] | None,
    *,
    quiet: bool = False,
    jobs: int = 1,
    redo: bool = False,
) -> Any:
    _offline_by_default()
    from merit.report.terminal import Reporter
    from merit.run.chain import Pipeline

    recipe, run = _open(target, output, overrides)
    return Pipeline(recipe, run, Reporter(quiet), jobs=jobs, redo=redo)


def _offline_by_default() -> None:
    """No telemetry from the libraries below us, and no tokenizer threads that quarrel with worker processes."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRACKIO_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _out(*renderables: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for item in renderables:
        console.print(item)


# ---- the main job ---------------------------------------------------------------------------------------------------


@app.command()
def run(
    recipe: Target,
    output: Output = None,
    until: Annotated[
        str, typer.Option(metavar="STAGE", help="Stop after prepare, mixture, gradients, split, train or merge.")
    ] = ("evaluate"),
    launch: Annotated[str, typer.Option(help="Where branches run: local (this machine).")] = "local",
    jobs: Jobs = 1,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The whole chain in one run folder; run it again and it goes on from what is done.

    check → (prepare) → mixture → gradients → split → train (one branch per group) → merge → evaluate

    Example: `merit run recipe.yaml --jobs 2 --set train.learning_rate=2e-5`
    """
    from merit.errors import nearest
    from merit.run.chain import STAGES

    if until not in STAGES:
        raise RecipeError(f"--until {until}: no such stage.{nearest(until, STAGES)} Stages: {', '.join(STAGES)}.")
    if launch != "local":
        raise RecipeError(
            f"--launch {launch}: branches run on this machine only (local) so far.",
            "For other machines: copy the run folder and the base there, and run `merit train RUN --branch K`.",
        )
    pipeline = _pipeline(recipe, output, overrides, quiet=quiet, jobs=jobs, redo=redo)
    pipeline.run(until)
    _finish(pipeline, as_json=as_json)


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/demo, with --vision runs/demo-vision.")
    ] = None,
    vision: Annotated[
        bool, typer.Option("--vision", help="A vision-language base and a mixture with pictures.")
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Seed of the run: order of training, calibration sample, random split. The rows stay."
        ),
    ] = 0,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Branches side by side. Default: one per core, at most 4.")
    ] = None,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The main job on the embedded default: a tiny base and a small mixture, offline, on two cores, in minutes.

    It trains joint, random-split and conflict-split branches at the same budget and prints how they compare.

    Example: `merit demo --output runs/demo`, or `merit demo --vision`
    """
    from merit.demo import write_demo
    from merit.recipe.load import load_recipe
    from merit.run.store import claim

    name = "demo-vision" if vision else "demo"
    output = output or Path("runs") / name
    claim(output)
    recipe = output / name / "recipe.yaml"
    if not recipe.is_file() or load_recipe(recipe).seed != seed:
        write_demo(output / name, seed, vision=vision)
    jobs = jobs or max(1, min(4, os.cpu_count() or 1))
    pipeline = _pipeline(recipe, output, overrides, quiet=quiet, jobs=jobs, redo=redo)
    pipeline.run()
    _finish(pipeline, as_json=as_json)


def _finish(pipeline: Any, *, as_json: bool) -> None:
    """Results and verdict of a run, as far as it has come."""
    folder = pipeline.run_folder
    if as_json:
        from merit.run.status import run_status

        result: dict[str, Any] = run_status(folder, pipeline.recipe)
        for name in ("results", "kept", "drift", "summary"):
            file = folder / "evaluation" / f"{name}.json"
            if file.is_file() and (folder / "evaluation" / "record.json").is_file():
                result[name] = json.loads(file.read_text(encoding="utf-8"))
        _print_json(result)
        return
    if (folder / "evaluation" / "record.json").is_file():
        from merit.report.evaluation import render

        _out(*render(folder / "evaluation"))
    merged = folder / "merged" / "model"
    if merged.is_dir():
        _out(f"Merged model: {merged}")
    _out(f"Run folder: {folder}  (`merit status {shlex.quote(str(folder))}` shows every stage)")


# ---- before a run ---------------------------------------------------------------------------------------------------


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.yaml"),
    vision: Annotated[bool, typer.Option("--vision", help="The one for vision-language models.")] = False,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a commented starter recipe.

    Example: `merit init recipe.yaml`, `merit init --vision recipe.yaml`
    """
    from importlib import resources

    if path.exists() and not force:
        raise RecipeError(f"{path} exists.", "Give another name, or --force to replace it. Nothing was written.")
    if not path.resolve().parent.is_dir():
        raise RecipeError(f"{path}: its folder does not exist.")
    starter = resources.files("merit") / ("starter_vision_recipe.yaml" if vision else "starter_recipe.yaml")
    path.write_text(starter.read_text(encoding="utf-8"), encoding="utf-8")
    if as_json:
        _print_json({"recipe": str(path)})
    elif not quiet:
        _out(f"Wrote {path}. Next: set model.base and mixture in it, then `merit check {shlex.quote(str(path))}`.")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors and scripts.

    Example: `merit schema > recipe.schema.json`, and `# yaml-language-server: $schema=recipe.schema.json` in the recipe.
    """
    from merit.recipe.load import recipe_schema

    _print_json(recipe_schema())


@app.command()
def check(
    recipe: Target,
    output: Output = None,
    offline: Annotated[
        bool, typer.Option(help="Look at nothing that is not on this machine: names, fields, plan, memory and disk.")
    ] = False,
    ids: Annotated[bool, typer.Option("--ids", help="As --offline, and ask the hub whether its ids exist.")] = False,
    images: Annotated[
        bool,
        typer.Option("--images", help="Also decode every image of every dataset, and list all that cannot be used."),
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Validate everything that can be validated before the first expensive step, and print the plan. Trains nothing.

    Hub ids are asked for before anything is fetched; what the rest of the check reads (base, data) is fetched as for a run.

    Example: `merit check recipe.yaml`, and `merit check recipe.yaml --images` before a long run on images
    """
    pipeline = _pipeline(recipe, output, overrides, quiet=quiet)
    report = None
    if images:
        from merit.mixture.image_check import check_images
        from merit.report import images as image_tables

        with pipeline.reporter.progress("images") as tick:
            sight = None if offline or not pipeline.base_stands else pipeline.base.images
            report = check_images(pipeline.found, tick, sight)
        if not as_json:
            _out(*image_tables.render(report))
        elif report.fatal:
            _print_json({"images": report.facts()})
        if report.fatal:
            raise typer.Exit(2)
    notes = []
    if ids or not offline:
        from merit.hf.hub import resolve_ids

        notes = resolve_ids(pipeline.given)
    plan = pipeline.check(offline=offline or ids)
    plan = replace(plan, notes=(*notes, *plan.notes))
    if as_json:
        _print_json(plan.facts() | ({"images": report.facts()} if report else {}))
    else:
        _out(*plan.render())


# ---- one stage ------------------------------------------------------------------------------------------------------


@app.command()
def prepare(
    target: Target,
    output: Output = None,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make the base that every branch starts from: join checkpoints, train LLaVA-style stages; as the recipe says.

    The result is RUN/prepared/base, an ordinary checkpoint folder; `merit run` uses it, and makes it where it is missing.

    Example: `merit prepare recipe.yaml --output runs/my-run`
    """
    pipeline = _pipeline(target, output, overrides, quiet=quiet, redo=redo)
    pipeline.prepare_alone()
    base = pipeline.run_folder / "prepared" / "base"
    if as_json:
        from merit.run.status import run_status

        found = run_status(pipeline.run_folder, pipeline.recipe)["stages"]
        _print_json({"base": str(base), "stages": [row for row in found if row["stage"].startswith("prepare")]})
    elif not quiet:
        _out(f"Prepared base: {base}")


@app.command()
def gradients(
    target: Target,
    output: Output = None,
    compare: Annotated[
        bool, typer.Option(help="Also measure sketch and stride against exact gradients on this model.")
    ] = False,
    jobs: Jobs = 1,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure one gradient per dataset at the base, and how they conflict.

    Example: `merit gradients recipe.yaml --jobs 2`
    """
    pipeline = _pipeline(target, output, overrides, quiet=quiet, jobs=jobs, redo=redo)
    pipeline.check()
    with pipeline.begun("gradients"):
        pipeline.mixture()
        stage = pipeline.gradients()
        comparison = pipeline.compare_gradients() if compare else None
    summary = json.loads((stage.path / "summary.json").read_text(encoding="utf-8"))
    if as_json:
        _print_json({"record": stage.record(), "summary": summary, "comparison": comparison})
    else:
        from merit.report.conflict import render

        _out(*render(stage.path, comparison))


@app.command()
def split(
    target: Target,
    output: Output = None,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Cut the mixture into groups; needs the gradients unless the method is random or joint.

    Example: `merit split runs/my-run`
    """
    pipeline = _pipeline(target, output, overrides, quiet=quiet, redo=redo)
    with pipeline.begun("split"):
        pipeline.mixture()
        pipeline.split_all()
    facts = json.loads((pipeline.root / "split" / "split.json").read_text(encoding="utf-8"))
    if as_json:
        _print_json(facts)
    else:
        from rich.table import Table

        table = Table("group", facts["balance"], "datasets", title=f"{facts['method']} split", title_justify="left")
        for k, (group, weight) in enumerate(zip(facts["groups"], facts["weights"], strict=True)):
            table.add_row(str(k), f"{weight:,.0f}", ", ".join(group))
        _out(table)


@app.command()
def train(
    target: Target,
    branch: Annotated[
        list[str] | None,
        typer.Option(
            "--branch", metavar="K", help="Train this branch only (random/K: of a baseline); may be repeated."
        ),
    ] = None,
    output: Output = None,
    jobs: Jobs = 1,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune one branch per group; no branch knows of another.

    With --branch it needs the run folder's recipe and split, the data and the base: any machine that has them will do.

    Example: `merit train runs/my-run --branch 2`
    """
    from merit.run.chain import BranchId

    pipeline = _pipeline(target, output, overrides, quiet=quiet, jobs=jobs, redo=redo)
    branches = [BranchId.parse(text) for text in branch] if branch else None
    pipeline.train_alone(branches)
    if as_json:
        from merit.run.status import run_status

        _print_json(run_status(pipeline.run_folder, pipeline.recipe))


@app.command()
def merge(
    target: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE|RUN]", help="A recipe or run folder; or none, with --base.")
    ] = None,
    operator: Annotated[
        str | None,
        typer.Option(help="average, uniform, task_arithmetic, ties, star, tsv or iso_cts. Default: the recipe's."),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="X|auto", help="λ of θ0 + λ τ; auto searches the recipe's grid.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Operator setting (docs/merge.md).")
    ] = None,
    exclude: Annotated[list[int] | None, typer.Option("--exclude", metavar="K", help="Leave this branch out.")] = None,
    allow_missing: Annotated[bool, typer.Option(help="Merge the branches that are trained, and say so.")] = False,
    base: Annotated[Path | None, typer.Option(help="Outside a run: folder of the base.")] = None,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option("--checkpoint", metavar="DIR=WEIGHT", help="Outside a run: one branch and its weight."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the merged checkpoint here, instead of into RUN/merged.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Allow branches of another dtype: base, float32, bfloat16 or float16 comes out.")
    ] = None,
    adapter: Annotated[
        str, typer.Option(help="LoRA adapters outside a run: full checkpoint, concat (exact adapter), or recompress.")
    ] = "full",
    rank: Annotated[int | None, typer.Option(min=1, help="For --adapter recompress: rank of the new adapter.")] = None,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Merge a run's branches once, or any checkpoints of one base with given weights.

    Examples: `merit merge runs/my-run --operator ties --output ties-model`,
    `merit merge --base BASE --checkpoint A=120000 --checkpoint B=80000 --output AB`
    """
    from merit.report.merge import render
    from merit.report.terminal import Reporter
    from merit.run.merge_command import Words, merge_checkpoints, merge_target

    words = Words(operator, scale, tuple(option or ()), dtype, adapter, rank)
    if target is None:
        if exclude or allow_missing or overrides or redo:
            raise RecipeError("merge: --exclude, --allow-missing, --set and --redo go with a recipe or run folder.")
        result = merge_checkpoints(Reporter(quiet), base, checkpoints or [], output, words)
    else:
        if base or checkpoints:
            raise RecipeError("merge: give either a recipe or run folder, or --base with --checkpoint; not both.")
        pipeline = _pipeline(target, None, [*(overrides or []), *words.overrides()], quiet=quiet, redo=redo)
        result = merge_target(pipeline, exclude=exclude or [], allow_missing=allow_missing, output=output)
    if as_json:
        _print_json({**result.record(), "output_folder": str(result.folder)})
    else:
        _out(*render(result))


@app.command()
def evaluate(
    target: Target,
    output: Output = None,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure base, branches, merged model and baselines on held-out rows, and say what the figures mean.

    Example: `merit evaluate runs/my-run`
    """
    pipeline = _pipeline(target, output, overrides, quiet=quiet, redo=redo)
    with pipeline.begun("evaluate"):
        pipeline.mixture()
        pipeline.evaluate()
    _finish(pipeline, as_json=as_json)


@app.command()
def status(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    watch: Annotated[bool, typer.Option(help="Show again every two seconds until interrupted.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """What is done, stale, running or missing in a run, with sizes and times.

    Example: `merit status runs/my-run --watch`
    """
    from merit.run.status import render_status, run_status, watch_status

    recipe, folder = _open(run_folder, None, overrides) if run_folder.is_dir() else (None, run_folder)
    if recipe is None:
        raise RecipeError(f"{run_folder} is no run folder.", "Give the folder that `merit run` wrote (runs/<name>).")
    if as_json:
        _print_json(run_status(folder, recipe))
    elif watch:
        watch_status(folder, recipe)
    elif not quiet:
        _out(*render_status(run_status(folder, recipe)))


# ---- entry point ----------------------------------------------------------------------------------------------------


def _version(wanted: bool) -> None:
    if wanted:
        print(f"merit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and exit with its code."""
    sys.unraisablehook = _quiet_about_stops
    try:
        app()
    except KeyboardInterrupt:  # before a command was entered
        sys.exit(Interrupted.exit_code)
    finally:
        ignore_from_now_on()


def _quiet_about_stops(unraisable: Any) -> None:
    """A stop that got lost in a destructor comes up at the next report (:func:`merit.report.terminal.stop_if_asked`)."""
    if not isinstance(unraisable.exc_value, Stop):
        sys.__unraisablehook__(unraisable)
