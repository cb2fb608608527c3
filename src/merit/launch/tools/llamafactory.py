"""LLaMA-Factory: a config that reads rows which are tokenized already (``tokenized_path``)."""

from __future__ import annotations

from typing import Any

import yaml

from merit.launch.tools.job import Tool, ToolJob


def _files(job: ToolJob) -> dict[str, str]:
    lora = job.model.lora
    config: dict[str, Any] = {
        "model_name_or_path": job.base,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora" if job.lora else "full",
        "template": "empty",  # the rows are tokenized; it would only add what the base has already
        "dataset": "merit",  # asked for, and not read: what lies in tokenized_path takes its place
        "tokenized_path": "data",
        "cutoff_len": job.train.max_length,
        "output_dir": "output",
        **job.arguments(),
        "warmup_steps": job.warmup_steps,  # warmup_ratio is gone from newer versions of transformers
        "save_strategy": "epoch",
        "logging_steps": 1,
    }
    config["disable_gradient_checkpointing"] = not config.pop("gradient_checkpointing")
    if job.lora:
        config |= {
            "lora_rank": lora.rank,
            "lora_alpha": job.alpha,
            "lora_dropout": lora.dropout,
            "use_rslora": lora.rslora,
            "lora_target": "all" if lora.target_modules == "all-linear" else _comma(lora.target_modules),
        }
        if job.model.quantize == "4bit":
            config |= {"quantization_bit": 4, "quantization_type": "nf4"}
    head = (
        f"# {job.title}: llamafactory-cli train llamafactory.yaml. Written by merit; rows and budget are the run's.\n"
    )
    return {"llamafactory.yaml": head + yaml.safe_dump(config, sort_keys=False, width=120)}


def _comma(modules: str | list[str]) -> str:
    return modules if isinstance(modules, str) else ",".join(modules)


TOOL = Tool(
    "LLaMA-Factory",
    "llamafactory-cli train llamafactory.yaml",
    "arrow",
    _files,
    "src/llamafactory/hparams of its repository (data_args, finetuning_args, model_args)",
)
