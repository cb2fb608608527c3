"""Merging LoRA adapters by their full update: into a checkpoint, into one concatenated adapter, or recompressed to a rank.

A branch's update is ΔW_k = s_k B_k A_k with s = α/r (rsLoRA: α/√r). Its weighted mean is exact as full weights (θ0 + λ Σ
w_k ΔW_k, rounded once) and one adapter of rank ΣR_k: [w_1 s_1 B_1 … w_K s_K B_K] · [A_1; …; A_K]. Averaging the A's and B's
apart gives other cross terms and is refused. Read from PEFT's files, without PEFT. Biases, ``modules_to_save`` and embedding
adapters are part of a branch. Not covered, refused with the reason: DoRA, convolutions, adapters on tied output heads,
initialisations that change the base (PiSSA, OLoRA, CorDA, LoftQ).

Source: Hu et al., LoRA, arXiv:2106.09685, §4.1; Kalajdzievski, rsLoRA, arXiv:2312.03732.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from merit.errors import CheckpointError, MergeError
from merit.hf.checkpoint import Checkpoint, TensorInfo, fingerprint, read_headers, read_json, read_tensor
from merit.hf.dtypes import to_float
from merit.merge.agreement import check_adapter_bases, core_name
from merit.merge.operators import operator_and_options
from merit.merge.plan import (
    Branch,
    Extra,
    MergePlan,
    TensorPlan,
    check_branches,
    check_output,
    check_space,
    exact_scale,
    is_matrix,
    lay_out,
    output_dtype,
    write_extra,
)

__all__ = ["Adapter", "merge_adapters_to_adapter", "plan_adapter_merge", "read_adapter"]

_PREFIX = "base_model.model."
_SAME = (
    "peft_type",
    "target_modules",
    "fan_in_fan_out",
    "bias",
    "modules_to_save",
    "use_dora",
    "lora_bias",
    "layers_to_transform",
)
_NEW_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class LowRank:
    """One module's pair: names of A (r, in) and B (out, r) on disk, the scale s, and whether the base stores Wᵀ."""

    a: str
    b: str
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Adapter:
    """One PEFT LoRA adapter, headers only.

    Attributes:
        branch: Where it comes from.
        head: Headers of adapter_model.safetensors.
        config: adapter_config.json.
        pairs: By the base's tensor name: the low-rank update of that tensor.
        full: By the base's tensor name: a tensor saved in full (bias, ``modules_to_save``).
        shifts: By the base's bias name: (name of lora_B's own bias on disk, scale).
    """

    branch: Branch
    head: Checkpoint
    config: dict[str, Any]
    pairs: dict[str, LowRank]
    full: dict[str, str]
    shifts: dict[str, tuple[str, float]]

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """s·B (m, r) and A (r, n) in float64, such that ΔW (m, n) has the base tensor's own orientation."""
        pair = self.pairs[name]
        a, b = self.values(pair.a), self.values(pair.b) * pair.scale
        return (a.T, b.T) if pair.transposed else (b, a)

    def update(self, name: str, theta: np.ndarray) -> np.ndarray:
        """δ of the base's tensor ``name`` with values ``theta``, float64, in its own shape; zero if it is not adapted."""
        delta = np.zeros_like(theta)
        if name in self.full:
            delta += self.values(self.full[name]) - theta
        if name in self.shifts:
            bias, scale = self.shifts[name]
            delta += scale * self.values(bias)
        if name in self.pairs:
            delta += np.matmul(*self.factors(name))
        return delta

    def values(self, name: str) -> np.ndarray:
        """A tensor of the adapter in float64, finite."""
        values = to_float(read_tensor(self.head, name), self.head.tensors[name].dtype)
        if not np.isfinite(values).all():
            raise MergeError(
                f"{name} holds NaN or infinity in {self.branch.name} ({self.head.folder}). Nothing was written."
            )
        return values


