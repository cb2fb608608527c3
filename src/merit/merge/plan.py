"""The merge plan: everything that can be checked before tensor data is read, from headers and small files.

``plan_merge`` accounts for every tensor of the base and of every branch and lays out the output files; ``stream.run_merge``
then only moves bytes. Not covered: LoRA adapters (``merge.lora`` makes its own plan for the same stream).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from merit.errors import CheckpointError, MergeError, ResourceError
from merit.files import require_space
from merit.hf.checkpoint import Checkpoint, TensorInfo, WeightFile, read_headers
from merit.hf.dtypes import DTYPES, DType
from merit.hf.side_files import read_json
from merit.merge import agreement
from merit.merge.coefficients import check_branches, exact_coefficients, exact_scale
from merit.merge.moments import read_moments
from merit.merge.operators import MOMENTS, Operator, Options, operator_and_options
from merit.merge.result import Adapters
from merit.merge.weights import Branch
from merit.progress import count
from merit.recipe.schema import MergeSettings

__all__ = [
    "MergePlan",
    "OutputFile",
    "TensorPlan",
    "check_output",
    "check_space",
    "is_matrix",
    "lay_out",
    "output_dtype",
    "plan_merge",
]

_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_MARGIN = 64 << 20  # free bytes to leave on the disk
DEFAULT = MergeSettings()


@dataclass(frozen=True)
class TensorPlan:
    """How one output tensor is made.

    Attributes:
        out: Its place in the output file.
        sources: θ0's tensor and then each branch's (adapters of a LoRA merge are not included); then each branch's second
            moments, where the operator needs them.
        kind: ``linear``: Σ c_k x_k over ``coefficients`` (θ0 first); ``exact``: identical in all branches, copied;
            ``block``, ``entry``, ``matrix`` and ``tensor``: by the operator; ``compute``: by the plan's ``compute``.
    """

    out: TensorInfo
    sources: tuple[TensorInfo, ...]
    kind: Literal["linear", "exact", "block", "entry", "matrix", "tensor", "compute"]
    coefficients: tuple[Fraction, ...] = ()


@dataclass(frozen=True)
class OutputFile:
    """One output file: its header bytes, its size, and its tensors in the order of their data."""

    name: str
    header: bytes
    size: int
    tensors: tuple[TensorPlan, ...]


@dataclass(frozen=True)
class MergePlan:
    """A checked plan.

    Attributes:
        base: Headers of θ0.
        branches: The branches, in the order of the sum.
        heads: Their headers.
        moments: Headers of their second moments, if the operator needs these.
        operator, options, scale: How they are merged; the scale λ is exact.
        counts: Exact weights before normalisation.
        counts_by_pattern: The same for tensors whose names match a pattern.
        output: The folder to create.
        files: The output files.
        twins: (branch position, tensor, tensor) that must be equal byte for byte (tied copies).
        template: Chat template to add, or None.
        base_fingerprint: Recorded fingerprint of the base, if known (otherwise its data is read to compute it).
        dtype: The dtype name chosen for the output, or None: the base's.
        excluded: Names of branches that were left out.
        warnings: What the user should know.
        compute: For ``compute`` tensors: (base name, θ0 float64) → merged float64.
        update: For ``matrix`` tensors of adapters: (k from 0, base name, θ0 float64) → δ_k float64. None: θ_k is a source.
        adapters: Facts about LoRA branches for the result.
    """

    base: Checkpoint
    branches: tuple[Branch, ...]
    heads: tuple[Checkpoint, ...]
    operator: Operator
    options: Options
    scale: Fraction
    counts: tuple[Fraction, ...]
    output: Path
    files: tuple[OutputFile, ...]
    twins: tuple[tuple[int, TensorInfo, TensorInfo], ...] = ()
    template: str | None = None
    base_fingerprint: str | None = None
    dtype: str | None = None
    excluded: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    compute: Callable[[str, np.ndarray], np.ndarray] | None = None
    update: Callable[[int, str, np.ndarray], np.ndarray] | None = None
    adapters: Adapters | None = None
    counts_by_pattern: Mapping[str, tuple[Fraction, ...]] = field(default_factory=dict)
    moments: tuple[Checkpoint, ...] = ()

    @property
    def shares(self) -> list[float]:
        """w_k of the branches, float64, Σ w_k = 1."""
        return _shares(self.counts)

    @property
    def shares_by_pattern(self) -> dict[str, tuple[float, ...]]:
        """The same for tensors whose names match a pattern."""
        return {pattern: tuple(_shares(counts)) for pattern, counts in self.counts_by_pattern.items()}

    @property
    def output_bytes(self) -> int:
        """Size of the weight files to be written."""
        return sum(f.size for f in self.files)


def _shares(counts: Sequence[Fraction]) -> list[float]:
    total = sum(counts, Fraction(0))
    return [float(c / total) for c in counts]


def plan_merge(
    base: str | os.PathLike[str],
    branches: Sequence[Branch],
    output: str | os.PathLike[str],
    settings: MergeSettings = DEFAULT,
    *,
    excluded: Sequence[str] = (),
    base_fingerprint: str | None = None,
) -> MergePlan:
    """Check everything and plan the merge; reads headers, configs and tokenizers, never tensor data.

    Args:
        base: Folder of θ0: gives names, sharding, dtype, config and tokenizer of the result.
        branches: At least one.
        output: Folder to create; must not exist.
        settings: Operator, options, scale (a number) and dtype. Without a dtype all checkpoints must have the base's
            dtypes; with one, floating dtypes may differ.
        excluded: Names of branches that were left out on purpose: for card and record.
        base_fingerprint: Recorded fingerprint of the base; saves reading it if the operator does not need it.

    Raises:
        CheckpointError: A folder is missing or damaged.
        MergeError: The checkpoints are not compatible, or a setting is invalid.
        ResourceError: The disk is too full.
    """
    operator, options = operator_and_options(settings.operator, settings.options)
    counts, factor, target = check_branches(branches), exact_scale(settings.scale), output_dtype(settings.dtype)
    output = Path(output)
    check_output(output, [Path(base), *(b.path for b in branches)])
    base_head = read_headers(base, "model")
    heads = tuple(read_headers(b.path, "model") for b in branches)
    moments = read_moments(base_head, branches) if operator.name in MOMENTS else ()
    found, twins, warnings = [], [], []
    for k, (branch, head) in enumerate(zip(branches, heads, strict=True)):
        warnings += agreement.check_config(base_head.folder, head.folder, branch.name)
        warnings += agreement.check_tokenizer(base_head.folder, head.folder, branch.name)
        tensors, copies, notes = agreement.match_tensors(
            base_head, head, branch.name, any_float=settings.dtype is not None
        )
        found.append(tensors)
        twins += [(k, one, other) for one, other in copies]
        warnings += notes
    template, notes = agreement.common_chat_template(base_head.folder, {b.name: b.path for b in branches})
    warnings += notes
    if excluded:
        total = len(branches) + len(excluded)
        warnings.append(
            f"Partial merge: {len(branches)} of {count(total, 'branch')}, without {', '.join(excluded)}; weights "
            "renormalised."
        )
    floating = [tensor.name for tensor in base_head.tensors.values() if tensor.dtype.kind == "float"]
    coefficients = exact_coefficients(operator, options, branches, factor, floating)

    def tensor_plan(out: TensorInfo, old: TensorInfo) -> TensorPlan:
        sources = (old, *(tensors[old.name] for tensors in found))
        if old.dtype.kind != "float":
            return TensorPlan(out, sources, "exact")
        kind = operator.kind
        if kind == "matrix" and not is_matrix(old, options["matrix_scope"]):
            kind = "linear"
        if moments and old.name not in moments[0].tensors:  # not trained, so the same in all branches
            kind = "linear"
        elif moments:
            sources += tuple(head.tensors[old.name] for head in moments)
        return TensorPlan(out, sources, kind, coefficients.of(old.name) if kind == "linear" else ())

    files = lay_out(base_head, tensor_plan, target)
    check_space(output, sum(f.size for f in files))
    return MergePlan(
        base=base_head,
        branches=tuple(branches),
        heads=heads,
        operator=operator,
        options=options,
        scale=factor,
        counts=tuple(counts),
        counts_by_pattern=coefficients.weights,
        moments=moments,
        output=output,
        files=files,
        twins=tuple(twins),
        template=template,
        base_fingerprint=base_fingerprint,
        dtype=settings.dtype if target else None,
        excluded=tuple(excluded),
        warnings=tuple(warnings),
    )


def output_dtype(dtype: str | None) -> DType | None:
    """The dtype of all floating tensors of the output, None for the base's own."""
    return DTYPES[_DTYPE_NAMES[dtype]] if dtype in _DTYPE_NAMES else None


