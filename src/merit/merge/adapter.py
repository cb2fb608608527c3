"""A PEFT LoRA adapter, read from its files without PEFT: which tensors of the base it changes, and by how much.

A branch's update is ΔW_k = s_k B_k A_k with s = α/r (rsLoRA: α/√r). Biases, ``modules_to_save`` and embedding adapters are
part of a branch. Only adapters known to be exactly θ0 + s·B·A are accepted (LoRA and rsLoRA whose initialisation leaves
the base unchanged); everything else is refused: DoRA, PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, KaSA, convolutions,
adapters on tied output heads, and whatever a later PEFT adds.

Source: Hu et al., LoRA, arXiv:2106.09685, §4.1; Kalajdzievski, rsLoRA, arXiv:2312.03732.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from merit.errors import CheckpointError, MergeError
from merit.hf.checkpoint import Checkpoint, TensorInfo, read_headers, read_tensor
from merit.hf.dtypes import to_float
from merit.hf.side_files import read_json
from merit.merge.agreement import check_adapter_bases, core_name
from merit.merge.weights import Branch

__all__ = ["Adapter", "LowRank", "module_of", "read_adapter", "read_adapters"]

_PREFIX = "base_model.model."
_EXACT_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base's weights unchanged."""
_SAME = {"fan_in_fan_out": False, "bias": "none", "lora_bias": False}
_SAME |= dict.fromkeys(("target_modules", "modules_to_save", "layers_to_transform"))
"""Settings on which the adapters of a merge must agree, with PEFT's default for files that do not have them."""
_NEUTRAL = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
    *("exclude_modules", "layers_pattern", "runtime_config", "megatron_core", "qalora_group_size"),
    *(
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    ),  # matter only for initialisation, which init_lora_weights shows
}
"""Other settings that are read here, or that do not change what the saved tensors mean."""
_NAMES = {
    **{
        "use_dora": "DoRA, whose magnitudes do not average into a product",
        "kasa_config": "KaSA, which changes the base",
    },
    **{"alora_invocation_tokens": "aLoRA, which acts on some tokens only", "layer_replication": "replicated layers"},
    **{"use_qalora": "QALoRA", "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA", "use_bdlora": "BD-LoRA"},
    **{"arrow_config": "Arrow routing", "target_parameters": "LoRA on parameters"},
}


@dataclass(frozen=True)
class LowRank:
    """One module's pair: names of A (r, in) and B (out, r) on disk, scale s, and whether the base stores Wᵀ."""

    a: str
    b: str
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Adapter:
    """One PEFT LoRA adapter, headers only.

    Attributes:
        branch: The branch it belongs to.
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
                f"{name} contains NaN or infinity in {self.branch.name} ({self.head.folder}). Nothing was written."
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
            shifts[target] = (name, _scale(branch, config, module, _rank(branch, head, name)))
        else:
            pairs.setdefault(target, {})["a" if "_A" in part else "b"] = name
    low_rank = {
        target: _low_rank(branch, head, config, target, base.tensors[target], names) for target, names in pairs.items()
    }
    if not (low_rank or full):
        raise MergeError(f"{branch.name} ({branch.path}) has no adapter tensors.")
    return Adapter(branch, head, config, low_rank, full, shifts)


def _rank(branch: Branch, head: Checkpoint, bias: str) -> int:
    """Rank of the module that ``lora_B``'s own bias belongs to."""
    a = head.tensors.get(bias.replace("lora_B.bias", "lora_A.weight"))
    if a is None or not a.shape or not a.shape[0]:
        raise CheckpointError(f"{branch.path} has {bias} without its lora_A.")
    return a.shape[0]


def _split(name: str) -> tuple[str, str]:
    """(module path, part) of an adapter tensor; part is ``full`` for tensors saved as they are."""
    path = name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    for part in ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"):
        if path.endswith("." + part):
            return path[: -len(part) - 1], part
    if ".lora_magnitude_vector" in path:
        return path.split(".lora_magnitude_vector")[0], "lora_magnitude_vector"
    return path, "full"