def read_adapter(branch: Branch, base: Checkpoint) -> Adapter:
    """Read an adapter's headers and match every one of its tensors with a tensor of the base.

    Raises:
        CheckpointError: The folder is not a readable adapter.
        MergeError: A kind of adapter that cannot be merged, or one that does not fit the base.
    """
    head, config = read_headers(branch.path, "adapter_model"), read_json(branch.path / "adapter_config.json")
    _check_kind(branch, config)
    by_core = {core_name(name): name for name in base.tensors}
    pairs: dict[str, dict[str, str]] = {}
    full: dict[str, str] = {}
    shifts: dict[str, tuple[str, float]] = {}
    for name, tensor in head.tensors.items():
        module, part = _split(name)
        suffix = ".bias" if part == "lora_B.bias" else "" if part == "full" else ".weight"
        target = module + suffix if module + suffix in base.tensors else by_core.get(core_name(module + suffix), "")
        if part == "lora_magnitude_vector" or len(tensor.shape) > 2:
            raise MergeError(
                f"{branch.name}: {name} {tensor.shape} is DoRA or a convolution; merge it to full weights first."
            )
        if not target:
            raise MergeError(
                f"{branch.name}: {name} has no counterpart {module + suffix} in the base ({base.folder}).",
                "The adapter belongs to another base, or targets a tied output head that the base does not store.",
                "Merge it to full weights with PEFT first. Nothing was written.",
            )
        if part == "full":
            if tensor.shape != base.tensors[target].shape:
                raise MergeError(f"{branch.name}: {name} is {tensor.shape}, the base's {base.tensors[target].shape}.")
            full[target] = name
        elif part == "lora_B.bias":
            shifts[target] = (name, _scale(config, module, _rank(head, name)))
        else:
            pairs.setdefault(target, {})["a" if "_A" in part else "b"] = name
    low_rank = {
        target: _low_rank(branch, head, config, target, base.tensors[target], names) for target, names in pairs.items()
    }
    if not (low_rank or full):
        raise MergeError(f"{branch.name} ({branch.path}) holds no adapter tensors.")
    return Adapter(branch, head, config, low_rank, full, shifts)


def _rank(head: Checkpoint, name: str) -> int:
    return head.tensors[name.replace("lora_B.bias", "lora_A.weight")].shape[0]


def _split(name: str) -> tuple[str, str]:
    """(module path, part) of an adapter tensor; part is ``full`` for tensors saved as they are."""
    path = name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    for part in ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"):
        if path.endswith("." + part):
            return path[: -len(part) - 1], part
    if ".lora_magnitude_vector" in path:
        return path.split(".lora_magnitude_vector")[0], "lora_magnitude_vector"
    return path, "full"


def _check_kind(branch: Branch, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise MergeError(f"{branch.name} is a {config.get('peft_type')!r} adapter; only LORA can be merged.")
    if config.get("use_dora"):
        raise MergeError(
            f"{branch.name} uses DoRA, whose magnitudes do not average into a product.",
            "Merge every branch to full weights first (PEFT: merge_and_unload), then merge the checkpoints.",
        )
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_NEW_BASE):
        raise MergeError(
            f"{branch.name} was initialised with {init!r}, which changes the base: θ0 + s·B·A is not its model.",
            "Convert it to a plain LoRA when saving (path_initial_model_for_weight_conversion), or merge to full weights.",
        )
    for key in ("trainable_token_indices", "target_parameters", "alora_invocation_tokens"):
        if config.get(key):
            raise MergeError(f"{branch.name} uses {key}, which is not supported; merge it to full weights first.")


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """s of a module: its α (``alpha_pattern`` first) over r, or over √r for rsLoRA."""
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(alpha) / (float(rank) ** 0.5 if config.get("use_rslora") else float(rank))


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    import re

    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _low_rank(
    branch: Branch, head: Checkpoint, config: Mapping[str, Any], target: str, base: TensorInfo, names: Mapping[str, str]
) -> LowRank:
    if set(names) != {"a", "b"}:
        raise CheckpointError(f"{branch.path} holds only one of lora_A and lora_B for {target}.")
    a, b = head.tensors[names["a"]].shape, head.tensors[names["b"]].shape
    transposed = bool(config.get("fan_in_fan_out")) or "lora_embedding_A" in names["a"]
    shape = (b[0], a[1])
    if a[0] != b[1] or (shape[::-1] if transposed else shape) != base.shape:
        raise MergeError(
            f"{target} is {base.shape} in the base, but {branch.name} holds A {a} and B {b} for it.",
            "The adapter belongs to another base, or its fan_in_fan_out is wrong. Nothing was written.",
        )
    return LowRank(names["a"], names["b"], _scale(config, _split(names["a"])[0], a[0]), transposed)


def _read_all(base: Checkpoint, branches: Sequence[Branch]) -> tuple[list[Adapter], list[str]]:
    """The adapters, checked to belong together, and warnings."""
    adapters = [read_adapter(branch, base) for branch in branches]
    first = adapters[0]
    for other in adapters[1:]:
        for key in _SAME:
            one, two = first.config.get(key), other.config.get(key)
            if isinstance(one, list) and isinstance(two, list):
                one, two = sorted(map(str, one)), sorted(map(str, two))
            if one != two:
                raise MergeError(
                    f"Adapters differ in {key}: {one!r} in {first.branch.name}, {two!r} in {other.branch.name}."
                )
        for mine, theirs in ((first.pairs, other.pairs), (first.full, other.full), (first.shifts, other.shifts)):
            odd = sorted(mine.keys() ^ theirs.keys())
            if odd:
                raise MergeError(f"{odd[0]} is adapted in only one of {first.branch.name} and {other.branch.name}.")
    recorded = {a.branch.name: str(a.config.get("base_model_name_or_path") or "") for a in adapters}
    return adapters, check_adapter_bases(base.folder, recorded)