_TABLES = ("embed", "lm_head", "wte", "wpe", "shared.weight", "output.weight", "word_embeddings")
_CONVOLUTIONS = ("conv", "patch_embed")


def is_matrix(tensor: TensorInfo, scope: object) -> bool:
    """Linear weights (2-D) and stacks of them (3-D experts); token embeddings only with ``all2d``; convolutions never."""
    if len(tensor.shape) not in (2, 3) or min(tensor.shape) < 2:
        return False
    if len(tensor.shape) == 3 and any(word in tensor.name.lower() for word in _CONVOLUTIONS):
        return False
    if scope == "all2d":
        return len(tensor.shape) == 2
    return not any(word in tensor.name for word in _TABLES)


def check_output(output: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output folder that exists, or that overlaps an input."""
    if output.exists() or output.is_symlink():
        raise MergeError(
            f"{output} already exists.", "Choose another output folder, or remove it first. Nothing was written."
        )
    for path in inputs:
        one, other = output.resolve(), path.resolve()
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise MergeError(f"The output {output} overlaps the input {path}.", "Choose another output folder.")


def check_space(output: Path, needed: int) -> None:
    """ResourceError unless the disk of ``output`` has room for ``needed`` bytes and a margin, and is writable."""
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK):
        raise ResourceError(f"{parent} is not writable, so {output} cannot be created.")
    require_space(output, needed + _MARGIN, "the merged weights")


def lay_out(
    base: Checkpoint, plan: Callable[[TensorInfo, TensorInfo], TensorPlan], dtype: DType | None = None
) -> tuple[OutputFile, ...]:
    """The output files: the base's own sharding, tensor order, metadata and (unless ``dtype`` is given) dtypes.

    Args:
        base: Headers of θ0.
        plan: (place in the output, θ0's tensor) → how it is made.
        dtype: Dtype of all floating tensors, or None.
    """
    return tuple(_lay_out_file(file, plan, dtype) for file in base.files.values())


def _lay_out_file(
    file: WeightFile, plan: Callable[[TensorInfo, TensorInfo], TensorPlan], dtype: DType | None
) -> OutputFile:
    entries: dict[str, object] = {"__metadata__": file.metadata or {"format": "pt"}}
    places, end = [], 0
    for old in file.tensors:
        kind = dtype if dtype and old.dtype.kind == "float" else old.dtype
        size = old.size * kind.itemsize
        entries[old.name] = {"dtype": kind.tag, "shape": list(old.shape), "data_offsets": [end, end + size]}
        places.append((old, kind, end, size))
        end += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    tensors = tuple(
        plan(TensorInfo(old.name, kind, old.shape, file.name, len(header) + start, size), old)
        for old, kind, start, size in places
    )
    return OutputFile(file.name, header, len(header) + end, tensors)


def index_json(plan: MergePlan) -> dict[str, object] | None:
    """The shard index of the output, or None for a single file."""
    path = plan.base.folder / "model.safetensors.index.json"
    if not path.is_file():
        return None
    index = read_json(path)
    if "weight_map" not in index:
        raise CheckpointError(f"{path} has no weight_map.")
    size = sum(t.out.nbytes for f in plan.files for t in f.tensors)
    return {**index, "metadata": {**(index.get("metadata") or {}), "total_size": size}}
