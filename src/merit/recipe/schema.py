"""The recipe: every setting of a run, with its type, limits and unit; frozen.

It reads no files (:mod:`merit.recipe.load` does), no data and no models, and imports no ML library. Which settings determine
which stage's result is defined in :mod:`merit.run.key`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from merit.recipe.moved import explain_trainer

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=120)]
SplitMethod = Literal["pca", "raw_pca", "random", "kmeans", "conflict_induced", "joint"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]
DataFormat = Literal["auto", "messages", "prompt_completion", "alpaca", "flan", "sharegpt", "cauldron"]


Column = Literal[
    "messages", "conversations", "texts", "prompt", "completion", "response", "instruction", "input", "output", "inputs",
    "targets", "system", "history", "tools", "images", "image",
]  # fmt: skip
"""Columns that row formats know; ``response`` is another name for ``completion``."""


class Settings(BaseModel):
    """Base of every block: frozen, unknown keys refused, attribute docstrings become the schema's descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class LoraSettings(Settings):
    """Low-rank adapters; read only when ``model.trainable`` is ``lora``."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank r of every adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale numerator: the update is (alpha / rank) * B A, or alpha / sqrt(rank) with rslora."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability on the adapter's input, in training only."""
    target_modules: str | list[str] = "all-linear"
    """Module-name endings to adapt, or all-linear."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""


def refuse_adapters_in_list(trainable: str | list[str]) -> None:
    """``trainable: [lora, projector]`` would mean adapters and full weights in one branch, which is not supported.

    Raises:
        ValueError: The list names ``lora`` or ``all``.
    """
    if not isinstance(trainable, str) and (alone := [item for item in trainable if item in ("lora", "all")]):
        raise ValueError(f"trainable: {alone[0]} must be given alone, not in a list (trainable: {alone[0]})")


class ModelSettings(Settings):
    """The base (θ0): the one checkpoint that every branch starts from."""

    base: str
    """Folder of a Hugging Face checkpoint, or a hub id. A relative folder is looked up next to the recipe, then in the
    working directory."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); for hub ids only."""
    trainable: Literal["all", "lora", "language", "projector", "vision"] | Annotated[list[str], Field(min_length=1)] = (
        "language"
    )
    """What is trained. language: the language decoder, which is all of a text model and the paper's choice for a
    vision-language one; projector, vision: only that part of a vision-language model; all: every parameter; lora: low-rank
    adapters in the language decoder; or a list of roles and shell patterns over parameter names (such as ["projector",
    "model.layers.1?.*"]). Everything else stays frozen and bit-identical."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the forward and backward arithmetic on a GPU; weights and optimizer state are kept in float32 while
    training. On a CPU the arithmetic is always float32."""
    lora: LoraSettings = LoraSettings()
    """Adapter settings."""
    quantize: Literal["none", "4bit"] = "none"
    """4bit: train adapters on a base held in 4-bit NF4 (QLoRA; needs trainable: lora, a GPU and bitsandbytes). Gradients,
    merge and evaluation use the base as it is."""
    max_pixels: Annotated[int, Field(ge=784)] = 614656
    """Pixel limit (width x height) of an image as the model sees it (paper: 784 x 784); larger ones are scaled down by the
    base's own image processor. Families that scale every image to a fixed size (all but Qwen's) are not affected."""
    chat_template: str | None = None
    """File with a Jinja chat template to use instead of the base's own. Without either, a documented default is used."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Off unless you have read that code."""

    @model_validator(mode="after")
    def _adapters_alone(self) -> Self:
        refuse_adapters_in_list(self.trainable)
        if self.quantize != "none" and self.trainable != "lora":
            raise ValueError(f"quantize: {self.quantize} needs trainable: lora; quantized weights cannot be trained")
        return self

    def deciding(self) -> dict[str, Any]:
        """The settings that decide a branch's weights, the base aside, as JSON values."""
        keys = {"trainable", "dtype", *(("lora", "quantize") if self.trainable == "lora" else ())}
        return self.model_dump(mode="json", include=keys)