def plan_adapter_merge(
    base: str | os.PathLike[str],
    adapters: Sequence[Branch],
    operator: str = "average",
    options: Mapping[str, Any] | None = None,
    scale: int | float | str | Fraction = 1,
    output: str | os.PathLike[str] = "merged",
    *,
    dtype: str | None = None,
    excluded: Sequence[str] = (),
) -> MergePlan:
    """Plan the merge of adapters into a full checkpoint: round(θ0 + λ τ) with one rounding; run it with ``run_merge``.

    Linear operators give τ = Σ c_k s_k B_k A_k; ``star``, ``tsv`` and ``iso_cts`` act on the dense ΔW_k of
    the tensors that are matrices by their ``matrix_scope``, adapted or saved in full, and average the rest uniformly.

    Args:
        base: Folder of θ0.
        adapters: Branches whose ``path`` is a PEFT adapter folder.
        operator, options, scale, output, excluded: As in ``plan_merge``. ``ties`` needs full checkpoints.
        dtype: ``float32``, ``bfloat16``, ``float16``: of the whole result; None or ``base``: the base's dtypes.

    Raises:
        CheckpointError, MergeError, ResourceError: As ``plan_merge``.
    """
    chosen, settings = operator_and_options(operator, options or {})
    if chosen.kind == "block":
        raise MergeError(
            f"Operator {operator} ranks all entries of the model; merge each adapter to full weights first."
        )
    counts, factor, target = check_branches(adapters), exact_scale(scale), output_dtype(dtype)
    check_output(Path(output), [Path(base), *(b.path for b in adapters)])
    head = read_headers(base, "model")
    parts, warnings = _read_all(head, adapters)
    touched = {name for p in parts for name in (*p.pairs, *p.full, *p.shifts)}

    def tensor_plan(out: TensorInfo, old: TensorInfo) -> TensorPlan:
        if old.dtype.kind != "float":
            return TensorPlan(out, (old,), "exact")
        if old.name not in touched:
            return TensorPlan(out, (old,), "linear", (Fraction(1),))
        matrix = chosen.kind == "matrix" and is_matrix(old, settings["matrix_scope"])
        return TensorPlan(out, (old,), "matrix" if matrix else "compute")

    if chosen.kind == "linear":
        coefficients = [float(c) for c in chosen.function(counts, Fraction(1), **settings)[1]]
    else:
        coefficients = [1.0 / len(parts)] * len(parts)

    def compute(name: str, theta: np.ndarray) -> np.ndarray:
        tau = np.zeros_like(theta)
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
        operator=chosen,
        options=settings,
        scale=factor,
        counts=tuple(counts),
        output=Path(output),
        files=files,
        dtype=dtype if target else None,
        excluded=tuple(excluded),
        warnings=tuple(warnings),
        compute=compute,
        update=lambda k, name, theta: parts[k].update(name, theta),
        notes={"adapters": {"mode": "full", "ranks": [_max_rank(p) for p in parts], "tensors": len(touched)}},
    )


def _max_rank(adapter: Adapter) -> int:
    return max((adapter.head.tensors[p.a].shape[0] for p in adapter.pairs.values()), default=0)


def _stack(parts: Sequence[Adapter], coefficients: Sequence[float], name: str) -> tuple[np.ndarray, np.ndarray]:
    """[c_1 s_1 B_1 … c_K s_K B_K] (m, ΣR) and [A_1; …; A_K] (ΣR, n): their product is Σ c_k ΔW_k."""
    factors = [part.factors(name) for part in parts]
    left = np.concatenate([c * b for c, (b, _) in zip(coefficients, factors, strict=True)], axis=1)
    return left, np.concatenate([a for _, a in factors], axis=0)


