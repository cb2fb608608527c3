"""Recipe keys of earlier versions: what replaced each, or why it was removed. Used only for the error message."""

from __future__ import annotations

from collections.abc import Mapping

TRAINER: Mapping[str, str] = {
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "adam_epsilon": "train.epsilon",
    "activation_checkpointing": "train.gradient_checkpointing",
    "auto_find_batch_size": "train.micro_batch_size",
    "bf16": "model.dtype",
    "chat_template_path": "model.chat_template",
    "data_seed": "train.data_seed",
    "dataloader_num_workers": "train.loader_workers",
    "deepspeed": "train.sharding (deepspeed)",
    "fp16": "model.dtype",
    "fsdp": "train.sharding",
    "full_determinism": "train.deterministic",
    "gradient_accumulation_steps": "train.batch_size with train.micro_batch_size",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "learning_rate": "train.learning_rate",
    "lr_scheduler_kwargs": "train.min_lr_ratio (scheduler: cosine_with_min_lr)",
    "lr_scheduler_type": "train.scheduler",
    "max_grad_norm": "train.max_grad_norm",
    "max_length": "train.max_length",
    "max_steps": "train.epochs",
    "num_train_epochs": "train.epochs",
    "optim": "train.optimizer",
    "optim_args": "train.momentum (sgd), train.betas and train.epsilon (adamw)",
    "output_dir": "--output",
    "per_device_train_batch_size": "train.micro_batch_size",
    "report_to": "train.report_to",
    "save_steps": "train.checkpoint_steps",
    "save_strategy": "train.checkpoint_minutes",
    "seed": "seed",
    "tf32": "train.tf32",
    "torch_compile": "train.compile",
    "trust_remote_code": "model.trust_remote_code",
    "use_cpu": "train.device",
    "warmup_ratio": "train.warmup_ratio",
    "warmup_steps": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
    # gone
    "logging_steps": "gone: every step is logged",
    "logging_strategy": "gone: every step is logged",
    "logging_first_step": "gone: every step is logged",
    "neftune_noise_alpha": "gone: noise on the embeddings would change the objective of a branch",
    "packing": "gone: rows are never packed, so that no two share a sequence",
    "run_name": "gone: the tracker's run is named after the recipe's folder",
    "project": "gone: the tracker's project is merit",
}
"""Keys of ``train.trainer``, which were passed to TRL's SFTConfig until version 0.1."""


def explain_trainer(given: object) -> str:
    """The message for a recipe that still has ``train.trainer``."""
    keys = list(given) if isinstance(given, Mapping) else []
    gone = "gone: branches are trained by a loop of our own, which does not have it"
    lines = [
        f"trainer.{key}: {where if where.startswith('gone') else f'now {where}'}"
        for key in map(str, keys)
        for where in [TRAINER.get(key, gone)]
    ]
    told = [f"{'; '.join(lines)}"] if lines else []
    return ". ".join(["trainer is gone, since branches are no longer trained by TRL", *told])
