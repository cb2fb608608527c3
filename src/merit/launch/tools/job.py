"""What a trainer is told of a branch, and what transformers' trainers have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from merit.errors import RecipeError
from merit.recipe.schema import ModelSettings, TrainSettings

_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_fused": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "adamw_8bit_paged": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
"""transformers' names (``OptimizerNames``)."""


@dataclass(frozen=True)
class ToolJob:
    """A branch, as a trainer is told of it.

    Attributes:
        title: Name of the branch.
        base: Folder or hub id of the base.
        train: The recipe's ``train``.
        model: The recipe's ``model``.
        seed: The recipe's seed.
        samples: Rows of the branch.
    """

    title: str
    base: str
    train: TrainSettings
    model: ModelSettings
    seed: int
    samples: int

    @property
    def micro_batch(self) -> int:
        """Rows per device and forward pass."""
        share = max(1, self.train.batch_size // self.train.processes)
        return min(self.train.micro_batch_size or share, share)

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step, so that a step has ``train.batch_size`` rows.

        Raises:
            RecipeError: It cannot have.
        """
        rows = self.micro_batch * self.train.processes
        if self.train.batch_size % rows:
            raise RecipeError(
                f"train.batch_size ({self.train.batch_size}) must be a multiple of {rows} rows, which its processes take "
                "at once.",
                "Set train.micro_batch_size and train.processes so that it is.",
            )
        return self.train.batch_size // rows

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of warm-up, counted as transformers' trainer counts steps."""
        steps = math.ceil(math.ceil(self.samples / self.train.batch_size) * self.train.epochs)
        return math.ceil(self.train.warmup_ratio * steps)

    @property
    def lora(self) -> bool:
        """Whether adapters are trained."""
        return self.model.trainable == "lora"

    @property
    def bf16(self) -> bool:
        """Whether the arithmetic is in bfloat16."""
        return self.model.dtype == "bfloat16" and self.train.device != "cpu"

    @property
    def optimizer(self) -> str:
        """transformers' name of the optimizer."""
        return _OPTIMIZERS[self.train.optimizer]

    @property
    def alpha(self) -> int:
        """The adapters' ``alpha``, for trainers that take whole numbers only.

        Raises:
            RecipeError: It is not one.
        """
        alpha = self.model.lora.alpha
        if not alpha.is_integer():
            raise RecipeError(
                f"model.lora.alpha is {alpha:g}, but this trainer takes whole numbers only.",
                "Change model.lora.alpha, or export with --format trl.",
            )
        return int(alpha)

    def arguments(self) -> dict[str, Any]:
        """Those of transformers' ``TrainingArguments`` on which its trainers agree."""
        train, floor = self.train, self.train.scheduler == "cosine_with_min_lr"
        return {
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "num_train_epochs": train.epochs,
            "learning_rate": train.learning_rate,
            "lr_scheduler_type": train.scheduler,
            **({"lr_scheduler_kwargs": {"min_lr_rate": train.min_lr_ratio}} if floor else {}),
            "optim": self.optimizer,
            "adam_beta1": train.betas[0],
            "adam_beta2": train.betas[1],
            "adam_epsilon": train.epsilon,
            "weight_decay": train.weight_decay,
            "max_grad_norm": train.max_grad_norm,
            "bf16": self.bf16,
            "fp16": self.model.dtype == "float16" and train.device != "cpu",
            "gradient_checkpointing": train.gradient_checkpointing,
            "seed": self.seed,
            "report_to": "none",
        }


@dataclass(frozen=True)
class Tool:
    """A trainer.

    Attributes:
        name: As people write it.
        command: Trains the branch, from within the exported folder.
        data: How its rows are stored: JSON Lines, or Arrow as ``datasets`` saves it.
        files: The files that tell it what to do, by name.
        source: Where its settings are documented.
    """

    name: str
    command: str
    data: Literal["jsonl", "arrow"]
    files: Callable[[ToolJob], Mapping[str, str]]
    source: str