def merge_adapters_to_adapter(
    base: str | os.PathLike[str],
    adapters: Sequence[Branch],
    output: str | os.PathLike[str],
    *,
    mode: str = "concat",
    rank: int | None = None,
    scale: int | float | str | Fraction = 1,
    extra: Extra | None = None,
) -> dict[str, Any]:
    """Merge adapters into one adapter folder (float32), token-weighted.

    Args:
        base: Folder of θ0 (headers only are read, for the check that every tensor fits).
        adapters: Branches whose ``path`` is a PEFT adapter folder.
        output: Folder to create.
        mode: ``concat``: the exact mean, rank ΣR_k (rank R where all A_k are identical, as when A is frozen at a common
            start). ``recompress``: its best approximation of rank ``rank``, with the error reported. ``factors``: refused.
        rank: For ``recompress``.
        scale: λ.
        extra: As in ``run_merge``: small files by name from the complete record, written before the folder appears.

    Returns:
        Plain JSON values: mode, weights, per tensor rank, and for ``recompress`` the relative Frobenius errors (of the
        dropped singular values), overall and by tensor.

    Raises:
        MergeError: The adapters cannot be merged in this way.
    """
    if mode == "factors":
        raise MergeError(
            "Averaging the A's and the B's apart is not the average of the updates: (Σ w_k B_k)(Σ w_k A_k) ≠ Σ w_k B_k A_k.",
            "Use mode full (a checkpoint), concat (an exact adapter of rank ΣR), or recompress with a rank.",
        )
    if mode not in ("concat", "recompress"):
        raise MergeError(f"mode must be full, concat or recompress; found {mode!r}.")
    if (mode == "recompress") != (rank is not None) or (rank is not None and rank < 1):
        raise MergeError(
            f"mode {mode} with rank {rank!r}: recompress needs a rank of at least 1, concat takes none.",
            "There is no good default: independent branches lose most of the merge at one branch's rank.",
        )
    counts, factor = check_branches(adapters), exact_scale(scale)
    shares = [c / sum(counts, Fraction(0)) for c in counts]
    output = Path(output)
    check_output(output, [Path(base), *(b.path for b in adapters)])
    head = read_headers(base, "model")
    parts, warnings = _read_all(head, adapters)
    if parts[0].full and factor != 1:
        raise MergeError(
            "A scale other than 1 needs θ0 for tensors saved in full (modules_to_save, bias): merge to a checkpoint."
        )
    coefficients = [float(factor * w) for w in shares]
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, tuple[float, float]] = {}
    for name, pair in parts[0].pairs.items():
        left, right, dropped, norm = _joint_factors(parts, coefficients, name, rank)
        if pair.transposed:  # back to the adapter's orientation
            left, right = right.T, left.T
        module, _ = _split(pair.a)
        ranks[module], errors[name] = right.shape[0], (dropped, norm)
        tensors[pair.a], tensors[pair.b] = right, left
    for sources in ({n: (d, 1.0) for n, d in parts[0].full.items()}, parts[0].shifts):
        for name, (disk, _) in sources.items():
            terms = [(p.full[name], 1.0) if name in p.full else p.shifts[name] for p in parts]
            tensors[disk] = sum(
                (c * s * p.values(d) for c, p, (d, s) in zip(coefficients, parts, terms, strict=True)), np.zeros(())
            )
    total_dropped, total = (float(np.sqrt(sum(e[i] ** 2 for e in errors.values()))) for i in (0, 1))
    record = {
        "mode": mode,
        "scale": float(factor),
        "weights": [float(w) for w in shares],
        "tokens": [int(c) if c.denominator == 1 else float(c) for c in counts],
        "branches": [{"name": b.name, "path": str(b.path), "fingerprint": fingerprint(b.path)} for b in adapters],
        "warnings": warnings,
        "ranks": ranks,
        "relative_error": total_dropped / total if total else 0.0,
        "relative_errors": {name: (d / n if n else 0.0) for name, (d, n) in errors.items()},
    }
    _write_adapter(output, tensors, _joint_config(parts[0].config, ranks), parts[0].branch.path, record, extra)
    return record


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
    import re

    common = max(ranks.values(), default=1)
    odd = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != common}
    return {
        **config,
        **{"r": common, "lora_alpha": common, "use_rslora": False, "rank_pattern": odd, "alpha_pattern": odd},
        **{"init_lora_weights": True, "inference_mode": True},
    }


def _write_adapter(
    output: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    source: Path,
    record: dict[str, Any],
    extra: Extra | None,
) -> None:
    """Write and verify the adapter folder; completes ``record`` with the output's fingerprint."""
    import json

    from safetensors.numpy import save_file

    temporary = output.absolute().parent / f".{output.name}.partial-{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        values = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
        if not all(np.isfinite(v).all() for v in values.values()):
            raise MergeError("The merged adapter overflows float32. Nothing was written.")
        save_file(values, temporary / "adapter_model.safetensors", {"format": "pt"})
        head = read_headers(temporary, "adapter_model")
        if not all(np.array_equal(read_tensor(head, name), value) for name, value in values.items()):
            raise CheckpointError(f"{temporary}: the disk returned other bytes than were written.")
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            if (source / file).is_file():
                shutil.copyfile(source / file, temporary / file)
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        record["output"] = {"fingerprint": fingerprint(temporary)}
        write_extra(temporary, extra, record)
        temporary.rename(output.absolute())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
