"""Benchmarks on one model through lm-eval, in this process, and the user's own tasks from local files, offline.

A local task is an lm-eval YAML, or a JSONL of rows: ``{"question": ..., "choices": [...], "answer": 0}`` becomes a
multiple-choice task scored by the likelihood of each choice, ``{"question": ..., "answer": "..."}`` a generation scored by
exact match. lm-eval comes with the extra ``eval``.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from merit.errors import RecipeError, ResourceError, install_hint
from merit.evaluation.suites import expand, local_tasks, problems
from merit.files import write_text
from merit.recipe.suites import HarnessSettings

__all__ = ["HarnessFacts", "Scores", "evaluate_suites", "harness_facts", "write_local_task"]

Scores = dict[str, dict[str, float]]
"""{task: {metric: value}}; a metric's standard error is ``METRIC_stderr``."""


@dataclass(frozen=True)
class HarnessFacts:
    """What the scores depend on besides the model.

    Attributes:
        versions: Of the harness and the libraries under it.
        batch_size: Requests per batch.
        limit: Examples per task, if not all.
        judge: The judge's name, where there is one.
    """

    versions: dict[str, str]
    batch_size: int
    limit: int | None
    judge: str | None


def harness_facts(settings: HarnessSettings) -> HarnessFacts:
    """See :class:`HarnessFacts`."""
    names = ("lm_eval", "transformers", "torch", "datasets")
    versions = {name: metadata.version(name) for name in names if find_spec(name) is not None}
    return HarnessFacts(versions, settings.batch_size, settings.limit, settings.judge)


def check_harness(suites: Sequence[str], settings: HarnessSettings) -> None:
    """Refuse what cannot run here, before a model is loaded.

    Raises:
        ResourceError: lm-eval is not installed.
        RecipeError: A task needs something that is missing; every such task is listed.
    """
    text, _ = expand(suites)
    if (text or local_tasks(suites)) and find_spec("lm_eval") is None:
        raise ResourceError(
            "evaluate.suites needs lm-eval, which is not installed.", f"Install it: {install_hint('eval')}."
        )
    lines = problems(text, settings, token=_token())
    if lines:
        raise RecipeError("evaluate.suites: not everything is here:", *lines, "Nothing was measured.")


def _token() -> bool:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return bool(os.environ.get("HF_TOKEN")) or (home / "token").is_file()


def evaluate_suites(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suites: Sequence[str],
    settings: HarnessSettings,
    scratch: Path,
) -> Scores:
    """Scores of one loaded model.

    Args:
        model: In eval mode, on its device.
        tokenizer: The base's, with its chat template.
        suites: The recipe's ``evaluate.suites``; those of lmms-eval are passed over.
        settings: The recipe's ``evaluate.harness``.
        scratch: Folder for the local tasks' definitions.

    Raises:
        RecipeError: A task is unknown, or its data cannot be had.
    """
    text, _ = expand(suites)
    names = [task.name for task in text]
    for path in local_tasks(suites):
        names.append(write_local_task(path, scratch))
    if not names:
        return {}
    with _quiet():
        evaluator: Any = import_module("lm_eval.evaluator")
        manager: Any = import_module("lm_eval.tasks").TaskManager(
            include_path=str(scratch), include_defaults=bool(text), verbosity="ERROR"
        )
        wrapped: Any = import_module("lm_eval.models.huggingface").HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, backend="causal"
        )
        try:
            found = evaluator.simple_evaluate(
                model=wrapped,
                tasks=names,
                task_manager=manager,
                limit=settings.limit,
                apply_chat_template=settings.chat_template and tokenizer.chat_template is not None,
                bootstrap_iters=0,
                log_samples=False,
                confirm_run_unsafe_code=settings.run_code,
            )
        except (OSError, ValueError, KeyError, ConnectionError) as error:
            raise _explained(error, names) from None
    return scores_of(found["results"])


def _explained(error: BaseException, names: Sequence[str]) -> RecipeError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return RecipeError(
        f"evaluate.suites: lm-eval could not run {', '.join(names)}: {reason[0][:300]}",
        "Check the tasks' names (lm-eval ls tasks) and that their datasets can be downloaded or are cached.",
    )


def scores_of(results: Mapping[str, Mapping[str, Any]]) -> Scores:
    """lm-eval's results as plain floats: ``acc,none`` becomes ``acc``, and ``exact_match,strip`` keeps its filter."""
    scores: Scores = {}
    for task, values in results.items():
        found = {}
        for key, value in values.items():
            metric, _, how = key.partition(",")
            if how and isinstance(value, int | float) and not isinstance(value, bool):
                found[metric if how == "none" else f"{metric}/{how}"] = float(value)
        scores[task] = {name: value for name, value in found.items() if value == value}
    return scores


def write_local_task(path: Path, folder: Path) -> str:
    """Define a user's task for lm-eval, in ``folder``; returns its name.

    Raises:
        RecipeError: The file is neither an lm-eval task nor rows of one of the two forms.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".jsonl":
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "task" not in content:
            raise RecipeError(f"evaluate.suites: {path} is not an lm-eval task: it has no key 'task'.")
        files = content.get("dataset_kwargs", {}).get("data_files", {})
        for split, file in files.items() if isinstance(files, dict) else ():
            files[split] = str((path.parent / file).resolve())
        write_text(folder / f"{path.stem}.yaml", yaml.safe_dump(content, sort_keys=False))
        return str(content["task"])
    choices = _row_form(path)
    name = path.stem
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    if choices:
        task |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
        task |= {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    else:
        task |= {
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 64, "do_sample": False},
            "filter_list": [
                {"name": "strip", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
            ],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    write_text(folder / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False))
    return name


def _row_form(path: Path) -> bool:
    """Whether the rows have choices; every row is looked at.

    Raises:
        RecipeError: A row has neither form; the message names its line.
    """
    forms = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        choices = row.get("choices") if isinstance(row, dict) else None
        answer = row.get("answer") if isinstance(row, dict) else None
        listed = isinstance(choices, list) and isinstance(answer, int) and 0 <= answer < len(choices)
        if (
            not isinstance(row, dict)
            or "question" not in row
            or not (listed or (choices is None and isinstance(answer, str)))
        ):
            raise RecipeError(
                f"evaluate.suites: {path}, line {number}: expected question, choices and the number of the right one as "
                "answer, or question and an answer in words."
            )
        forms.add(listed)
    if len(forms) != 1:
        raise RecipeError(f"evaluate.suites: {path} has {'no rows' if not forms else 'rows of both forms'}.")
    return forms.pop()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's own talk off stdout; gradients are not needed."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with redirect_stdout(StringIO()), torch.inference_mode():
            yield
    finally:
        logger.setLevel(before)
