"""TRL: a script with an ``SFTTrainer`` on rows that are tokenized already."""

from __future__ import annotations

import pprint
from typing import Any

from merit.launch.tools.job import Tool, ToolJob

_SCRIPT = '''"""Train {title} with TRL. Written by merit; rows, budget and seed are the run's."""

from datasets import load_dataset
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

BASE = {base!r}
SETTINGS = {settings}

model = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(BASE)
rows = load_dataset("json", data_files="data/train.jsonl", split="train")
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(output_dir="output", **SETTINGS),
    train_dataset=rows,
    processing_class=tokenizer,{adapters}
)
trainer.train()
trainer.save_model("output")
trainer.save_state()
'''


def _files(job: ToolJob) -> dict[str, str]:
    settings: dict[str, Any] = {
        **job.arguments(),
        "warmup_steps": job.train.warmup_ratio,  # below 1: a share of the steps
        "use_cpu": job.train.device == "cpu",
        "activation_checkpointing": job.train.gradient_checkpointing,
        "max_length": None,
        "packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},  # token ids and labels are given
        "save_strategy": "epoch",
        "logging_steps": 1,
    }
    del settings["gradient_checkpointing"]
    imports = adapters = ""
    if job.lora:
        lora = job.model.lora
        words = {
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": lora.target_modules,
            "use_rslora": lora.rslora,
            "task_type": "CAUSAL_LM",
        }
        imports = "from peft import LoraConfig\n"
        adapters = f"\n    peft_config=LoraConfig(**{words!r}),"
    shown = pprint.pformat(settings, width=100, sort_dicts=False)
    script = _SCRIPT.format(title=job.title, base=job.base, settings=shown, imports=imports, adapters=adapters)
    return {"train.py": script}


TOOL = Tool("TRL", "python train.py", "jsonl", _files, "https://huggingface.co/docs/trl/sft_trainer")
