"""Merging LoRA adapters by their full update: into a checkpoint, into one concatenated adapter, or recompressed to a rank.

The weighted mean of the ΔW_k = s_k B_k A_k is exact as full weights (θ0 + λ Σ w_k ΔW_k, rounded once) and as one adapter of
rank ΣR_k: [w_1 s_1 B_1 … w_K s_K B_K] · [A_1; …; A_K]. Averaging the A's and B's separately gives other cross terms and is
not offered: (Σ w_k B_k)(Σ w_k A_k) ≠ Σ w_k B_k A_k.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from merit.errors import CheckpointError, MergeError
from merit.files import building, write_bytes, write_text
from merit.hf.checkpoint import TensorInfo, fingerprint, read_headers, read_tensor, weights_digest
from merit.hf.side_files import copy_files, input_files, processor_files
from merit.merge.adapter import Adapter, module_of, rank_of, read_adapters
from merit.merge.agreement import common_processor
from merit.merge.coefficients import check_branches, exact_coefficients, exact_scale
from merit.merge.operators import operator_and_options
from merit.merge.plan import (
    DEFAULT,
    MergePlan,
    TensorPlan,
    check_output,
    check_space,
    is_matrix,
    lay_out,
    output_dtype,
)
from merit.merge.result import Adapters, MergeResult, Source, WrittenFile
from merit.merge.weights import Branch
from merit.progress import Progress, silent
from merit.recipe.schema import MergeSettings

__all__ = ["merge_into_adapter", "plan_adapter_merge"]


def plan_adapter_merge(
    base: str | os.PathLike[str],
    adapters: Sequence[Branch],
    output: str | os.PathLike[str],
    settings: MergeSettings = DEFAULT,
    *,
    excluded: Sequence[str] = (),
) -> MergePlan:
    """Plan the merge of adapters into a full checkpoint: round(θ0 + λ τ) with one rounding; run it with ``run_merge``.

    Linear operators give τ = Σ c_k s_k B_k A_k; ``star``, ``tsv`` and ``iso_cts`` act on the dense ΔW_k of
    the tensors that are matrices by their ``matrix_scope``, adapted or saved in full, and average the rest uniformly.

    Args:
        base: Folder of θ0.
        adapters: Branches whose ``path`` is a PEFT adapter folder.
        output, excluded: As in ``plan_merge``.
        settings: As in ``plan_merge``; ``ties`` needs full checkpoints.

    Raises:
        CheckpointError, MergeError, ResourceError: As ``plan_merge``.
    """
    operator, options = operator_and_options(settings.operator, settings.options)
    if operator.kind in ("block", "entry", "tensor"):
        raise MergeError(
            f"Operator {operator.name} needs whole weights; merge each adapter into full weights first "
            "(merit merge --base BASE --checkpoint ADAPTER=1 --output FULL)."
        )
    counts, factor, target = check_branches(adapters), exact_scale(settings.scale), output_dtype(settings.dtype)
    check_output(Path(output), [Path(base), *(b.path for b in adapters)])
    head = read_headers(base, "model")
    parts, warnings = read_adapters(head, adapters)
    touched = {name for p in parts for name in (*p.pairs, *p.full, *p.shifts)}

    def tensor_plan(out: TensorInfo, old: TensorInfo) -> TensorPlan:
        if old.dtype.kind != "float":
            return TensorPlan(out, (old,), "exact")
        if old.name not in touched:
            return TensorPlan(out, (old,), "linear", (Fraction(1),))
        matrix = operator.kind == "matrix" and is_matrix(old, options["matrix_scope"])
        return TensorPlan(out, (old,), "matrix" if matrix else "compute")

    exact = exact_coefficients(operator, options, adapters, Fraction(1), sorted(touched))

    def compute(name: str, theta: np.ndarray) -> np.ndarray:
        tau, coefficients = np.zeros_like(theta), [float(c) for c in exact.of(name)[1:]]
        for c, part in zip(coefficients, parts, strict=True):
            if name not in part.pairs:
                tau += c * part.update(name, theta)
        if name in parts[0].pairs:
            tau += np.matmul(*_stack(parts, coefficients, name))
        return theta + float(factor) * tau

    files = lay_out(head, tensor_plan, target)
    check_space(Path(output), sum(f.size for f in files))
    return MergePlan(
        base=head,
        branches=tuple(adapters),
        heads=(),
        operator=operator,
        options=options,
        scale=factor,
        counts=tuple(counts),
        counts_by_pattern=exact.weights,
        output=Path(output),
        files=files,
        dtype=settings.dtype if target else None,
        excluded=tuple(excluded),
        warnings=tuple(warnings),
        compute=compute,
        update=lambda k, name, theta: parts[k].update(name, theta),
        adapters=Adapters("full", {p.branch.name: rank_of(p) for p in parts}),
    )


def _stack(parts: Sequence[Adapter], coefficients: Sequence[float], name: str) -> tuple[np.ndarray, np.ndarray]:
    """[c_1 s_1 B_1 … c_K s_K B_K] (m, ΣR) and [A_1; …; A_K] (ΣR, n): their product is Σ c_k ΔW_k."""
    factors = [part.factors(name) for part in parts]
    left = np.concatenate([c * b for c, (b, _) in zip(coefficients, factors, strict=True)], axis=1)
    return left, np.concatenate([a for _, a in factors], axis=0)


def merge_into_adapter(
    base: str | os.PathLike[str],
    adapters: Sequence[Branch],
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    scale: float = 1.0,
    progress: Progress = silent,
) -> MergeResult:
    """Merge adapters into one adapter folder (float32) by their weighted mean.

    Args:
        base: Folder of θ0 (only headers are read, to check that every tensor fits).
        adapters: Branches whose ``path`` is a PEFT adapter folder.
        output: Folder to create.
        rank: None: the exact mean, of rank ΣR_k (rank R if all A_k are identical, as when A is frozen at a common
            start). Otherwise its best approximation of that rank, with the error reported. There is no good default:
            independent branches lose most of the merge at one branch's rank.
        scale: λ.
        progress: In modules.

    Raises:
        MergeError: The adapters cannot be merged this way.
        ResourceError: The disk is too full.
    """
    started = time.perf_counter()
    counts, factor, output = check_branches(adapters), exact_scale(scale), Path(output)
    check_output(output, [Path(base), *(b.path for b in adapters)])
    head = read_headers(base, "model")
    parts, warnings = read_adapters(head, adapters)
    if parts[0].full and factor != 1:
        raise MergeError(
            "A scale other than 1 needs θ0 for tensors saved in full (modules_to_save, bias): merge to a checkpoint."
        )
    check_space(output, sum(4 * t.size for p in parts for t in p.head.tensors.values()))
    shares = [c / sum(counts, Fraction(0)) for c in counts]
    joint = _join(parts, [float(factor * w) for w in shares], rank, progress)
    with building(output) as temporary:
        _write_adapter(temporary, joint.tensors, _joint_config(parts[0].config, joint.ranks))
        folders = [part.branch.path for part in parts]
        images = {**processor_files(head.folder), **common_processor(head.folder, folders)}
        copy_files({**input_files(folders[0]), **images}, temporary)
        written = read_headers(temporary, "adapter_model")
        result = MergeResult(
            folder=output,
            operator="average",
            options={},
            scale=float(factor),
            weights=tuple(float(w) for w in shares),
            counts=tuple(int(c) if c.denominator == 1 else float(c) for c in counts),
            counted=adapters[0].counted or "given",
            base=Source(head.folder.name, str(head.folder), None),
            branches=tuple(Source(b.name, str(b.path), fingerprint(b.path)) for b in adapters),
            model_fingerprint=fingerprint(temporary),
            files={name: WrittenFile(file.size, weights_digest(written)) for name, file in written.files.items()},
            warnings=tuple(warnings),
            merge_seconds=round(time.perf_counter() - started, 3),
            adapters=Adapters(
                "concat" if rank is None else "recompress", joint.ranks, joint.relative_error, joint.relative_errors
            ),
        )
        result.save(temporary)
        check_output(output, [])
    return result


@dataclass(frozen=True)
class _Joint:
    """A merged adapter's tensors by name on disk, its ranks by module, and norms (dropped, whole) by base tensor."""

    tensors: dict[str, np.ndarray]
    ranks: dict[str, int]
    norms: dict[str, tuple[float, float]]

    @property
    def relative_errors(self) -> dict[str, float]:
        return {name: (dropped / whole if whole else 0.0) for name, (dropped, whole) in self.norms.items()}

    @property
    def relative_error(self) -> float:
        dropped, whole = (float(np.sqrt(sum(norm[i] ** 2 for norm in self.norms.values()))) for i in (0, 1))
        return dropped / whole if whole else 0.0


