"""The recipe: every setting of a run, with its type, limits and unit; frozen.

It reads no files (:mod:`merit.recipe.load` does), no data and no models, and imports no ML library. Which settings determine
which stage's result is defined in :mod:`merit.run.key`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from merit.recipe.base import Name, Settings, refuse_adapters_in_list
from merit.recipe.diagnose import DiagnoseSettings
from merit.recipe.launch import LaunchSettings
from merit.recipe.merge import MergeSettings, SearchSettings
from merit.recipe.mixture import (
    Column,
    DataFormat,
    DatasetSettings,
    ImageSettings,
    MixtureSettings,
    UnrepresentableSettings,
)
from merit.recipe.model import LoraSettings, ModelSettings
from merit.recipe.study import StudySettings
from merit.recipe.suites import HarnessSettings
from merit.recipe.train import BetweenSettings, OuterSettings, Tracker, TrainSettings

__all__ = [
    "AssembleSettings",
    "BetweenSettings",
    "Column",
    "ConflictSettings",
    "DataFormat",
    "DatasetSettings",
    "DiagnoseSettings",
    "DriftSettings",
    "EvaluateSettings",
    "ImageSettings",
    "LaunchSettings",
    "LoraSettings",
    "MergeSettings",
    "MixtureSettings",
    "ModelSettings",
    "Name",
    "OuterSettings",
    "PreparationStageSettings",
    "PrepareSettings",
    "Recipe",
    "SearchSettings",
    "Settings",
    "SplitMethod",
    "SplitSettings",
    "StudySettings",
    "Tracker",
    "TrainSettings",
    "UnrepresentableSettings",
]

SplitMethod = Literal["pca", "raw_pca", "random", "kmeans", "conflict_induced", "joint"]


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
    """Buckets of the count sketch (float32 entries, a power of two): 262144 is 1 MB per dataset at any model size."""
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
    groups: Annotated[list[Annotated[list[Name], Field(min_length=1)]], Field(min_length=1)] | None = None
    """These groups of dataset names, instead of cutting; `merit add` and `merit remove` list them here."""
    cosine: Literal["plain", "corrected"] = "plain"
    """plain: cosines of the measured gradients (the paper's); corrected: without the sampling noise in their norms."""
    balance: Literal["samples", "tokens"] = "samples"
    """What the weighted medians balance: sample counts s_t (the paper's text) or target tokens n_t (its poster)."""


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
    unseen_folder: str | None = None
    """The same form: tasks that nobody trains on and that the base was not drilled in; they measure what carries over."""
    drift: DriftSettings = DriftSettings()
    """Divergence from the base on the base's own answers; needs no data."""
    suites: list[str] = []
    """Benchmarks: paper_text, paper_vision, tasks of lm-eval by name, tasks of lmms-eval as lmms/NAME, and your own as files
    (.jsonl of rows, or an lm-eval .yaml). They need the extra ``eval``; docs/evaluation.md."""
    harness: HarnessSettings = HarnessSettings()
    """How the suites are run."""


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
    launch: LaunchSettings = LaunchSettings()
    merge: MergeSettings = MergeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    diagnose: DiagnoseSettings = DiagnoseSettings()
    baselines: list[SplitMethod] = []
    """Other split methods to train and merge at the same budget, for comparison: joint and random are the usual two."""
    study: StudySettings = StudySettings()
    """Methods and seeds that `merit study` compares; no other command reads it."""

    @model_validator(mode="before")
    @classmethod
    def _stages_train_alike(cls, data: object) -> object:
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
        for pattern, listed in self.merge.listed_weights():
            if len(listed) != self.group_count:
                raise ValueError(
                    f"merge.weights lists {len(listed)} weights for {pattern}, the split makes {self.group_count} branches"
                )
        return self

    @model_validator(mode="after")
    def _rounds_are_possible(self) -> Self:
        if self.train.rounds == 1:
            return self
        if self.model.trainable == "lora":
            raise ValueError(
                "train.rounds above 1 cannot be combined with model.trainable: lora: after a round, adapters would belong "
                "to the merged model and no longer to model.base; use full fine-tuning, or rounds: 1"
            )
        if self.merge.operator not in ("average", "uniform", "task_arithmetic") or not self.merge.options.get(
            "normalize", True
        ):
            raise ValueError(
                "train.rounds above 1 needs a merge.operator that averages (average, uniform, or task_arithmetic with "
                f"normalize); {self.merge.operator} is relative to model.base, from which all branches moved together"
            )
        return self

    @property
    def rounds(self) -> int:
        """R; 1 for joint training, whose one branch has nothing to be merged with."""
        return 1 if self.split.method == "joint" else self.train.rounds

    @property
    def group_count(self) -> int:
        """K: the number of groups that the split must make."""
        if self.split.groups is not None:
            return len(self.split.groups)
        return 1 if self.split.method == "joint" else 2**self.split.axes
