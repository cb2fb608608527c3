"""Commands for branches that are trained elsewhere: branch export, branch train, branch import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merit.cli.options import AsJson, Overrides, Quiet, Redo, open_session, out, print_json
from merit.errors import RecipeError

branch = typer.Typer(
    no_args_is_help=True,
    help="Branches that are trained elsewhere: export one, train it on any machine, take it back.\n\n"
    "Example: `merit branch export runs/my-run 2 --to branch-2`, there `merit branch train branch-2`, and back here "
    "`merit branch import runs/my-run branch-2`.",
)
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, split already.")]


@branch.command("export")
def export(
    run: Run,
    number: Annotated[str, typer.Argument(metavar="K", help="Which branch (random/K: a baseline's).")],
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Folder to be made.")],
    with_base: Annotated[
        bool, typer.Option(help="Copy the base, too; otherwise it is named with its hash, and looked up there.")
    ] = False,
    form: Annotated[
        str,
        typer.Option(
            "--format", metavar="TOOL", help="Who trains it: merit, or axolotl, llamafactory, trl (rows and a config)."
        ),
    ] = "merit",
    refer_to_data: Annotated[
        bool, typer.Option(help="Name the encoded rows with their hashes instead of copying them (a shared disk).")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write one branch into a folder of its own: recipe, rows, hash of the base, README, one command.

    Example: `merit branch export runs/my-run 2 --to branch-2`, `merit branch export runs/my-run 2 --to b2 --format trl`
    """
    from merit.progress import size
    from merit.run.branches import BranchId
    from merit.run.exporting import export_branch, refuse_other_settings
    from merit.run.foreign import export_for_tool

    session, which = open_session(run, None, overrides, quiet=quiet), BranchId.parse(number)
    refuse_other_settings(session)
    if form == "merit":
        made = export_branch(session, which, to, with_base=with_base, refer_to_data=refer_to_data)
    elif with_base or refer_to_data:
        raise RecipeError(f"--with-base and --refer-to-data cannot be combined with --format {form}.")
    else:
        made = export_for_tool(session, which, to, form)
    if as_json:
        print_json({"branch": number, "folder": str(made.folder), "bytes": made.bytes, "tool": made.manifest.tool})
    elif not quiet:
        out(f"Wrote branch {number} ({size(made.bytes)}) into {made.folder}; its README.md says how it is trained.")


@branch.command("train")
def train(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `merit branch export` wrote.")],
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base. Default: the copy in FOLDER, else the recipe's.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Where the result goes. Default: FOLDER/branch.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train an exported branch where it is, offline; the same command goes on after an interruption.

    --set is for how and where to compute (train.device, train.threads, ...); what would make it another branch is refused.

    Example: `merit branch train branch-2 --base /models/base`, `merit branch train branch-2 --set train.device=cuda`
    """
    from merit.report.terminal import Terminal
    from merit.run.alone import train_exported

    stage = train_exported(folder, base, to, Terminal(quiet), overrides or ())
    if as_json:
        print_json({"folder": str(stage.path), "record": stage.record().model_dump()})


@branch.command("import")
def import_(
    run: Run,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The exported folder, or the branch folder in it.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", metavar="DIR", help="Another tool's model. Default: FOLDER/output."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the tool trained on. Default: by its trainer_state.json.")
    ] = None,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Take a trained branch back into its run, if base, rows, recipe and version are those of the run.

    Example: `merit branch import runs/my-run branch-2`, or `merit branch import runs/my-run b2 --checkpoint OUT`
    """
    from merit.run.exporting import refuse_other_settings
    from merit.run.foreign import import_foreign
    from merit.run.importing import import_branch
    from merit.run.manifest import MANIFEST, Manifest

    session = open_session(run, None, overrides, quiet=quiet, redo=redo)
    refuse_other_settings(session)
    manifest = Manifest.load(folder) if (folder / MANIFEST).is_file() else None
    if manifest is not None and manifest.tool != "merit":
        done = import_foreign(session, folder, manifest, checkpoint, tokens)
    elif checkpoint is not None or tokens is not None:
        raise RecipeError("--checkpoint and --tokens are for branches that were exported with --format.")
    else:
        done = import_branch(session, folder)
    if as_json:
        print_json({"branch": str(done)})