def module_of(name: str) -> str:
    """Module path of an adapter tensor."""
    return _split(name)[0]


def _check_kind(branch: Branch, config: Mapping[str, object]) -> None:
    """Refuse every adapter type that is not known to be merged exactly."""
    way_out = "Merge every branch to full weights first (PEFT: merge_and_unload), then merge the checkpoints."
    if config.get("peft_type") != "LORA":
        raise MergeError(f"{branch.name} is a {config.get('peft_type')!r} adapter; only LORA can be merged.", way_out)
    start = str(config.get("init_lora_weights", True)).lower()
    if start not in _EXACT_STARTS:
        raise MergeError(
            f"{branch.name} was initialised with init_lora_weights: {start}, which changes the base (or is unknown here): "
            "its model is not θ0 + s·B·A.",
            "Convert it to a plain LoRA when saving (path_initial_model_for_weight_conversion), or merge to full weights.",
        )
    for key, value in config.items():
        if value and key not in _NEUTRAL and key not in _SAME:
            what = _NAMES.get(key, "which is not known to be merged exactly")
            raise MergeError(f"{branch.name} uses {key} ({what}).", way_out)


def _scale(branch: Branch, config: Mapping[str, object], module: str, rank: int) -> float:
    """s of a module: its α (``alpha_pattern`` first) over r, or over √r for rsLoRA."""
    patterns = config.get("alpha_pattern") or {}
    alpha = config.get("lora_alpha", 8)
    try:
        if not isinstance(patterns, Mapping):
            raise TypeError
        alpha = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), alpha)
    except (re.error, TypeError):
        raise _odd(branch, "alpha_pattern", patterns, "module names or regular expressions with their α") from None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _odd(branch, "lora_alpha", alpha, "a number")
    return float(alpha) / (float(rank) ** 0.5 if config.get("use_rslora") else float(rank))


def _odd(branch: Branch, key: str, value: object, expected: str) -> CheckpointError:
    file = branch.path / "adapter_config.json"
    return CheckpointError(f"{file}: {key} is {str(value)[:80]!r}, expected {expected}.")


def _low_rank(
    branch: Branch, head: Checkpoint, config: Mapping[str, Any], target: str, base: TensorInfo, names: Mapping[str, str]
) -> LowRank:
    if set(names) != {"a", "b"}:
        raise CheckpointError(f"{branch.path} has only one of lora_A and lora_B for {target}.")
    a, b = head.tensors[names["a"]].shape, head.tensors[names["b"]].shape
    transposed = bool(config.get("fan_in_fan_out")) or "lora_embedding_A" in names["a"]
    fits = len(a) == len(b) == 2 and 0 < a[0] == b[1] and base.shape == ((a[1], b[0]) if transposed else (b[0], a[1]))
    if not fits:
        raise MergeError(
            f"{target} is {base.shape} in the base, but {branch.name} has A {a} and B {b} for it.",
            "The adapter belongs to another base, or its fan_in_fan_out is wrong. Nothing was written.",
        )
    return LowRank(names["a"], names["b"], _scale(branch, config, module_of(names["a"]), a[0]), transposed)


def _setting(value: object, default: object) -> object:
    """A setting, normalised: lists without order, absent and empty ones as the default."""
    return sorted(map(str, value)) if isinstance(value, list) and value else (value or default)


def read_adapters(base: Checkpoint, branches: Sequence[Branch]) -> tuple[list[Adapter], list[str]]:
    """The adapters, checked to be compatible, and warnings."""
    adapters = [read_adapter(branch, base) for branch in branches]
    first = adapters[0]
    for other in adapters[1:]:
        for key, default in _SAME.items():
            one, two = (_setting(part.config.get(key), default) for part in (first, other))
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


def rank_of(adapter: Adapter) -> int:
    """Its largest rank; 0 if all its tensors were saved in full."""
    return max((adapter.head.tensors[p.a].shape[0] for p in adapter.pairs.values()), default=0)
