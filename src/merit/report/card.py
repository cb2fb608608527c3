"""The card of a model that is published from a run: lineage, datasets with licences, evaluation. Text only, no local path.

The merge writes a card next to its weights (:mod:`merit.merge.card`); this one adds what the whole run knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from merit.evaluation.figures import Average, Figures
from merit.evaluation.results import Evaluation
from merit.hf.publish import Licence
from merit.merge import MergeResult
from merit.recipe.load import is_hub_id
from merit.recipe.schema import Recipe
from merit.report import evaluation as tables
from merit.report.page.data import RunData

__all__ = ["Source", "eval_results", "public_record", "published_card", "sources"]

_FRONT = re.compile(r"---\s*\n(.*?)\n---\s*\n", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """Where a dataset's rows come from: an id on the hub, or None for files of one's own."""

    name: str
    hub_id: str | None
    subset: str | None
    split: str


def sources(recipe: Recipe, names: Sequence[str]) -> list[Source]:
    """Every dataset's source as far as others can reach it."""
    listed = {item.name: item for item in recipe.mixture.datasets or []}
    found = []
    for name in names:
        item = listed.get(name) or listed.get(name.rpartition(".")[0])
        path = item.path if item else recipe.mixture.path
        known = (
            path is not None and is_hub_id(path) and not path.endswith((".jsonl", ".json", ".parquet", ".csv", ".tsv"))
        )
        found.append(
            Source(name, path if known else None, item.subset if item else None, item.split if item else "train")
        )
    return found


def published_card(existing: str, repo: str, data: RunData, licences: Mapping[str, Licence]) -> str:
    """The card's text.

    Args:
        existing: The merged model's own card; its front matter (licence, base model) and body are kept.
        repo: ``namespace/name``.
        data: The run.
        licences: Of the datasets on the hub, by id.
    """
    found = _FRONT.match(existing)
    front = yaml.safe_load(found[1]) if found else {}
    body = existing[found.end() :] if found else existing
    body = re.sub(r"\A\s*# .*\n", "", body)
    given = sources(data.recipe, [item.name for item in data.counts])
    ids = list(dict.fromkeys(item.hub_id for item in given if item.hub_id))
    if ids:
        front["datasets"] = ids
    if data.evaluation is not None:
        front["model-index"] = eval_results_to_model_index(
            repo.rpartition("/")[2], _model_index(data.evaluation, given)
        )
    parts = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {repo.rpartition('/')[2]}",
        "",
        *_verdict(data.evaluation),
        body.strip(),
        "",
        *_datasets(data, given, licences),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _verdict(evaluation: Evaluation | None) -> list[str]:
    if evaluation is None:
        return []
    table = tables.markdown(evaluation).partition("## ")[0].partition("\n")[2].strip()
    return [evaluation.verdict.sentences[0], "", "## Evaluation", "", table, ""]


def _datasets(data: RunData, given: Sequence[Source], licences: Mapping[str, Licence]) -> list[str]:
    counts = {item.name: item for item in data.counts}
    group = {name: k for k, names in enumerate(data.own.split.groups if data.own.split else []) for name in names}
    rows = []
    for item in given:
        where = (
            f"[{item.hub_id}](https://huggingface.co/datasets/{item.hub_id})" if item.hub_id else "files of the author"
        )
        terms = licences.get(item.hub_id or "", Licence(None))
        name = terms.name or ("not stated" if item.hub_id else "ask the author")
        shown = f"[{name}]({terms.link})" if terms.link else name
        rows.append(f"| {item.name} | {where} | {shown} | {group.get(item.name, '–')} | {counts[item.name].rows:,} |")
    return (
        ["## Datasets", "", "| dataset | source | licence | branch | rows |", "|---|---|---|---|---:|", *rows, ""]
        if rows
        else []
    )


def public_record(merge: MergeResult) -> str:
    """``merge.json`` without the folders of this machine."""
    record = json.loads(json.dumps(merge.record()))
    for source in (record["base"], *record["branches"]):
        source.pop("path", None)
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def _merged(evaluation: Evaluation) -> dict[str, Figures]:
    return evaluation.results.get("merged", {})


def _model_index(evaluation: Evaluation, given: Sequence[Source]) -> list[EvalResult]:
    known = {item.name: item for item in given}
    found = []
    average = evaluation.summary.macro["merged"].mixture if "merged" in evaluation.summary.macro else None
    shown: dict[str, Figures | Average] = {f"average of {average.datasets} datasets": average} if average else {}
    for name, figures in (shown | _merged(evaluation)).items():
        source = known.get(name)
        where = (source.hub_id if source else None) or "local"
        metrics = [("loss", figures.loss, "nats per target token"), ("exact_match", figures.exact_match, "exact match")]
        for kind, value, title in metrics:
            if value is not None:
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=where,
                        dataset_name=name,
                        dataset_config=name,  # what tells datasets of one source apart
                        dataset_split="test",
                        metric_type=kind,
                        metric_value=round(value, 6),
                        metric_name=title,
                    )
                )
    return found


def eval_results(data: RunData) -> str | None:
    """``.eval_results/merit.yaml``: exact match on held-out rows of datasets that are on the hub; None without any."""
    if data.evaluation is None:
        return None
    known = {item.name: item for item in sources(data.recipe, [item.name for item in data.counts])}
    record = data.records.get("evaluation")
    entries = []
    for name, figures in _merged(data.evaluation).items():
        source = known.get(name)
        if source is None or source.hub_id is None or figures.exact_match is None:
            continue
        notes = f"exact match of greedy answers on {figures.examples} held-out rows of {name}"
        entries.append(
            EvalResultEntry(
                dataset_id=source.hub_id,
                task_id=source.subset or "default",
                value=round(100 * figures.exact_match, 2),
                date=record.finished if record else None,
                notes=notes,
            )
        )
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None
