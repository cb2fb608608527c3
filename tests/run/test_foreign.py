"""Branches for other people's trainers: rows and config as each documents them, and checkpoints taken back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests import builders
from tests.builders import Case, call, read, weights


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Case:
    """A run of two tiny groups, split; read-only."""
    case = builders.make_case(
        tmp_path_factory.mktemp("home"), base, split={"axes": 1, "method": "random"}, launch={"where": "detached"}
    )
    for task in list(builders.TASKS)[2:]:
        shutil.rmtree(case.folder / "mixture" / task)
    assert call("run", case.recipe, "--output", case.run, "--until", "split", "--quiet").code == 0
    return case


def exported(home: Case, folder: Path, tool: str) -> Path:
    found = call("branch", "export", home.run, 0, "--to", folder, "--format", tool)
    assert found.code == 0, found.err
    return folder


AXOLOTL = {
    *(
        "base_model",
        "datasets",
        "dataset_prepared_path",
        "val_set_size",
        "sequence_len",
        "sample_packing",
        "output_dir",
    ),
    *(
        "pad_to_sequence_len",
        "train_on_inputs",
        "micro_batch_size",
        "gradient_accumulation_steps",
        "num_epochs",
        "seed",
    ),
    *("learning_rate", "lr_scheduler", "warmup_ratio", "optimizer", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16"),
    *("weight_decay", "max_grad_norm", "fp16", "gradient_checkpointing", "saves_per_epoch", "logging_steps"),
    *("cosine_min_lr_ratio", "adapter", "load_in_4bit", "lora_r", "lora_alpha", "lora_dropout", "peft_use_rslora"),
    *("lora_target_linear", "lora_target_modules"),
}
"""Keys of axolotl's config schema (src/axolotl/utils/schemas) that are used; its validation refuses none of them."""
LLAMAFACTORY = {
    *("model_name_or_path", "stage", "do_train", "finetuning_type", "template", "tokenized_path", "cutoff_len", "seed"),
    "dataset",
    *("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "learning_rate"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("max_grad_norm", "bf16", "fp16", "report_to", "warmup_steps", "save_strategy", "logging_steps", "use_rslora"),
    *("disable_gradient_checkpointing", "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "quantization_bit"),
    *("quantization_type",),
}
"""Fields of LLaMA-Factory's arguments (src/llamafactory/hparams) and transformers' TrainingArguments that are used."""


@pytest.mark.parametrize("tool", ["axolotl", "llamafactory", "trl"])
def test_rows_and_budget_are_the_runs(home: Case, tmp_path: Path, tool: str) -> None:
    from datasets import load_from_disk

    from merit.mixture import load_split

    folder = exported(home, tmp_path / "out", tool)
    manifest = read(folder / "branch.json")
    rows: Any
    if tool == "llamafactory":
        rows = list(load_from_disk(str(folder / "data"))["train"])
    else:
        rows = [json.loads(line) for line in (folder / "data/train.jsonl").read_text().splitlines()]
    ours = [row for name in manifest["group"] for row in load_split(home.run / "mixture", "train")[name]]
    assert len(rows) == len(ours) == manifest["samples"]
    for theirs, mine in zip(rows, ours, strict=True):
        assert theirs["input_ids"] == mine.input_ids.tolist()
        assert np.array_equal(np.array(theirs["labels"]) != -100, mine.targets)
        assert len(theirs["attention_mask"]) == len(mine.input_ids)
    assert sum(label != -100 for row in rows for label in row["labels"]) == manifest["target_tokens"]
    readme = (folder / "README.md").read_text()
    assert "merit branch import" in readme


@pytest.mark.parametrize("adapters", [False, True])
def test_configs_have_the_keys_that_the_tools_document(home: Case, tmp_path: Path, adapters: bool) -> None:
    from merit.launch.tools import TOOLS
    from merit.launch.tools.job import ToolJob
    from merit.recipe.schema import ModelSettings, TrainSettings

    model = ModelSettings(base="b", trainable="lora" if adapters else "language")
    train = TrainSettings(batch_size=16, micro_batch_size=4, processes=2, scheduler="cosine_with_min_lr", epochs=2)
    job = ToolJob("a run, branch 0", "b", train, model, 7, 100)
    axolotl = yaml.safe_load(TOOLS["axolotl"].files(job)["axolotl.yaml"])
    assert axolotl.keys() <= AXOLOTL
    assert axolotl["datasets"] == [{"path": "data/train.jsonl", "ds_type": "json", "type": None}]
    factory = yaml.safe_load(TOOLS["llamafactory"].files(job)["llamafactory.yaml"])
    assert factory.keys() <= LLAMAFACTORY
    for config, rows, passes in ((axolotl, "micro_batch_size", "num_epochs"),):
        assert config[rows] * config["gradient_accumulation_steps"] * 2 == 16
        assert config[passes] == 2
    assert factory["per_device_train_batch_size"] * factory["gradient_accumulation_steps"] * 2 == 16
    assert (axolotl.get("lora_r"), factory.get("lora_rank")) == ((16, 16) if adapters else (None, None))
    script = TOOLS["trl"].files(job)["train.py"]
    compile(script, "train.py", "exec")
    assert ("LoraConfig" in script) == adapters


@pytest.mark.parametrize(
    "setting", ["train.scheduler=finch", "train.balancing=pcgrad", "train.save_second_moments=true"]
)
def test_training_that_no_tool_knows_is_not_handed_over(home: Case, tmp_path: Path, setting: str) -> None:
    run = tmp_path / "run"
    assert call("run", home.recipe, "--output", run, "--until", "split", "--quiet", "--set", setting).code == 0
    found = call("branch", "export", run, 0, "--to", tmp_path / "out", "--format", "trl")
    assert found.code == 2
    assert f"{setting.replace('=', ': ')} is not written for other tools" in found.err
    assert not (tmp_path / "out").exists()


def finish(home: Case, folder: Path, run: Path, *, epoch: float | None = 1.0) -> None:
    """A checkpoint as transformers' Trainer leaves it, with a base's weights moved a little."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = read(folder / "branch.json")["base_path"]
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(folder / "output")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "output")
    if epoch is not None:
        state = {"epoch": epoch, "global_step": 4, "log_history": [{"loss": 1.25}, {"train_loss": 9.0}]}
        (folder / "output" / "trainer_state.json").write_text(json.dumps(state))
    shutil.copytree(home.run, run)


def test_a_checkpoint_comes_back_and_weighs_what_it_was_trained_on(home: Case, tmp_path: Path) -> None:
    folder, run = exported(home, tmp_path / "out", "trl"), tmp_path / "run"
    finish(home, folder, run, epoch=0.5)
    found = call("branch", "import", run, folder)
    assert found.code == 0, found.err
    assert "0.50 passes, not 1" in " ".join(found.err.split())
    record, manifest = read(run / "branches/0/record.json"), read(folder / "branch.json")
    assert record["tokens"] == round(manifest["tokens"] / 2)
    assert (record["trained_by"], record["final_loss"], record["tokens_told_by"]) == ("trl", 1.25, "trainer_state.json")
    base, mine = weights(Path(manifest["base_path"])), weights(run / "branches/0/model")
    assert base.keys() == mine.keys()
    assert all(np.allclose(mine[name], base[name] + np.float32(0.01)) for name in base)
    assert call("train", run, "--branch", 1, "--launch", "local", "--quiet").code == 0
    merged = call("merge", run, "--json", "--quiet")
    assert merged.code == 0, merged.err
    other = read(run / "branches/1/record.json")["tokens"]
    assert json.loads(merged.out)["weights"][0] == pytest.approx(record["tokens"] / (record["tokens"] + other))


def test_what_does_not_belong_is_refused(home: Case, tmp_path: Path) -> None:
    folder, run = exported(home, tmp_path / "out", "axolotl"), tmp_path / "run"
    missing = call("branch", "import", home.run, folder)
    assert missing.code == 2
    assert "has not written its model there" in missing.err
    finish(home, folder, run, epoch=None)
    unknown = call("branch", "import", run, folder)
    assert unknown.code == 2
    assert "--tokens N" in unknown.err
    other = builders.make_base(tmp_path / "other", hidden=24)
    shutil.copy(folder / "branch.json", other / "branch.json")
    wrong = call("branch", "import", run, folder, "--checkpoint", other, "--tokens", 5)
    assert wrong.code == 2
    assert "hidden_size" in wrong.err or "in the base but" in wrong.err
    assert not (run / "branches").exists() or not (run / "branches/0/record.json").exists()
    changed = tmp_path / "changed"
    shutil.copytree(home.run, changed)
    recipe = (changed / "recipe.yaml").read_text().replace("learning_rate: 0.005", "learning_rate: 0.001")
    (changed / "recipe.yaml").write_text(recipe)
    stale = call("branch", "import", changed, folder, "--tokens", 5)
    assert stale.code == 2
    assert "settings.train.learning_rate: 0.005 -> 0.001" in stale.err
    assert call("branch", "import", run, folder, "--tokens", 5).code == 0
    assert read(run / "branches/0/record.json")["tokens"] == 5
    assert call("branch", "export", home.run, 0, "--to", tmp_path / "x", "--format", "unsloth").code == 2