def _join(parts: Sequence[Adapter], coefficients: Sequence[float], rank: int | None, progress: Progress) -> _Joint:
    joint = _Joint({}, {}, {})
    for done, (name, pair) in enumerate(parts[0].pairs.items()):
        progress(done, len(parts[0].pairs), name)
        left, right, dropped, norm = _joint_factors(parts, coefficients, name, rank)
        if pair.transposed:  # back to the adapter's orientation
            left, right = right.T, left.T
        joint.ranks[module_of(pair.a)], joint.norms[name] = right.shape[0], (dropped, norm)
        joint.tensors[pair.a], joint.tensors[pair.b] = right, left
    for sources in ({n: (d, 1.0) for n, d in parts[0].full.items()}, parts[0].shifts):
        for name, (disk, _) in sources.items():
            terms = [(p.full[name], 1.0) if name in p.full else p.shifts[name] for p in parts]
            joint.tensors[disk] = sum(
                (c * s * p.values(d) for c, p, (d, s) in zip(coefficients, parts, terms, strict=True)), np.zeros(())
            )
    return joint


def _joint_factors(
    parts: Sequence[Adapter], coefficients: Sequence[float], name: str, rank: int | None
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Factors of Σ c_k ΔW_k, the norm of what was dropped, and the norm of the whole; without forming the matrix."""
    left, right = _stack(parts, coefficients, name)
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    whole = float(np.linalg.norm(s))
    if rank is None:
        factors = [part.factors(name) for part in parts]
        if len(factors) > 1 and all(np.array_equal(a, factors[0][1]) for _, a in factors):
            return (
                sum((c * b for c, (b, _) in zip(coefficients, factors, strict=True)), np.zeros(())),
                factors[0][1],
                0.0,
                whole,
            )
        return left, right, 0.0, whole
    root = np.sqrt(s[:rank])
    return (
        q_left @ (u[:, :rank] * root),
        (root[:, None] * vt[:rank]) @ q_right.T,
        float(np.linalg.norm(s[rank:])),
        whole,
    )


def _joint_config(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The adapter config with scale 1 everywhere: α = r by module, no rsLoRA (its √r is already in B)."""
    common = max(ranks.values(), default=1)
    odd = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != common}
    return {
        **config,
        **{"r": common, "lora_alpha": common, "use_rslora": False, "rank_pattern": odd, "alpha_pattern": odd},
        **{"init_lora_weights": True, "inference_mode": True},
    }


def _write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, object]) -> None:
    """Write the adapter's files and read the tensors back."""
    values = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    if not all(np.isfinite(v).all() for v in values.values()):
        raise MergeError("The merged adapter overflows float32. Nothing was written.")
    write_bytes(folder / "adapter_model.safetensors", save(values, {"format": "pt"}), durable=False)
    head = read_headers(folder, "adapter_model")
    if not all(np.array_equal(read_tensor(head, name), value) for name, value in values.items()):
        raise CheckpointError(f"{folder}: the disk returned different bytes from those written.")
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n", durable=False)
