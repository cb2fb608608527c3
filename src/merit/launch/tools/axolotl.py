"""axolotl: a config for rows that are tokenized already (no ``type``; input_ids, attention_mask, labels)."""

from __future__ import annotations

from typing import Any

import yaml

from merit.launch.tools.job import Tool, ToolJob


def _files(job: ToolJob) -> dict[str, str]:
    train, lora = job.train, job.model.lora
    config: dict[str, Any] = {
        "base_model": job.base,
        "datasets": [{"path": "data/train.jsonl", "ds_type": "json", "type": None}],
        "dataset_prepared_path": "prepared",
        "val_set_size": 0,
        "sequence_len": train.max_length,
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "train_on_inputs": False,
        "output_dir": "output",
        "micro_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "num_epochs": train.epochs,
        "learning_rate": train.learning_rate,
        "lr_scheduler": "cosine" if train.scheduler == "cosine_with_min_lr" else train.scheduler,
        "warmup_ratio": train.warmup_ratio,
        "optimizer": job.optimizer,
        "adam_beta1": train.betas[0],
        "adam_beta2": train.betas[1],
        "adam_epsilon": train.epsilon,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "bf16": job.bf16,
        "fp16": job.model.dtype == "float16" and train.device != "cpu",
        "gradient_checkpointing": train.gradient_checkpointing,
        "seed": job.seed,
        "saves_per_epoch": 1,
        "logging_steps": 1,
    }
    if train.scheduler == "cosine_with_min_lr":
        config["cosine_min_lr_ratio"] = train.min_lr_ratio
    if job.lora:
        config |= {
            "adapter": "qlora" if job.model.quantize == "4bit" else "lora",
            "load_in_4bit": job.model.quantize == "4bit",
            "lora_r": lora.rank,
            "lora_alpha": job.alpha,
            "lora_dropout": lora.dropout,
            "peft_use_rslora": lora.rslora,
        }
        linear = lora.target_modules == "all-linear"
        config |= {"lora_target_linear": True} if linear else {"lora_target_modules": lora.target_modules}
    head = f"# {job.title}: axolotl train axolotl.yaml. Written by merit; rows, budget and seed are the run's.\n"
    return {"axolotl.yaml": head + yaml.safe_dump(config, sort_keys=False, width=120)}


TOOL = Tool(
    "axolotl",
    "axolotl train axolotl.yaml",
    "jsonl",
    _files,
    "https://docs.axolotl.ai/docs/dataset-formats/tokenized.html and its config reference",
)
