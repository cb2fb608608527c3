"""What `merit run` prints at the end: results and verdict, as far as the run has got."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from merit.evaluation.results import Evaluation
from merit.files import read_json, write_text
from merit.recipe.schema import Recipe
from merit.report import evaluation, rounds, suites
from merit.run.round_stages import round_lines
from merit.run.scope import Scope
from merit.run.status import run_status
from merit.run.store import Stage
from merit.run.suites import suite_scores


def render(run: Path) -> list[RenderableType]:
    """Tables and verdict (also in evaluation/table.md), and the path of the merged model."""
    shown: list[RenderableType] = []
    if Stage("evaluation", run / "evaluation").begun:
        result = Evaluation.load(run / "evaluation")
        table, text = run / "evaluation" / "table.md", evaluation.markdown(result)
        if not table.is_file() or table.read_text(encoding="utf-8", errors="replace") != text:
            write_text(table, text)
        shown += evaluation.terminal(result)
    shown += suites.render(suite_scores(run))
    shown += rounds.table(round_lines(Scope(run)), "Rounds")
    merged = run / "merged" / "model"
    if merged.is_dir():
        shown.append(f"Merged model: {merged}")
    if (run / "report.html").is_file():
        shown.append(f"Report: {run / 'report.html'}")
    return [*shown, f"Run folder: {run}  (`merit status {shlex.quote(str(run))}` shows every stage)"]


def result_facts(run: Path, recipe: Recipe) -> dict[str, Any]:
    """The status, and the evaluation's results, as JSON values."""
    result = run_status(run, recipe).facts()
    if lines := round_lines(Scope(run)):
        result["rounds"] = [asdict(line) for line in lines]
    if found := suite_scores(run):
        result["suites"] = {name: asdict(scores) for name, scores in found.items()}
    if Stage("evaluation", run / "evaluation").begun:
        for name in ("results", "kept", "unseen", "drift", "summary"):
            file = run / "evaluation" / f"{name}.json"
            if file.is_file():
                result[name] = read_json(file)
    return result
