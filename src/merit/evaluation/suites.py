"""Which benchmarks a suite stands for, and what each needs from outside. Data only; nothing is loaded or run here.

Source of the suites: Choi & Kim, arXiv 2606.01717, §5 and A.1: eight text benchmarks and eight vision-language ones. The
wider vision suite of its other comparisons is not among them; any task of lmms-eval is named ``lmms/TASK``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merit.errors import RecipeError, nearest
from merit.recipe.suites import OWN_TASK, HarnessSettings

__all__ = ["LMMS", "PAPER_TEXT", "PAPER_VISION", "SUITES", "Task", "check_suites", "expand", "local_tasks", "problems"]


@dataclass(frozen=True)
class Task:
    """One benchmark of a harness.

    Attributes:
        name: Its name in the harness.
        dataset: On the hub: what is downloaded when it is first used.
        gated: The dataset's terms must be accepted on the hub, with a token.
        judge: A judge model scores it.
        code: It runs code that the model wrote.
        metric: On the hub: what the harness fetches when it reads the task.
    """

    name: str
    dataset: str = ""
    gated: bool = False
    judge: bool = False
    code: bool = False
    metric: str = ""


PAPER_TEXT = (
    Task("mmlu", "cais/mmlu"),
    Task("gpqa_main_zeroshot", "Idavidrein/gpqa", gated=True),
    Task("hellaswag", "Rowan/hellaswag"),
    Task("winogrande", "allenai/winogrande"),
    Task("boolq", "aps/super_glue"),
    Task("xnli", "facebook/xnli"),
    Task("arc_challenge", "allenai/ai2_arc"),
    Task("humaneval", "openai/openai_humaneval", code=True, metric="evaluate-metric/code_eval"),
)
PAPER_VISION = (
    Task("seedbench", "lmms-lab-encoder/SEED-Bench"),
    Task("mmbench_en_dev", "lmms-lab-encoder/MMBench"),
    Task("llava_in_the_wild", "lmms-lab-encoder/llava-bench-in-the-wild", judge=True),
    Task("mmvet", "lmms-lab-encoder/MMVet", judge=True),
    Task("textvqa_val", "lmms-lab-encoder/textvqa"),
    Task("ai2d", "lmms-lab-encoder/ai2d"),
    Task("mathvista_testmini", "AI4Math/MathVista", judge=True),
    Task("mmmu_val", "lmms-lab-encoder/MMMU"),
)
SUITES: dict[str, tuple[Task, ...]] = {"paper_text": PAPER_TEXT, "paper_vision": PAPER_VISION}
"""Named suites. The vision suite is lmms-eval's; other single tasks of it are named ``lmms/TASK``."""
LMMS = "lmms/"
_KNOWN = {task.name: task for task in PAPER_TEXT}


def local_tasks(suites: Iterable[str]) -> list[Path]:
    """The user's own tasks among the suites."""
    return [Path(name) for name in suites if name.endswith(OWN_TASK)]


def expand(suites: Sequence[str]) -> tuple[list[Task], list[Task]]:
    """Tasks of lm-eval, and of lmms-eval; the user's own are not among them."""
    text: list[Task] = []
    vision: list[Task] = []
    own = {str(path) for path in local_tasks(suites)}
    for name in suites:
        if name in own or str(Path(name)) in own:
            continue
        if name == "paper_vision":
            vision += PAPER_VISION
        elif name.startswith(LMMS):
            short = name.removeprefix(LMMS)
            vision += [task for task in PAPER_VISION if task.name == short] or [Task(short)]
        else:
            text += SUITES.get(name, (_KNOWN.get(name, Task(name)),))
    return list(dict.fromkeys(text)), list(dict.fromkeys(vision))


def _absent(task: Task) -> list[str]:
    """What a task needs from the hub and the hub's cache on this machine does not have."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    metrics = Path(os.environ.get("HF_MODULES_CACHE", home / "modules")) / "evaluate_modules" / "metrics"
    found = []
    if task.dataset and not (hub / f"datasets--{task.dataset.replace('/', '--')}").is_dir():
        found.append(task.dataset)
    if task.metric and not (metrics / task.metric.replace("/", "--")).is_dir():
        found.append(f"the metric {task.metric}")
    return found


def problems(tasks: Iterable[Task], settings: HarnessSettings, *, token: bool) -> list[str]:
    """What is missing for tasks to run, one line each; with the network off also what the hub's cache lacks.

    Args:
        tasks: Of either harness.
        settings: The recipe's ``evaluate.harness``.
        token: Whether a hub token is there.
    """
    said = []
    offline = any(os.environ.get(name) in ("1", "true", "True") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    for task in tasks:
        if task.code and not settings.run_code:
            said.append(
                f"{task.name} runs code that the model wrote: set evaluate.harness.run_code: true on a machine where that "
                "may happen, or leave it out"
            )
        if task.gated and not token:
            said.append(
                f"{task.name} needs {task.dataset}, a gated dataset: accept its terms at "
                f"https://huggingface.co/datasets/{task.dataset} and set HF_TOKEN"
            )
        if task.judge and not (settings.judge and settings.judge_url):
            said.append(
                f"{task.name} is scored by a judge: set evaluate.harness.judge and judge_url (an OpenAI-compatible URL; a "
                "local server will do)"
            )
        said += [
            f"{task.name} needs {what}, which is not in this machine's cache, and the network is off (HF_HUB_OFFLINE): "
            "download it where there is one"
            for what in (_absent(task) if offline else [])
        ]
    return said


def check_suites(suites: Sequence[str]) -> None:
    """Refuse names of files that do not exist, and misspelt suites.

    Raises:
        RecipeError: The message names the nearest suite.
    """
    for path in local_tasks(suites):
        if not path.is_file():
            raise RecipeError(
                f"evaluate.suites: {path} does not exist.", "A task is a .jsonl of rows or an lm-eval .yaml."
            )
    for name in suites:
        if name.startswith("paper") and name not in SUITES:
            raise RecipeError(f"evaluate.suites: there is no suite {name!r}.{nearest(name, list(SUITES))}")


_BETTER_LOW = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


def headline(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """One figure per task for a table: its first metric that is better high; with several tasks also their plain mean.

    Args:
        scores: {task: {metric: value}}.

    Returns:
        ``{"piqa acc": 0.7, ..., "suites, mean": 0.6}``; tasks that have no such metric are left out.
    """
    found = {}
    for task, values in scores.items():
        for metric, value in values.items():
            if not metric.endswith("_stderr") and metric.partition("/")[0] not in _BETTER_LOW:
                found[f"{task} {metric}"] = value
                break
    return found | ({"suites, mean": sum(found.values()) / len(found)} if len(found) > 1 else {})
