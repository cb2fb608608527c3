"""The ``train`` block: how a branch is fine-tuned."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from merit.recipe.base import Settings
from merit.recipe.moved import explain_trainer

Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]


class OuterSettings(Settings):
    """The step from a round's start to the next one's, as in DiLoCo (arXiv 2311.08105); 1 and 0 are the merge itself."""

    scale: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Outer learning rate: share of the way from the round's start to its merge."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the earlier rounds' steps that is added to this one's."""
    nesterov: bool = True
    """Nesterov's momentum instead of the plain one; nothing without ``momentum``."""

    @property
    def is_merge(self) -> bool:
        """Whether the step ends at the merge."""
        return self.scale == 1 and self.momentum == 0


class BetweenSettings(Settings):
    """What happens between rounds (docs/rounds.md); nothing with ``rounds: 1``."""

    optimizer: Literal["keep", "reset"] | None = None
    """Optimizer state in a branch's next round: its own from the last one, or none. Default: keep; with resplit, reset."""
    resplit: bool = False
    """Measure the conflicts and split the mixture again at the start of every round after the first."""
    allow_missing: bool = False
    """Merge the branches that are trained and leave out those that failed, instead of stopping."""
    outer: OuterSettings = OuterSettings()
    """How far a round goes."""
    keep_files: bool = False
    """Keep the checkpoints of every round, instead of removing what the next rounds do not need."""

    @model_validator(mode="after")
    def _state_has_a_group(self) -> Self:
        if self.resplit and self.optimizer == "keep":
            raise ValueError(
                "optimizer: keep cannot be combined with resplit: true, which changes the branches' groups"
            )
        return self

    @property
    def keeps_optimizer(self) -> bool:
        """Whether a branch's optimizer state goes on in its next round."""
        return self.optimizer == "keep" or (self.optimizer is None and not self.resplit)


