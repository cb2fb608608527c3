"""The figures of an evaluation, typed: one model on one dataset, its averages, two models compared. No files, no maths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "PARTS",
    "Average",
    "Averages",
    "ByDataset",
    "Difference",
    "Drift",
    "Figures",
    "MeanDrift",
    "Metric",
    "ModelFigures",
    "Outcome",
    "Part",
    "Summary",
]

Part = Literal["mixture", "kept", "unseen"]
"""What the rows are: the mixture's test sets, what the base could already do, or tasks that nobody trains on."""
Metric = Literal["loss", "exact_match", "drift"]
Outcome = Literal["better", "worse", "unclear", "few"]

PARTS: tuple[Part, ...] = ("mixture", "kept", "unseen")
FORMAT = 2
"""Version of the files."""


@dataclass(frozen=True)
class Figures:
    """One model on one dataset.

    Attributes:
        loss: Nats per target token.
        exact_match: Share of rows; None if it was not measured.
        examples: Rows measured.
        target_tokens: Of these rows.
    """

    loss: float
    exact_match: float | None
    examples: int
    target_tokens: int


ByDataset = dict[str, Figures]
"""One model's figures by dataset."""


@dataclass(frozen=True)
class Drift:
    """How far a model has moved from the base on the base's own answers.

    Attributes:
        kl: Mean KL(base‖model) over tokens, nats.
        top1_agreement: Share of tokens at which base and model predict the same most likely token.
        tokens: Positions.
        prompts: Answers.
        kl_sums: KL of each answer, nats.
        token_counts: Tokens of each answer.
    """

    kl: float
    top1_agreement: float
    tokens: int
    prompts: int
    kl_sums: tuple[float, ...]
    token_counts: tuple[int, ...]


@dataclass(frozen=True)
class ModelFigures:
    """Everything measured for one model.

    Attributes:
        sets: Figures by dataset, for each part.
        drift: None if it was not measured.
        seconds: Time that measuring took.
        reused: It was measured by an earlier call.
    """

    sets: dict[Part, ByDataset]
    drift: Drift | None
    seconds: float
    reused: bool = False


@dataclass(frozen=True)
class Average:
    """One model over several datasets: ``loss`` and ``exact_match`` weigh datasets, ``pooled_loss`` weighs tokens."""

    loss: float
    exact_match: float | None
    pooled_loss: float
    datasets: int
    exact_match_datasets: int
    examples: int
    target_tokens: int


@dataclass(frozen=True)
class MeanDrift:
    """:class:`Drift` without its answers."""

    kl: float
    top1_agreement: float
    tokens: int
    prompts: int


@dataclass(frozen=True)
class Averages:
    """One model's averages; None if nothing was measured.

    Attributes:
        mixture: Over the mixture's datasets.
        kept: Over the kept sets.
        unseen: Over the unseen tasks.
        short: Over the mixture's datasets with short answers.
        long: Over its other datasets.
        drift: From the base.
        trained_target_tokens: Target tokens that the model was trained on, if known.
    """

    mixture: Average | None
    kept: Average | None
    short: Average | None
    long: Average | None
    drift: MeanDrift | None
    trained_target_tokens: int | None
    unseen: Average | None = None

    def of(self, part: Part) -> Average | None:
        """The average over one part's datasets."""
        return {"mixture": self.mixture, "kept": self.kept, "unseen": self.unseen}[part]


@dataclass(frozen=True)
class Difference:
    """Two models, paired by dataset (drift: by answer).

    Attributes:
        model: The model in question: merged.
        other: The model it is compared with.
        part: The part that the units are from.
        metric: The measure.
        difference: Mean of ``model`` − ``other``.
        ci95: Its 95 % bootstrap interval; None with fewer than two units.
        p: Two-sided p of this measure alone.
        p_holm: The same, corrected for the number of measures of the comparison; None if there are too few units.
        units: Datasets, or answers.
        wins: Units at which ``model`` is better.
        losses: Units at which it is worse.
        ties: Units without a difference.
        outcome: What may be said of ``model``.
    """

    model: str
    other: str
    part: Part
    metric: Metric
    difference: float
    ci95: tuple[float, float] | None
    p: float
    p_holm: float | None
    units: int
    wins: int
    losses: int
    ties: int
    outcome: Outcome


@dataclass(frozen=True)
class Summary:
    """The data for tables and verdict.

    Attributes:
        models: Names in the order of tables.
        about: Remark by model on how it was made, if not in the standard way.
        missing: Models that were expected but are not included, and why.
        method: Split method that ``merged`` was made with.
        seed: Of the bootstrap.
        short_answer_datasets: The mixture's datasets with short answers.
        macro: Averages by model.
        paired: The merged model against each other one.
    """

    models: tuple[str, ...]
    about: dict[str, str]
    missing: dict[str, str]
    method: str
    seed: int
    short_answer_datasets: tuple[str, ...]
    macro: dict[str, Averages]
    paired: tuple[Difference, ...]
    format: int = FORMAT
