"""What training a branch gives, as a typed record that is kept next to the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from merit.files import read_as, write_json

RESULT = "result.json"


@dataclass(frozen=True)
class RoundShare:
    """What one of several rounds added to a branch.

    Attributes:
        number: Of the round, from 1.
        of: How many rounds there are.
        target_tokens, tokens, samples, steps: As in :class:`BranchResult`, of this round alone.
    """

    number: int
    of: int
    target_tokens: int
    tokens: int
    samples: int
    steps: int


@dataclass(frozen=True)
class BranchResult:
    """A trained branch; with several rounds, its counts are of all rounds so far.

    Attributes:
        folder: The branch's folder: ``model`` (a Hugging Face checkpoint) and ``log.jsonl``.
        target_tokens: Target tokens actually trained on, over all epochs.
        tokens: All tokens of the rows trained on, padding aside.
        samples: Rows trained on, each as often as it was seen.
        steps: Optimizer steps.
        epochs: Passes over the group's rows, as asked for.
        rows: Rows of the group.
        seconds: Training time of all parts, loading and saving aside.
        peak_memory_bytes: Of this process on a CPU, of the device on a GPU.
        final_loss: Mean per target token (nats) over the last tenth of the steps; None if another tool trained it and
            does not say.
        threads: CPU threads per process.
        processes: Processes that trained it together.
        device: ``cpu``, or the GPU's name.
        resumed_from: Steps at which it was resumed after an interruption.
        warnings: What was noticed and may change the result.
        round: What this round added; None where there is only one.
    """

    folder: Path
    target_tokens: int
    tokens: int
    samples: int
    steps: int
    epochs: float
    rows: int
    seconds: float
    peak_memory_bytes: int
    final_loss: float | None
    threads: int
    processes: int
    device: str
    resumed_from: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    round: RoundShare | None = None

    @property
    def model(self) -> Path:
        """Its checkpoint folder."""
        return self.folder / "model"

    @property
    def of_round(self) -> BranchResult:
        """The same with the counts of its last round alone: what a merge of that round weighs."""
        if self.round is None:
            return self
        counts = {key: value for key, value in asdict(self.round).items() if key not in ("number", "of")}
        return replace(self, **counts)

    def facts(self) -> dict[str, Any]:
        """All but the folder, as JSON values."""
        left_out = ("folder",) if self.round else ("folder", "round")
        return {key: value for key, value in asdict(self).items() if key not in left_out}

    def save(self, folder: Path) -> None:
        """Write ``folder/result.json``."""
        write_json(folder / RESULT, self.facts() | {"folder": "."})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            RunFolderError: It is missing or damaged.
        """
        return cls(**{**vars(read_as(folder / RESULT, cls)), "folder": folder})