class DatasetSettings(Settings):
    """One dataset: the unit that is never split."""

    name: Name
    """Name in every table and file."""
    path: str
    """Training rows: a .jsonl, .json, .parquet or .csv file, a folder of such files, or a hub dataset id."""
    test: str | None = None
    """Held-out rows in the same form; without them the dataset is trained on but not scored."""
    format: DataFormat = "auto"
    """Row format; auto recognises it from the columns and says which it found."""
    split_by: str | None = None
    """Column that splits this source into one dataset per value, named NAME.VALUE; budgets apply to each."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    images: str | None = None
    """Folder that image paths in the rows are relative to and must stay in. Default: ``mixture.images.folder``, else the
    folder of the data file."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Sample budget: at most this many rows, drawn by seed. Default: all."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Token budget n_t: rows are drawn by seed until their target tokens reach this number. Default: all."""
    repeat: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each row within the budget is trained per epoch: 2.5 takes every row twice and half of them, drawn by seed,
    once more; 0.5 takes half of them."""
    columns: dict[Column, str] = {}
    """The rows' names for a format's columns: {prompt: question, response: answer} reads question as prompt."""


class UnrepresentableSettings(Settings):
    """What to do about text that the base's tokenizer cannot represent (dropped or unknown characters)."""

    max_share: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Share of a dataset's characters (train rows, prompts and answers) that may be lost before ``action`` applies."""
    action: Literal["warn", "leave_out", "error"] = "warn"
    """warn: keep the dataset and say so; leave_out: leave the whole dataset out of the mixture and say so; error: stop."""


class ImageSettings(Settings):
    """Images in the rows; read only for vision-language bases."""

    bad: Literal["error", "drop"] = "error"
    """An image that is missing, damaged, mislabelled or too large to be decoded safely: stop with its dataset and row, or
    drop the row and count it."""
    folder: str | None = None
    """Folder that image paths in the rows are relative to, if the dataset does not set one."""
    max_file_pixels: Annotated[int, Field(ge=1)] = 89478485
    """Maximum pixels of an image file; a larger one counts as bad (a small file can hold an image that fills the memory)."""


class MixtureSettings(Settings):
    """The datasets: exactly one of ``folder``, ``datasets``, or ``path`` with ``split_by``."""

    folder: str | None = None
    """Folder with one sub-folder per dataset, each with train.jsonl and optionally test.jsonl (.json, .parquet and .csv
    work too)."""
    datasets: list[DatasetSettings] | None = None
    """Datasets listed one by one."""
    path: str | None = None
    """One file that contains every dataset; ``split_by`` names the column that tells them apart."""
    test: str | None = None
    """Held-out rows for ``path``, with the same ``split_by`` column."""
    split_by: str | None = None
    """Column of ``path`` that names a row's dataset."""
    format: DataFormat = "auto"
    """Row format of ``folder`` or ``path``."""
    include: list[str] = ["*"]
    """Shell patterns over dataset names; a dataset is used when one matches."""
    exclude: list[str] = []
    """Shell patterns over dataset names to leave out, after ``include``."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Sample budget per dataset (rows), unless the dataset sets one. Default: all."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Target-token budget per dataset, unless the dataset sets one. Default: all."""
    temperature: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Mixing temperature T: datasets get rows in proportion to n^(1/T), n being their rows after budget and ``repeat``,
    at the same total. 1: unchanged; larger: towards equal shares, small ones repeated, large ones subsampled by seed."""
    columns: dict[Column, str] = {}
    """The rows' names for a format's columns, for ``folder`` and ``path``; listed datasets have their own."""
    min_rows: Annotated[int, Field(ge=0)] = 0
    """Leave out datasets with fewer usable training rows than this, and say which; budgets do not count against it."""
    bad_rows: Literal["error", "drop"] = "error"
    """A row without an assistant turn, with an unknown role or empty text: stop with its file and line, or drop and
    count it."""
    unrepresentable: UnrepresentableSettings = UnrepresentableSettings()
    """Text that the tokenizer cannot represent."""
    images: ImageSettings = ImageSettings()
    """Images in the rows."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("folder", "datasets", "path") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"give exactly one of folder, datasets, path (with split_by); found {found}")
        if (self.path is None) != (self.split_by is None):
            raise ValueError("path and split_by go together: path is the file, split_by its column of dataset names")
        if self.test is not None and self.path is None:
            raise ValueError("test goes with path; with folder or datasets each dataset has its own test file")
        if self.datasets is not None:
            if not self.datasets:
                raise ValueError("datasets is empty; list at least one")
            seen: set[str] = set()
            for dataset in self.datasets:
                if dataset.name in seen:
                    raise ValueError(f"two datasets are named {dataset.name!r}; names must differ")
                seen.add(dataset.name)
        return self


