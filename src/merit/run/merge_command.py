"""What `merit merge` does: for a run (recipe and run folder), or for any checkpoints of one base outside a run.

It turns the command's words into calls of :mod:`merit.run.merging` and :mod:`merit.merge`, and their records into a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from merit.errors import MergeError
from merit.report.terminal import Reporter

if TYPE_CHECKING:
    from merit.merge import Branch
    from merit.run.chain import Pipeline

RECORD = "merge.json"
"""Record of a merge that lies outside a run folder, beside the weights."""


def merge_overrides(operator: str | None, scale: str | None, options: Sequence[str], dtype: str | None) -> list[str]:
    """The command's options as recipe overrides."""
    given = {"operator": operator, "scale": scale, "dtype": dtype}
    found = [f"merge.{key}={value}" for key, value in given.items() if value is not None]
    if operator is not None and not options:
        found.append("merge.options={}")  # the recipe's options belong to the recipe's operator
    return found + [f"merge.options.{option}" for option in options]


def merge_target(
    pipeline: Pipeline, *, exclude: Sequence[int], allow_missing: bool, output: Path | None
) -> dict[str, Any]:
    """Merge a run's branches into its merged/ folder, or into ``output``."""
    from merit.run.merging import choose_branches, make_merge

    if output is None:
        with pipeline.begun("merge"):
            record = pipeline.merge(exclude=exclude, allow_missing=allow_missing).record()
        return {**record, "output_folder": str(pipeline.root / "merged" / "model")}
    pipeline.refuse_stale("merge", own=False)
    taking, left_out = choose_branches(pipeline, exclude, allow_missing)
    pipeline.reporter.stage("merge", f"{len(taking)} branches, {pipeline.recipe.merge.operator}")
    record = make_merge(pipeline, taking, left_out, output, RECORD)
    return {**record, "output_folder": str(output)}


def merge_checkpoints(
    reporter: Reporter,
    *,
    base: Path | None,
    checkpoints: Sequence[str],
    output: Path | None,
    operator: str,
    options: Sequence[str],
    scale: str,
    dtype: str | None,
    adapter: str,
    rank: int | None,
) -> dict[str, Any]:
    """Merge checkpoint folders (or LoRA adapters) of one base with given weights, outside any run.

    Raises:
        MergeError: A word is missing or malformed, or the checkpoints do not belong together.
    """
    from merit.merge import plan_merge, run_merge
    from merit.merge.lora import merge_adapters_to_adapter, plan_adapter_merge

    if base is None or not checkpoints or output is None:
        raise MergeError(
            "merge: give a recipe or run folder, or --base DIR, --checkpoint DIR=WEIGHT (one or more) and --output DIR.",
            "Example: merit merge --base BASE --checkpoint A=120000 --checkpoint B=80000 --output AB",
        )
    if scale == "auto":
        raise MergeError(
            "--scale auto needs held-out data, which only a run has.", "Give a number here, or merge a run folder."
        )
    if adapter not in ("full", "concat", "recompress"):
        raise MergeError(f"--adapter {adapter}: expected full, concat or recompress.")
    if (rank is not None) != (adapter == "recompress"):
        raise MergeError("--rank R goes with --adapter recompress, and with nothing else.")
    if adapter != "full" and (operator != "average" or options or dtype is not None):
        raise MergeError(
            f"--adapter {adapter} makes a token-weighted average in float32; --operator, --option and --dtype do not go "
            "with it.",
            "Leave them out, or use --adapter full.",
        )
    branches = [_branch(text) for text in checkpoints]
    settings = {key: value for key, value in map(_setting, options)}
    adapters = [(branch.path / "adapter_config.json").is_file() for branch in branches]
    if any(adapters) and not all(adapters):
        raise MergeError(
            "merge: some checkpoints are LoRA adapters and some are full models; merge one kind at a time.",
            "Fold each adapter into its base first (merit merge --base BASE --checkpoint ADAPTER=1 --output FULL).",
        )
    reporter.stage("merge", f"{len(branches)} checkpoints, {operator}")
    with reporter.progress("merge") as tick:
        if all(adapters) and adapter != "full":
            record = merge_adapters_to_adapter(
                base, branches, output, mode=adapter, rank=rank, scale=scale, extra=_record_beside
            )
        elif all(adapters):
            plan = plan_adapter_merge(base, branches, operator, settings, scale, output, dtype=dtype)
            record = run_merge(plan, progress=tick, extra=_record_beside).record
        else:
            if adapter != "full":
                raise MergeError(f"--adapter {adapter} is for LoRA adapters; {branches[0].path} is a full checkpoint.")
            plan = plan_merge(base, branches, operator, settings, scale, output, dtype=dtype)
            record = run_merge(plan, progress=tick, extra=_record_beside).record
    return {**record, "output_folder": str(output)}


def _record_beside(record: Mapping[str, Any]) -> dict[str, str]:
    return {RECORD: json.dumps(record, indent=2, ensure_ascii=False) + "\n"}


def _branch(text: str) -> Branch:
    from merit.merge import Branch

    folder, separator, weight = text.rpartition("=")
    if not separator or not folder:
        raise MergeError(f"--checkpoint {text}: expected DIR=WEIGHT, such as branches/0/model=120000.")
    return Branch(path=Path(folder), tokens=weight, name=folder)


def _setting(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise MergeError(f"--option {text}: expected KEY=VALUE, such as density=0.2.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise MergeError(f"--option {text}: {value!r} cannot be read as a value.") from None


def render_merge(record: dict[str, Any]) -> list[Any]:
    """A merge's record as something that rich can print."""
    from rich.table import Table

    table = Table("branch", "weight", title="merged branches", title_justify="left")
    names = [item["name"] if isinstance(item, dict) else str(item) for item in record.get("branches", [])]
    for name, weight in zip(names, record.get("weights", []), strict=False):
        table.add_row(name, f"{weight:.4f}")
    lines: list[Any] = [table] if names else []
    search = record.get("scale_search")
    if search:
        curve = Table("λ", "learned ↓", "kept ↓", "", title="scale search: held-out loss", title_justify="left")
        for point in search["points"]:
            mark = "← chosen" if point["scale"] == search["chosen"] else ""
            curve.add_row(f"{point['scale']:g}", f"{point['learned']:.4f}", f"{point['kept']:.4f}", mark)
        lines += [curve, f"kept: {search['kept']}; rule: {search['rule']}"]
        if search["rows_shared_with_evaluation"]:
            count = len(search["rows_shared_with_evaluation"])
            lines.append(f"[yellow]note:[/] for {count} datasets λ was chosen on rows that the evaluation reads too.")
    lines += [f"[yellow]note:[/] {warning}" for warning in record.get("warnings", [])]
    lines.append(f"Merged model: {record['output_folder']}")
    return lines
