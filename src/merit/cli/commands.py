"""The commands, one per stage. Each parses, makes one call and hands the result to :mod:`merit.report`.

Here the error tree becomes messages and exit codes.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from merit import __version__
from merit.cli import changes, diagnose, pages, stages, study, whole
from merit.cli.branch import branch
from merit.errors import Interrupted, MeritError, visible
from merit.signals import stop_on_sigterm

_PLACES = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}


class _Commands(TyperGroup):
    """Turns the error tree into messages and exit codes; usage errors are Typer's own."""

    def invoke(self, ctx: Any) -> Any:
        stop_on_sigterm()
        try:
            return super().invoke(ctx)
        except MeritError as error:
            print(f"merit: {visible(str(error))}", file=sys.stderr)
            if isinstance(error, Interrupted):
                print("Run the same command again to resume.", file=sys.stderr)
            code = error.exit_code
        except KeyboardInterrupt as error:
            print(f"merit: {str(error) or 'interrupted'}. Run the same command again to resume.", file=sys.stderr)
            code = Interrupted.exit_code
        except OSError as error:
            code = _place_error(error)
        raise typer.Exit(code)


def _place_error(error: OSError) -> int:
    """Exit code 2 and a message if a path cannot be written; 0 if the reader of our output closed the pipe."""
    if isinstance(error, BrokenPipeError):  # such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if error.errno not in _PLACES:
        raise error
    place = error.filename2 or error.filename
    where = f"{visible(os.fsdecode(place))}: " if place else ""
    print(f"merit: {where}{error.strerror}.", file=sys.stderr)
    print("  Check its permissions and free space, or write elsewhere (--output DIR).", file=sys.stderr)
    return 2


app = typer.Typer(
    name="merit",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Fine-tune on a heterogeneous instruction mixture without a coupled cluster: measure how the datasets' gradients "
    "conflict at a shared base, split the mixture along the main conflict axes, train one branch per group without any "
    "communication, and merge the branches once.\n\n"
    "Start with `merit demo`, or `merit init` and then `merit run recipe.yaml`.",
)
for _panel, _commands in {
    "From a recipe to a result": (*whole.COMMANDS, whole.status, pages.report, study.study),
    "Stage by stage": stages.COMMANDS,
    "Around a run": (*diagnose.COMMANDS, *changes.COMMANDS, pages.push),
    "For scripts": (whole.schema,),
}.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)
app.add_typer(branch, name="branch", rich_help_panel="Around a run")


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
