"""One command per stage: prepare, gradients, split, train, merge, evaluate."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

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
    out,
    print_json,
)
from merit.cli.whole import show_results
from merit.errors import RecipeError


def prepare(
    target: Target,
    output: Output = None,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make the base that every branch starts from: join checkpoints and train LLaVA-style stages, as set in the recipe.

    The result is RUN/prepared/base, an ordinary checkpoint folder; `merit run` uses it, and makes it if it is missing.

    Example: `merit prepare recipe.yaml --output runs/my-run`
    """
    from merit.run.chain import prepare_alone
    from merit.run.status import run_status

    session = open_session(target, output, overrides, quiet=quiet, redo=redo)
    base = prepare_alone(session)
    if as_json:
        rows = run_status(session.run, session.recipe).facts()["stages"]
        print_json({"base": str(base), "stages": [row for row in rows if row["stage"].startswith("prepare")]})
    elif not quiet:
        out(f"Prepared base: {base}")


def gradients(
    target: Target,
    output: Output = None,
    compare: Annotated[
        bool, typer.Option(help="Also compare sketch and stride with exact gradients on this model.")
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
    from merit.report import conflict as report
    from merit.run.chain import gradients_alone

    session = open_session(target, output, overrides, quiet=quiet, jobs=jobs, redo=redo)
    record, geometry, comparison = gradients_alone(session, compare=compare)
    if as_json:
        rows = None if comparison is None else [asdict(item) for item in comparison]
        print_json({"record": record.model_dump(), "summary": geometry.summary_json(), "comparison": rows})
    else:
        out(*report.render(geometry, comparison))


def split(
    target: Target,
    output: Output = None,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Split the mixture into groups; needs the gradients unless the method is random or joint.

    Example: `merit split runs/my-run`
    """
    from merit.report.split import render
    from merit.run.chain import split_alone

    result = split_alone(open_session(target, output, overrides, quiet=quiet, redo=redo))
    if as_json:
        print_json(asdict(result))
    else:
        out(*render(result))


def train(
    target: Target,
    branch: Annotated[
        list[str] | None,
        typer.Option("--branch", metavar="K", help="Train only this branch (random/K: a baseline's); may be repeated."),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(
            "--round", min=1, metavar="I", help="With --branch: in this round. Default: the one to be merged next."
        ),
    ] = None,
    output: Output = None,
    launch: Launch = None,
    jobs: Jobs = 1,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune one branch per group; the branches do not communicate.

    With --branch it needs only the run folder's recipe and split, the data and the base: any machine that has them will do.

    Example: `merit train runs/my-run --branch 2`
    """
    from merit.run.branches import BranchId
    from merit.run.chain import train_alone
    from merit.run.status import run_status

    if number is not None and not branch:
        raise RecipeError("train: --round goes with --branch; without them all rounds are trained.")
    session = open_session(target, output, overrides, quiet=quiet, jobs=jobs, redo=redo, launch=launch)
    train_alone(session, [BranchId.parse(text, number) for text in branch] if branch else None)
    if as_json:
        print_json(run_status(session.run, session.recipe).facts())


def merge(
    target: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE|RUN]", help="A recipe or run folder; omit it with --base.")
    ] = None,
    operator: Annotated[
        str | None,
        typer.Option(help="average, uniform, task_arithmetic, ties, star, tsv, iso_cts, dare, model_stock, fisher."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="tokens, target_tokens, samples, uniform, auto, [w_0, ...], or {PATTERN: RULE or [...], ...}. "
            "Default: the recipe's.",
        ),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="X|auto", help="λ of θ0 + λ τ; auto searches the recipe's grid.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Operator setting (docs/merge.md).")
    ] = None,
    exclude: Annotated[list[int] | None, typer.Option("--exclude", metavar="K", help="Leave this branch out.")] = None,
    allow_missing: Annotated[
        bool, typer.Option(help="Merge the branches that are trained, and note which are missing.")
    ] = False,
    number: Annotated[
        int | None,
        typer.Option("--round", min=1, metavar="I", help="Merge round I of several, from which the next one starts."),
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Outside a run: folder of the base.")] = None,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option("--checkpoint", metavar="DIR=WEIGHT", help="Outside a run: one branch and its weight."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the merged checkpoint here instead of to RUN/merged.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Allow branches of another dtype; dtype of the result: base, float32, bfloat16 or float16."),
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
    """Merge a run's branches, or any checkpoints of one base with given weights.

    Examples: `merit merge runs/my-run --operator ties --output ties-model`,
    `merit merge --base BASE --checkpoint A=120000 --checkpoint B=80000 --output AB`
    """
    from merit.report.merge import render
    from merit.report.terminal import Terminal
    from merit.run.merge_command import Words, merge_checkpoints

    words = Words(operator, weights, scale, tuple(option or ()), dtype, adapter, rank)
    if target is None:
        if exclude or allow_missing or overrides or redo or number:
            raise RecipeError(
                "merge: --exclude, --allow-missing, --round, --set and --redo need a recipe or run folder."
            )
        result = merge_checkpoints(Terminal(quiet), base, checkpoints or [], output, words)
    else:
        if base or checkpoints:
            raise RecipeError("merge: give either a recipe or run folder, or --base with --checkpoint; not both.")
        from merit.run.merge_target import merge_target

        session = open_session(target, None, [*(overrides or []), *words.overrides()], quiet=quiet, redo=redo)
        result = merge_target(session, exclude=exclude or [], allow_missing=allow_missing, output=output, number=number)
    if as_json:
        print_json({**result.record(), "output_folder": str(result.folder)})
    else:
        out(*render(result))


def evaluate(
    target: Target,
    output: Output = None,
    overrides: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure base, branches, merged model and baselines on held-out rows, and interpret the figures.

    Example: `merit evaluate runs/my-run`
    """
    from merit.run.chain import evaluate_alone

    session = open_session(target, output, overrides, quiet=quiet, redo=redo)
    evaluate_alone(session)
    show_results(session, as_json=as_json)


COMMANDS = (prepare, gradients, split, train, merge, evaluate)