class ConflictSettings(Settings):
    """How the datasets' gradients at the base are measured (paper §4 step 1-2)."""

    examples: Annotated[int, Field(ge=2)] | Literal["auto"] = 200
    """Calibration sample per dataset (examples), drawn by seed; auto draws until ``target_reliability`` is reached."""
    target_reliability: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """For examples: auto. Expected cosine between the sample's gradient and the whole dataset's that ends the draw."""
    max_examples: Annotated[int, Field(ge=2)] = 1000
    """For examples: auto. Upper limit per dataset (examples)."""
    representation: Literal["sketch", "stride", "exact"] = "sketch"
    """sketch: count sketch of fixed size; stride: every s-th entry as in the paper; exact: the whole gradient."""
    sketch_size: Annotated[int, Field(ge=64, le=2**26)] = 262144
    """Buckets of the count sketch (float32 entries, a power of two): 262144 is 1 MiB per dataset at any model size."""
    stride: Annotated[int, Field(ge=1)] = 5
    """For representation: stride. Keep one entry in every s (paper: 5)."""
    weighting: Literal["examples", "tokens"] = "examples"
    """examples: mean over examples of the example's mean target-token loss; tokens: mean over target tokens."""
    batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Padded tokens per micro-batch; the result does not depend on it. Default: fitted to the device."""
    skip_bad: bool = False
    """Leave out datasets whose gradient is zero or non-finite, with a warning, instead of stopping."""
    cache: str | None = None
    """Folder of sketches shared between runs, keyed by content. Default: inside the run folder only."""

    @model_validator(mode="after")
    def _power_of_two(self) -> Self:
        if self.sketch_size & (self.sketch_size - 1):
            raise ValueError(f"sketch_size must be a power of two, found {self.sketch_size}")
        return self


class SplitSettings(Settings):
    """How the mixture is cut into K groups (paper §4 steps 3-4)."""

    method: SplitMethod = "pca"
    """pca: the paper's; raw_pca: on raw gradients; random, kmeans, conflict_induced: the paper's comparisons; joint: one
    group, the joint-training baseline."""
    axes: Annotated[int, Field(ge=1, le=6)] = 2
    """Conflict axes r; K = 2^r groups."""
    cosine: Literal["plain", "corrected"] = "plain"
    """plain: cosines of the measured gradients (the paper's); corrected: without the sampling noise in their norms."""
    balance: Literal["samples", "tokens"] = "samples"
    """What the weighted medians balance: sample counts s_t (the paper's text) or target tokens n_t (its poster)."""


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
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest example in tokens; longer ones are truncated at the end, and rows that lose all their targets are dropped and
    counted."""
    scheduler: Literal["linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup"] = "cosine"
    """Learning-rate schedule over the branch's own steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """For scheduler: cosine_with_min_lr. Learning rate at the end, as a share of the peak."""
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
            raise ValueError("compile: true does not go with sharding: deepspeed; leave one of them out")
        return self

    def deciding(self) -> dict[str, Any]:
        """The settings that decide a branch's weights, as JSON values: all but those on how and where to compute."""
        return self.model_dump(mode="json", exclude=set(_HOW_TO_COMPUTE))


_HOW_TO_COMPUTE = (
    *("device", "threads", "processes", "sharding", "loader_workers", "compile", "tf32", "deterministic"),
    *("checkpoint_minutes", "checkpoint_steps", "report_to", "max_length"),  # max_length decides the rows
)


class MergeSettings(Settings):
    """How the branches become one model (paper §4 step 6)."""

    operator: Literal["average", "uniform", "task_arithmetic", "ties", "star", "tsv", "iso_cts"] = "average"
    """average: the paper's weighted average; docs/merge.md describes the others."""
    weights: (
        Literal["tokens", "target_tokens", "samples", "uniform"]
        | Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)]
    ) = "tokens"
    """Branch weights w_k before normalisation. tokens: every trained token N_k, of prompt, image and answer (the paper's
    token budget); target_tokens: only those in the loss; samples: trained rows; uniform: 1/K; or a list, one weight per
    branch."""
    scale: Annotated[float, Field(ge=-10, le=10)] | Literal["auto"] = 1.0
    """λ of θ0 + λ τ; 1 is the plain merge, below 0 away from the branches; auto searches ``scales`` on held-out data."""
    scales: list[Annotated[float, Field(ge=0, le=10)]] = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    """For scale: auto. The grid of λ."""
    rule: Literal["balanced", "learned", "keep"] = "balanced"
    """For scale: auto. learned: lowest held-out loss on the mixture; keep: the same among the λ that cost at most 0.05
    nats per token on what the base knew; balanced: smallest maximum of the two regrets, each scaled to the grid's
    range."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] | None = None
    """Dtype of the merged model. Default: the base's, and branches of another dtype are refused; base: the base's, whatever
    the branches have."""
    options: dict[str, float | int | str | bool] = {}
    """Operator options (density, trim, eta, ...; docs/merge.md lists them)."""


class DriftSettings(Settings):
    """Divergence of a model from the base, on the base's own answers."""

    prompts: Annotated[int, Field(ge=0)] = 64
    """Held-out prompts, spread over the datasets; 0 turns the measure off."""
    tokens: Annotated[int, Field(ge=1)] = 48
    """Maximum length of a sampled answer in tokens."""


