"""A finished evaluation and its files.

::

    results.json   {model: {dataset: {loss, exact_match, examples, target_tokens}}} over the mixture's test sets
    kept.json      the same over the kept sets
    unseen.json    the same over the unseen tasks
    drift.json     {model: {kl, top1_agreement, tokens, prompts, kl_sums, token_counts}}
    summary.json   averages, paired differences with intervals, the verdict's sentences
    models/        one file per measured model, its greedy answers, the base's sampled answers
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from merit.evaluation.figures import ByDataset, Drift, Part, Summary
from merit.evaluation.verdict import Verdict, judge
from merit.files import read_as, write_json

__all__ = ["ANSWERS_OF_THE_BASE", "DRIFT", "FILES", "MODELS", "SUMMARY", "Evaluation", "answers_file"]

FILES: dict[Part, str] = {"mixture": "results.json", "kept": "kept.json", "unseen": "unseen.json"}
"""File of the figures of each part."""
DRIFT, SUMMARY, MODELS = "drift.json", "summary.json", "models"
ANSWERS_OF_THE_BASE = "answers-of-the-base.json"


def answers_file(model: str) -> str:
    """Name of the file in ``models/`` with a model's greedy answers."""
    return f"{model}.answers.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        sets: {model: {dataset: figures}} for each part.
        drift: By model; empty if it was not measured.
        summary: Averages and comparisons.
        reused: Models whose figures were measured by an earlier call; not saved.
        seconds: Time that measuring took, by model; not saved.
    """

    sets: dict[Part, dict[str, ByDataset]]
    drift: dict[str, Drift]
    summary: Summary
    reused: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def results(self) -> dict[str, ByDataset]:
        """Figures on the mixture's test sets, by model and dataset."""
        return self.sets["mixture"]

    @property
    def kept(self) -> dict[str, ByDataset]:
        """Figures on the kept sets, by model and dataset."""
        return self.sets["kept"]

    @property
    def unseen(self) -> dict[str, ByDataset]:
        """Figures on the unseen tasks, by model and dataset."""
        return self.sets.get("unseen", {})

    @property
    def verdict(self) -> Verdict:
        """What may be said of the merged model; ``print`` it for plain sentences."""
        return judge(self.summary)

    def save(self, folder: Path) -> None:
        """Write the files above into ``folder``."""
        for part, name in FILES.items():
            by_model = self.sets.get(part, {}).items()
            write_json(folder / name, {model: {k: asdict(v) for k, v in found.items()} for model, found in by_model})
        write_json(folder / DRIFT, {model: asdict(found) for model, found in self.drift.items()})
        write_json(folder / SUMMARY, {**asdict(self.summary), "verdict": self.verdict.sentences})

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Read what :meth:`save` wrote.

        Raises:
            RunFolderError: A file is missing, damaged, or not from an evaluation.
        """
        return cls(
            {part: _figures(folder / name, part) for part, name in FILES.items()},
            read_as(folder / DRIFT, dict[str, Drift]),
            read_as(folder / SUMMARY, Summary),
        )


def _figures(file: Path, part: Part) -> dict[str, ByDataset]:
    if part == "unseen" and not file.exists():  # an evaluation of before there were unseen tasks
        return {}
    return read_as(file, dict[str, ByDataset])
