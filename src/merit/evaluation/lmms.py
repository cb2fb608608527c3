"""Vision-language benchmarks through lmms-eval, as a process in an environment of its own; its JSON is read back.

lmms-eval has some fifty hard requirements that conflict with ours, so it is never imported here.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from merit.errors import RecipeError, ResourceError
from merit.evaluation.harness import Scores, scores_of
from merit.evaluation.suites import Task, problems
from merit.files import write_text
from merit.recipe.suites import HarnessSettings

__all__ = ["MODELS", "check_lmms", "command", "run_lmms"]

MODELS = {"qwen2_5_vl": "qwen2_5_vl", "llava": "llava_hf", "gemma3": "gemma3", "internvl": "internvl_hf"}
"""lmms-eval's name of the model class for each family (``model_type`` of the config)."""


def check_lmms(tasks: Sequence[Task], settings: HarnessSettings) -> None:
    """Refuse what cannot run, before anything is loaded.

    Raises:
        ResourceError: There is no environment with lmms-eval.
        RecipeError: A task needs a judge or a token; every such task is listed.
    """
    if settings.lmms_python is None:
        raise ResourceError(
            "evaluate.suites: vision suites need lmms-eval in an environment of its own.",
            "Make one (python -m venv lmms && lmms/bin/pip install lmms-eval==0.7.3) and set evaluate.harness.lmms_python "
            "to its python.",
        )
    if not Path(settings.lmms_python).is_file():
        raise RecipeError(f"evaluate.harness.lmms_python: {settings.lmms_python} does not exist.")
    token = bool(os.environ.get("HF_TOKEN"))
    if lines := problems(tasks, settings, token=token):
        raise RecipeError("evaluate.suites: not everything is here:", *lines, "Nothing was measured.")


def command(folder: Path, model_type: str, tasks: Sequence[Task], settings: HarnessSettings, output: Path) -> list[str]:
    """The harness's command line for one model folder.

    Raises:
        RecipeError: lmms-eval has no class for this family that we know of.
    """
    if model_type not in MODELS:
        raise RecipeError(
            f"evaluate.suites: lmms-eval has no known model class for {model_type}; it has {', '.join(MODELS)}."
        )
    words = [str(settings.lmms_python), "-m", "lmms_eval", "--model", MODELS[model_type]]
    words += ["--model_args", f"pretrained={folder}", "--tasks", ",".join(task.name for task in tasks)]
    words += ["--batch_size", str(settings.batch_size), "--output_path", str(output)]
    return words + (["--limit", str(settings.limit)] if settings.limit is not None else [])


def run_lmms(
    folder: Path, model_type: str, tasks: Sequence[Task], settings: HarnessSettings, output: Path
) -> tuple[Scores, str]:
    """Scores of one model folder, and the harness's version.

    Raises:
        ResourceError: The harness ended with an error; the message has its last line and where its log is.
    """
    output.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if settings.judge and settings.judge_url:
        environment |= {"API_TYPE": "openai", "OPENAI_API_URL": settings.judge_url, "MODEL_VERSION": settings.judge}
    log = output / "log.txt"
    ended = subprocess.run(
        command(folder, model_type, tasks, settings, output),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    write_text(log, ended.stdout + ended.stderr)
    results = sorted(output.rglob("*results.json"), key=lambda file: file.stat().st_mtime)
    if ended.returncode or not results:
        last = (ended.stderr.strip().splitlines() or ["no output"])[-1]
        raise ResourceError(
            f"evaluate.suites: lmms-eval ended with {ended.returncode}: {last[:300]}", f"Its log: {log}."
        )
    content = json.loads(results[-1].read_text(encoding="utf-8"))
    return scores_of(content["results"]), str(content.get("lmms_eval_version") or content.get("git_hash") or "unknown")