class EvaluateSettings(Settings):
    """What the models are measured on."""

    heldout: bool = True
    """Held-out loss and exact match on the mixture's test rows."""
    max_examples: Annotated[int, Field(ge=1)] | None = 200
    """Test rows per dataset, drawn by seed; null for all."""
    exact_match: Literal["auto", "always", "never"] = "auto"
    """Exact match of greedy answers; auto: for datasets whose test answers are short (``short_answer``)."""
    short_answer: Annotated[int, Field(ge=1)] = 32
    """A dataset counts as short-answer when nine in ten of its test answers have at most this many tokens."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Maximum length of a greedy answer in tokens."""
    batch_tokens: Annotated[int, Field(ge=1)] = 8192
    """Padded tokens per evaluation batch; figures do not depend on it beyond float rounding."""
    branches: bool = True
    """Also measure every branch on its own."""
    kept: list[DatasetSettings] = []
    """Datasets that the base is already good at and that are not trained on: they measure what was kept of the base."""
    kept_folder: str | None = None
    """The same as a folder with one sub-folder per dataset (test.jsonl)."""
    drift: DriftSettings = DriftSettings()
    """Divergence from the base on the base's own answers; needs no data."""
    suites: list[str] = []
    """Benchmark suites by name (lm-eval tasks). Reserved: a non-empty list is refused until adapters are available."""

    @model_validator(mode="after")
    def _no_suites_yet(self) -> Self:
        if self.suites:
            raise ValueError(
                "evaluate.suites is reserved: benchmark adapters are not built yet; use heldout, kept and drift, or run "
                "lm-eval on the merged/model folder"
            )
        return self


class AssembleSettings(Settings):
    """A starting model assembled from two checkpoints: ``model.base`` is its language model (docs/preparation.md)."""

    vision_from: str
    """Folder or hub id of a vision-language checkpoint, whose vision encoder, image processor and image tokens are used; or
    of a CLIP or SigLIP encoder, around which a LLaVA is built."""
    revision: str | None = None
    """Hub revision of ``vision_from``."""
    projector: Literal["copy", "new"] = "copy"
    """copy: the projector of ``vision_from``, whose output must fit the language model; new: initialised by seed."""


