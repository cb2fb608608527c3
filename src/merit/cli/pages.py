"""What leaves a finished run: a page to look at (report), a model on the hub (push)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merit.cli.options import AsJson, Overrides, Quiet, open_target, out, print_json
from merit.errors import RecipeError


def report(
    target: Annotated[
        Path,
        typer.Argument(metavar="RECIPE|RUN|STUDY", help="A run folder or its study/ folder, or the recipe of a run."),
    ],
    output: Annotated[Path | None, typer.Option(help="File to write. Default: report.html in the run folder.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a run or a study as one self-contained HTML page, verdict first.

    The page loads nothing from elsewhere; every figure saves as SVG and PNG, every table as CSV. `merit run` and
    `merit study` write it too.

    Example: `merit report runs/my-run`, or `merit report runs/my-run --output my-run.html`
    """
    from merit.report.page import write_page

    if (target / "study.json").is_file():
        target = target.resolve().parent
    recipe, run_folder = open_target(target, None, overrides)
    _require_run(run_folder)
    if output is not None and not output.resolve().parent.is_dir():
        raise RecipeError(f"--output {output}: its folder does not exist.")
    written = write_page(run_folder, output, recipe)
    if as_json:
        print_json({"report": str(written.path), "bytes": written.bytes})
    elif not quiet:
        out(f"Report: {written.path}")


def push(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder whose branches are merged.")],
    to: Annotated[str, typer.Option("--to", metavar="NAMESPACE/NAME", help="Repository on the hub; made if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go, and the card. Nothing is sent.")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Upload the merged model with its card: lineage, datasets with their licences, evaluation. One commit.

    The card has `base_model`, the datasets on the hub, and the figures as model-index; those on datasets of the hub go to
    `.eval_results/merit.yaml` too. No path of this machine is in it.

    Example: `merit push runs/my-run --to my-org/my-model --dry-run`
    """
    from merit.hf.publish import dataset_licences, model_files, publish, require_repo_id
    from merit.merge.result import RECORD
    from merit.progress import size
    from merit.report.card import eval_results, public_record, published_card, sources
    from merit.report.page.data import read_run

    require_repo_id(to)
    recipe, run_folder = open_target(run_folder, None, overrides)
    _require_run(run_folder)
    model = run_folder / "merged" / "model"
    data = read_run(run_folder, recipe)
    if data.own.merge is None:
        raise RecipeError(f"{run_folder}: its branches are not merged yet.", "`merit merge RUN` merges them.")
    files: dict[str, Path | bytes] = dict(model_files(model))
    ids = [item.hub_id for item in sources(data.recipe, [c.name for c in data.counts]) if item.hub_id]
    licences = dataset_licences(list(dict.fromkeys(ids)))
    card = published_card((model / "README.md").read_text(encoding="utf-8"), to, data, licences)
    files["README.md"] = card.encode()
    files[RECORD] = public_record(data.own.merge).encode()
    if results := eval_results(data):
        files[".eval_results/merit.yaml"] = results.encode()
    listed = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in files.items()}
    address = None if dry_run else publish(to, files, f"Merged by MERIT: {data.recipe.name}", private=private)
    if as_json:
        print_json({"repository": to, "files": listed, "card": card, "sent": not dry_run, "address": address})
    elif not quiet:
        for name, count in listed.items():
            out(f"{size(count):>10}  {name}")
        out(f"\n{card}" if dry_run else f"Published: {address}")


def _require_run(folder: Path) -> None:
    from merit.run.store import is_run_folder

    if not (folder.is_dir() and is_run_folder(folder) and (folder / "recipe.yaml").is_file()):
        raise RecipeError(f"{folder} is not a run folder.", "Give the folder that `merit run` wrote (runs/<name>).")
