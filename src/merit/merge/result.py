"""What a merge returns, and its record ``merge.json`` next to the weights. Storage only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from merit.files import read_as, write_json
from merit.merge.searched import WeightSearch
from merit.merge.weights import ScaleSearch

__all__ = ["RECORD", "Adapters", "Displacements", "MergeResult", "Source", "WrittenFile"]

RECORD = "merge.json"
"""Record of a merge, next to the weights."""

Number = int | float


@dataclass(frozen=True)
class Source:
    """The base or a branch that was merged: its name, folder and content fingerprint (None if it was not read)."""

    name: str
    path: str
    fingerprint: str | None


@dataclass(frozen=True)
class WrittenFile:
    """One weight file: its size, and the digest of its tensors."""

    bytes: int
    digest: str


@dataclass(frozen=True)
class Adapters:
    """Facts about a merge of LoRA adapters.

    Attributes:
        mode: ``full`` (a checkpoint), ``concat`` or ``recompress`` (an adapter).
        ranks: ``full``: largest rank by branch; otherwise the new adapter's rank by module.
        relative_error: ``recompress``: norm of the dropped singular values over the norm of all, for the whole model.
        relative_errors: The same by tensor.
    """

    mode: str
    ranks: Mapping[str, int]
    relative_error: float = 0.0
    relative_errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Displacements:
    """How far models lie from the base, over the weights that training may change.

    Attributes:
        base: ‖θ0‖₂ of these weights.
        branches: ‖θ_k − θ0‖₂ of every branch.
        merged: ‖θ − θ0‖₂ of the merged model.
    """

    base: float
    branches: tuple[float, ...]
    merged: float

    def relative(self, norm: float) -> float | None:
        """A displacement over ‖θ0‖; None if the base is zero."""
        return norm / self.base if self.base else None

    def rest(self, weights: Sequence[float]) -> float | None:
        """The merge's displacement over the branches' root mean square √(Σ w_k‖θ_k − θ0‖²); None if no branch moved."""
        square = sum(weight * norm**2 for weight, norm in zip(weights, self.branches, strict=True))
        return self.merged / square**0.5 if square > 0 else None


@dataclass(frozen=True)
class MergeResult:
    """A merged checkpoint (or adapter) and how it was made.

    Attributes:
        operator, options, scale: How the branches were merged; scale is λ of θ0 + λ τ.
        weights: w_k over the branches, Σ w_k = 1.
        counts: The weights before normalisation.
        counted: What ``counts`` counts: tokens, target_tokens, samples, uniform, auto (searched coefficients);
            or given.
        base, branches: The inputs.
        model_fingerprint: Content fingerprint of the result.
        files: The weight files by name.
        arithmetic: What did the arithmetic: ``kernel`` (compiled), ``numpy`` (the same bits, slower), or both.
        statistics: What the operator reports.
        excluded: Branches that were left out.
        warnings: What the user should know.
        merge_seconds: Wall time of the merge.
        adapters: For LoRA branches.
        scale_search: For ``scale: auto``: the curve from which λ was chosen.
        weight_search: For ``weights: auto``: every measured point, and the mixture that the weights stand for.
        weights_by_pattern: w_k for tensors whose names match a pattern; the others have ``weights``.
        displacements: How far base, branches and result lie apart; measured in runs.
        folder: Its folder.
    """

    operator: str
    options: Mapping[str, str | Number | bool]
    scale: float
    weights: tuple[float, ...]
    counts: tuple[Number, ...]
    counted: str
    base: Source
    branches: tuple[Source, ...]
    model_fingerprint: str
    files: Mapping[str, WrittenFile]
    arithmetic: str = "numpy"
    statistics: Mapping[str, Number | list[float] | dict[str, Number]] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    merge_seconds: float = 0.0
    adapters: Adapters | None = None
    scale_search: ScaleSearch | None = None
    weight_search: WeightSearch | None = None
    weights_by_pattern: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    displacements: Displacements | None = None
    folder: Path = Path()

    def record(self) -> dict[str, object]:
        """Plain JSON values of everything but the folder."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}

    def save(self, folder: Path) -> None:
        """Write the record into ``folder``, which may still be unfinished."""
        write_json(folder / RECORD, self.record(), durable=False)

    @classmethod
    def load(cls, folder: Path) -> MergeResult:
        """Read the record of a merged folder.

        Raises:
            RunFolderError: It is missing, or not the record of a merge.
        """
        return replace(read_as(folder / RECORD, cls), folder=folder)
