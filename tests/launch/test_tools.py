"""Files for other people's tools, read by those tools themselves where they are installed (docs/cluster.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from merit.errors import RecipeError
from merit.launch.elsewhere import Handover, kubernetes_job, sky_task
from merit.launch.tools import TOOLS
from merit.launch.tools.job import ToolJob
from merit.recipe.schema import ModelSettings, TrainSettings

CHECK = Path(__file__).parents[2] / "scripts" / "check_export.py"
ABSENT = 77


def read_by(tool: str, file: Path) -> None:
    """Have the tool read a file; skipped where it is not installed."""
    python = os.environ.get("MERIT_TOOLS_PYTHON", sys.executable)
    words = [python, str(CHECK), tool, str(file)]
    found = subprocess.run(words, cwd=file.parent, capture_output=True, text=True, check=False)
    if found.returncode == ABSENT:
        pytest.skip(f"{found.stderr.strip()} (MERIT_TOOLS_PYTHON: the Python of an environment that has it)")
    assert found.returncode == 0, found.stderr


def job(trainable: str, *, quantize: str = "none", alpha: float = 32.0, **train: object) -> ToolJob:
    lora = {"alpha": alpha, "rslora": alpha == 16}
    model = ModelSettings.model_validate(
        {"base": "base", "trainable": trainable, "quantize": quantize, "lora": lora, "dtype": "float32"}
    )
    settings = {"batch_size": 16, "micro_batch_size": 4, "epochs": 2, "device": "cpu", **train}
    return ToolJob("a run, branch 0", "base", TrainSettings.model_validate(settings), model, 7, 100)


JOBS = {
    "all weights": job("all", scheduler="cosine_with_min_lr", min_lr_ratio=0.1),
    "all weights, plain": job("language", scheduler="constant_with_warmup", optimizer="sgd", weight_decay=0.1),
    "adapters": job("lora", alpha=16, epochs=1.5, gradient_checkpointing=True),
    "quantized": job("lora", quantize="4bit", optimizer="adamw_8bit"),
}


@pytest.mark.parametrize("tool", ["axolotl", "llamafactory"])
def test_a_trainer_reads_its_config_with_the_values_that_were_meant(tool: str, tmp_path: Path) -> None:
    for name, made in JOBS.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, text in TOOLS[tool].files(made).items():
            (folder / file).write_text(text)
            read_by(tool, folder / file)


@pytest.mark.parametrize("base_is_local", [False, True])
def test_schedulers_read_their_files(base_is_local: bool, tmp_path: Path) -> None:
    handover = Handover("My run, branch 3", "3", "org/base", "f" * 64, False, base_is_local, 2)
    skipped = []
    for tool, text in (("kubernetes", kubernetes_job(handover)), ("skypilot", sky_task(handover))):
        file = tmp_path / f"{tool}.yaml"
        file.write_text(text)
        try:
            read_by(tool, file)
        except pytest.skip.Exception as absent:
            skipped.append(str(absent))
    if skipped:
        pytest.skip("; ".join(skipped))


@pytest.mark.parametrize("tool", ["axolotl", "llamafactory"])
def test_a_scale_that_a_trainer_would_round_is_refused(tool: str) -> None:
    with pytest.raises(RecipeError, match=r"model\.lora\.alpha is 8\.5"):
        TOOLS[tool].files(job("lora", alpha=8.5))