class PreparationStageSettings(Settings):
    """One stage of a preparation: training on its own mixture, starting where the previous stage ended."""

    name: Name
    """Name of the stage, in messages and as a folder: align, knowledge, instruct."""
    mixture: MixtureSettings
    """Its datasets, in the same form as the recipe's ``mixture``."""
    trainable: Literal["all", "language", "projector", "vision"] | Annotated[list[str], Field(min_length=1)] = (
        "language"
    )
    """What it trains, in the same form as ``model.trainable``."""

    @model_validator(mode="after")
    def _adapters_alone(self) -> Self:
        refuse_adapters_in_list(self.trainable)
        return self

    train: TrainSettings = TrainSettings()
    """Its hyperparameters. Keys not given here are taken from the recipe's ``train``."""

    @model_validator(mode="after")
    def _not_reserved(self) -> Self:
        if self.name == "assemble":
            raise ValueError(
                "a stage cannot be named assemble: that is the name of the step that joins the checkpoints"
            )
        return self


class PrepareSettings(Settings):
    """Makes a merge-ready base if there is none: ``prepared/base`` in the run folder replaces ``model.base`` in every
    later stage."""

    assemble: AssembleSettings | None = None
    """Join a vision encoder and ``model.base`` into the starting model. Default: start from ``model.base`` as it is."""
    stages: list[PreparationStageSettings] = []
    """LLaVA-style stages, one after another: 1 projector alignment, 1.5 knowledge learning, 2 instruction tuning."""

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if self.assemble is None and not self.stages:
            raise ValueError("give assemble, stages or both; without either there is nothing to prepare")
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are named {twice[0]!r}; names must differ")
        return self


class Recipe(Settings):
    """Every setting of a run. Unknown keys are errors; the resolved recipe is written into the run folder."""

    name: Name
    """Name of the run; the default run folder is runs/<name>."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random choice: calibration draw, sketch, random split, data order, sampling."""
    model: ModelSettings
    prepare: PrepareSettings | None = None
    """How to make the base first; without it ``model.base`` is used as it is."""
    mixture: MixtureSettings
    conflict: ConflictSettings = ConflictSettings()
    split: SplitSettings = SplitSettings()
    train: TrainSettings = TrainSettings()
    merge: MergeSettings = MergeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    baselines: list[SplitMethod] = []
    """Other split methods to train and merge at the same budget, for comparison: joint and random are the usual two."""

    @model_validator(mode="before")
    @classmethod
    def _stages_train_alike(cls, data: Any) -> Any:
        """Fill in every preparation stage's missing ``train`` settings from the recipe's own ``train``."""
        if not isinstance(data, dict) or not isinstance(data.get("prepare"), dict):
            return data
        own, stages = data.get("train"), data["prepare"].get("stages")
        if not isinstance(own, dict) or not isinstance(stages, list):
            return data
        filled = [
            {**stage, "train": {**own, **stage.get("train", {})}}
            if isinstance(stage, dict) and isinstance(stage.get("train", {}), dict)
            else stage
            for stage in stages
        ]
        return {**data, "prepare": {**data["prepare"], "stages": filled}}

    @model_validator(mode="after")
    def _baselines_differ(self) -> Self:
        if len(set(self.baselines)) != len(self.baselines):
            raise ValueError(f"baselines repeats a method: {self.baselines}")
        if self.split.method in self.baselines:
            raise ValueError(f"baselines names {self.split.method!r}, which is the run's own split.method")
        return self

    @model_validator(mode="after")
    def _one_weight_per_branch(self) -> Self:
        weights = self.merge.weights
        if not isinstance(weights, str) and len(weights) != self.group_count:
            raise ValueError(f"merge.weights lists {len(weights)} weights, the split makes {self.group_count} branches")
        return self

    @property
    def group_count(self) -> int:
        """K: the number of groups that the split must make."""
        return 1 if self.split.method == "joint" else 2**self.split.axes