class TrainSettings(Settings):
    """One branch's fine-tuning; the same for every branch, and for joint training."""

    epochs: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Passes over a group's rows."""
    learning_rate: Annotated[float, Field(gt=0, lt=10)] = 1e-5
    """Peak learning rate."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Examples per optimizer step, over all devices of the branch."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Maximum examples per forward pass; gradients are accumulated up to ``batch_size``. On a CPU a step's rows are divided
    further, by length, which changes no gradient beyond rounding. Default: ``batch_size``."""
    rounds: Annotated[int, Field(ge=1, le=1000)] = 1
    """R: each branch trains 1/R of its steps, all are merged, and the next round starts from the merge (docs/rounds.md).
    1: the paper's single merge."""
    between: BetweenSettings = BetweenSettings()
    """What happens between rounds."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest example in tokens; longer ones are truncated at the end, and rows that lose all their targets are dropped and
    counted."""
    scheduler: Literal["linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup", "finch"] = "cosine"
    """Learning-rate schedule over the branch's own steps. finch: learning_rate over the square root of the training loss
    (arXiv 2605.20005), without warm-up; a baseline that forgets less (`merit study`)."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """For scheduler: cosine_with_min_lr. Learning rate at the end, as a share of the peak."""
    max_lr_ratio: Annotated[float, Field(gt=0)] = 2.5
    """For scheduler: finch. Highest learning rate, as a multiple of ``learning_rate``."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps with a linearly rising learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay; biases and norms have none."""
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit", "adamw_8bit_paged", "adafactor", "sgd"] = "adamw"
    """Optimizer; the 8-bit ones need bitsandbytes and a GPU."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """AdamW's ε."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SGD's momentum."""
    balancing: Literal["none", "pcgrad", "gradnorm"] = "none"
    """How the datasets' gradients of a step are joined. none: added; pcgrad, gradnorm: gradient surgery, a baseline for
    joint training of small models (`merit study`), since it needs every dataset's gradient at every step."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient-norm clip."""
    data_seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Seed of the row order. Default: the recipe's ``seed``."""
    gradient_checkpointing: bool = False
    """Trade a second forward pass for activation memory."""
    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes that train one branch together on this machine, one GPU each (or a share of the CPU's cores).
    ``batch_size`` is the number of examples per step over all of them, so the result equals that of one, up to rounding."""
    sharding: Literal["none", "fsdp2", "deepspeed"] = "none"
    """How the processes share memory. none: each holds everything (DDP); fsdp2: weights, gradients and optimizer state are
    sharded (PyTorch's FSDP2); deepspeed: gradients and optimizer state are sharded (ZeRO-2; needs deepspeed)."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 15.0
    """Minutes between resumable checkpoints; a checkpoint is also written when the process is told to stop."""
    checkpoint_steps: Annotated[int, Field(ge=1)] | None = None
    """Also write a resumable checkpoint every this many steps. Default: only by time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. Recorded, but not part of a stage's fingerprint."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads per branch. Default: OMP_NUM_THREADS, else the machine's cores over the branches trained in parallel."""
    loader_workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes that prepare batches ahead (decoding images) while the model trains; 0: none."""
    compile: bool = False
    """Compile the model with torch.compile."""
    tf32: bool = False
    """Let float32 matrix products on a GPU use TF32."""
    deterministic: bool = False
    """Use only deterministic GPU kernels, which bit-identical resuming on a GPU requires; slower."""
    report_to: list[Tracker] = []
    """Experiment trackers that also get every step's figures, through accelerate. Default: none."""
    save_dtype: Literal["base", "float32"] = "base"
    """Dtype of the branch's checkpoint: the base's own, or float32."""
    save_second_moments: bool = False
    """Also write AdamW's second moments (float32, four bytes per trained weight), which merge.operator: fisher needs."""

    @model_validator(mode="before")
    @classmethod
    def _earlier_keys(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        if data.get("trainer"):
            raise ValueError(explain_trainer(data["trainer"]))
        data = {key: value for key, value in data.items() if key != "trainer"}
        if str(data.get("optimizer", "")).startswith("adamw_torch"):  # transformers' names
            data["optimizer"] = data["optimizer"].replace("adamw_torch", "adamw")
        return data

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size ({micro})")
        if self.processes > self.batch_size:
            raise ValueError(f"batch_size ({self.batch_size}) must be at least processes ({self.processes})")
        if self.sharding != "none" and self.processes == 1:
            raise ValueError(f"sharding: {self.sharding} needs processes: 2 or more")
        if self.sharding != "none" and self.optimizer not in ("adamw", "adamw_fused", "sgd"):
            raise ValueError(
                f"optimizer: {self.optimizer} cannot be sharded by {self.sharding}; use adamw, adamw_fused or sgd"
            )
        if self.sharding == "deepspeed" and self.compile:
            raise ValueError("compile: true cannot be combined with sharding: deepspeed; leave one of them out")
        if self.save_second_moments and self.optimizer not in ("adamw", "adamw_fused"):
            raise ValueError(
                f"save_second_moments needs optimizer: adamw or adamw_fused; {self.optimizer} has none that can be read"
            )
        return self

    def deciding(self) -> dict[str, Any]:
        """The settings that decide a branch's weights, as JSON values: all but those on how and where to compute."""
        unused = set() if self.save_second_moments else {"save_second_moments"}
        unused |= {"balancing"} if self.balancing == "none" else set()
        unused |= {"max_lr_ratio"} if self.scheduler != "finch" else set()
        if self.rounds == 1:
            return self.model_dump(mode="json", exclude={*_HOW_TO_COMPUTE, *unused, "rounds", "between"})
        found = self.model_dump(mode="json", exclude={*_HOW_TO_COMPUTE, *unused})
        found["between"] = {key: found["between"][key] for key in ("resplit", "outer")}
        found["between"]["optimizer"] = "keep" if self.between.keeps_optimizer else "reset"
        return found


_HOW_TO_COMPUTE = (
    *("device", "threads", "processes", "sharding", "loader_workers", "compile", "tf32", "deterministic"),
    *("checkpoint_minutes", "checkpoint_steps", "report_to", "max_length"),  # max_length decides the rows
)
