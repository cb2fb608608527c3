"""Commands that change what a finished run was trained on: add, remove."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from merit.cli.options import AsJson, Jobs, Overrides, Quiet, open_session, out, print_json

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")]
Again = Annotated[bool, typer.Option("--evaluate", help="Evaluate again afterwards.")]


def add(
    run_folder: Run,
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET", help="A file, a folder with train and test files, or {name: ..., path: ...}."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Its name. Default: after the file or folder.")] = None,
    test: Annotated[str | None, typer.Option(help="Its held-out rows.")] = None,
    branch: Annotated[
        int | None,
        typer.Option("--branch", metavar="K", help="Put it into this branch, instead of where its gradient says."),
    ] = None,
    own_branch: Annotated[bool, typer.Option("--own-branch", help="Make a branch for it alone.")] = False,
    evaluate: Again = False,
    jobs: Jobs = 1,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Add a dataset to a finished run: train one branch again and merge; the others stay as they are.

    Example: `merit add runs/my-run data/new_task`
    """
    from merit.errors import RecipeError
    from merit.report.changes import render
    from merit.run.changing import add_dataset, dataset_entry

    if own_branch and branch is not None:
        raise RecipeError("add: give --branch or --own-branch, not both.")
    session = open_session(run_folder, None, overrides, quiet=quiet, jobs=jobs)
    item = dataset_entry(dataset, name, test)
    statement = add_dataset(
        session, item, branch=branch, own_branch=own_branch, evaluate=evaluate, overrides=overrides or ()
    )
    if as_json:
        print_json(asdict(statement))
    else:
        out(*render(statement))


def remove(
    run_folder: Run,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Its name.")],
    evaluate: Again = False,
    jobs: Jobs = 1,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Remove a dataset from a finished run: train its branch again without it and merge; no other branch saw it.

    The statement that is printed is kept in RUN/changes, with the records' checksums before and after.

    Example: `merit remove runs/my-run old_task`
    """
    from merit.report.changes import render
    from merit.run.changing import remove_dataset

    session = open_session(run_folder, None, overrides, quiet=quiet, jobs=jobs)
    statement = remove_dataset(session, dataset, evaluate=evaluate, overrides=overrides or ())
    if as_json:
        print_json(asdict(statement))
    else:
        out(*render(statement))


COMMANDS = (add, remove)
