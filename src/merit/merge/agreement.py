"""Are these checkpoints compatible? Names, shapes, dtypes, config and tokenizer, from headers and small files only.

Nothing here reads tensor data. What cannot be merged is an error that names it; harmless differences become warnings.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merit.errors import MergeError
from merit.hf.checkpoint import Checkpoint, TensorInfo
from merit.hf.side_files import chat_template, processor_files, read_config, read_json
from merit.progress import count

__all__ = [
    "check_adapter_bases",
    "check_config",
    "check_tokenizer",
    "common_chat_template",
    "common_processor",
    "core_name",
    "match_tensors",
]

# Parts of names of settings that change what the weights mean; any other setting that differs gives a warning.
_MEANING = re.compile(
    "rope|rotary|position|window|layer|scal|multiplier|cap|alibi|hidden|size|dim|head|intermediate|width|depth|expert|rank|"
    "groups|kernel|stride|act|norm|eps|bias|tie_|model_type|attention|qk_|top_k|factor|theta|moe|gate|parallel_residual|conv|"
    "patch|quant|state|mrope|router|sparse|chunk|token|scor"
)
# Settings that do not change what the weights mean: trainers and library versions rewrite them.
_VOLATILE = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation"),
    *("architectures", "return_dict", "output_hidden_states", "output_attentions", "auto_map", "pretraining_tp"),
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range"),
}
_TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}
_WRAPPERS = {"model", "language_model", "transformer", "module", "base_model", "_orig_mod"}
_OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_INPUT_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "word_embeddings.weight",
)


def match_tensors(
    base: Checkpoint, branch: Checkpoint, name: str, any_float: bool
) -> tuple[dict[str, TensorInfo], list[tuple[TensorInfo, TensorInfo]], list[str]]:
    """Find every tensor of the base in a branch, and account for every tensor of the branch.

    Args:
        base: Headers of θ0.
        branch: Headers of θ_k.
        name: Name of the branch in messages.
        any_float: Accept a floating dtype other than the base's.

    Returns:
        (by base name: the branch's tensor; pairs of branch tensors that must be equal byte for byte, because one is a tied
        copy that the base does not store; warnings).

    Raises:
        MergeError: A tensor is missing, unknown, or has another shape or dtype.
    """
    notes: list[str] = []
    found = {n: t for n, t in branch.tensors.items() if n in base.tensors}
    missing, extra = base.tensors.keys() - found.keys(), branch.tensors.keys() - found.keys()
    copies: list[tuple[TensorInfo, TensorInfo]] = []
    if missing or extra:
        tied = _tied_pair(base, missing, extra)
        if tied and (tied[0] in branch.tensors or tied[1] in branch.tensors):
            stored, other = tied  # the base's name of the tied tensor, and its other name
            if stored in missing:
                found[stored] = branch.tensors[other]
                missing = missing - {stored}
            else:
                copies.append((branch.tensors[stored], branch.tensors[other]))
            extra = extra - {other}
            notes.append(
                f"{name} stores the tied tensor {stored} as {other} (also or instead); the merged model stores {stored}."
            )
    if missing or extra:
        renamed = _renamed(base, branch, found)
        if renamed is None:
            _refuse_names(base, name, sorted(missing), sorted(extra))
        else:
            found, copies = renamed, []
            example = next(n for n in base.tensors if renamed[n].name != n)
            notes.append(f"{name} uses other tensor names ({renamed[example].name} for {example}); matched one to one.")
    for key, tensor in base.tensors.items():
        other_tensor = found[key]
        if other_tensor.shape != tensor.shape:
            raise MergeError(
                f"{key} is {tensor.shape} in the base but {other_tensor.shape} in {name}."
                + _vocabulary_hint(key, tensor, other_tensor),
                "All branches must start from the same base.",
                f"Nothing was written. Retrain the differing branch, or leave it out ({name}).",
            )
        if other_tensor.dtype != tensor.dtype and not (
            any_float and {tensor.dtype.kind, other_tensor.dtype.kind} == {"float"}
        ):
            raise MergeError(
                f"{key} is {tensor.dtype.tag} in the base but {other_tensor.dtype.tag} in {name}.",
                "Save the branch in the base's dtype, or choose the merged dtype explicitly (dtype: base, float32, ...).",
                "Nothing was written.",
            )
    return found, copies, notes


def _vocabulary_hint(key: str, base: TensorInfo, branch: TensorInfo) -> str:
    table = key.endswith((*_INPUT_EMBEDDINGS, *_OUTPUT_HEADS)) and base.shape[1:] == branch.shape[1:]
    return " The branch's vocabulary was resized." if table else ""


def _tied_pair(base: Checkpoint, missing: set[str], extra: set[str]) -> tuple[str, str] | None:
    """(name in the base, other name) of the tied embedding, when the config ties it and a branch stores the other name."""
    config = read_config(base.folder) if (base.folder / "config.json").is_file() else {}
    text = config.get("text_config")
    if not (config.get("tie_word_embeddings") or (isinstance(text, dict) and text.get("tie_word_embeddings"))):
        return None
    for stored_ending, other_ending in ((_OUTPUT_HEADS, _INPUT_EMBEDDINGS), (_INPUT_EMBEDDINGS, _OUTPUT_HEADS)):
        stored = [n for n in base.tensors if n.endswith(stored_ending)]
        others = [n for n in extra if n.endswith(other_ending)]
        if len(stored) == len(others) == 1:
            return stored[0], others[0]
    return None


def core_name(name: str) -> str:
    """A tensor's or module's name without wrapper prefixes (``model.language_model.layers.0`` is ``layers.0``)."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def _renamed(base: Checkpoint, branch: Checkpoint, found: Mapping[str, TensorInfo]) -> dict[str, TensorInfo] | None:
    """One-to-one match of names that differ only in wrapper prefixes (``model.language_model.`` ...), or None."""
    ours, theirs = {core_name(n): n for n in base.tensors}, {core_name(n): t for n, t in branch.tensors.items()}
    unique = len(ours) == len(base.tensors) and len(theirs) == len(branch.tensors)
    if not unique or ours.keys() != theirs.keys():
        return None
    return {ours[key]: tensor for key, tensor in theirs.items()}


def _refuse_names(base: Checkpoint, name: str, missing: list[str], extra: list[str]) -> None:
    parts = []
    if missing:
        parts.append(f"lacks {count(len(missing), 'tensor')} of the base, first {missing[0]}")
    if extra:
        parts.append(f"has {count(len(extra), 'tensor')} that the base does not have, first {extra[0]}")
    raise MergeError(
        f"{name} {' and '.join(parts)}.",
        f"All branches must start from the same base ({base.folder}); no tensor is dropped silently.",
        f"Nothing was written. Retrain the differing branch, or leave it out ({name}).",
    )


def check_config(base: Path, branch: Path, name: str) -> list[str]:
    """Compare config.json; settings that change what the weights mean must agree. An absent setting counts as null.

    Returns:
        Warnings (special token ids that a trainer changed, other settings that differ).

    Raises:
        MergeError: A setting that changes what the weights mean differs; it is named, with both values.
    """
    configs = read_config(base), read_config(branch)
    ours, theirs = map(_flat, configs)
    if ours.keys() != theirs.keys():  # another library version may write out defaults: let the library complete both
        complete = [_completed(config) for config in configs]
        if all(complete):
            both = ours.keys() & theirs.keys()
            ours, theirs = (
                {**full, **{key: raw[key] for key in both}} for full, raw in zip(complete, (ours, theirs), strict=True)
            )
    notes = []
    for key in sorted(ours.keys() | theirs.keys(), key=lambda key: (key not in ours or key not in theirs, key)):
        leaf = key.rsplit(".", 1)[-1]
        mine, other = ours.get(key), theirs.get(key)
        if mine == other or (not mine and not other) or leaf in _VOLATILE or leaf.startswith("_"):
            continue
        if leaf not in _TOKEN_IDS and _MEANING.search(key.lower()):
            raise MergeError(
                f"config.json: {key} is {_shown(mine)} in the base but {_shown(other)} in {name}.",
                "All branches must start from the same base. Nothing was written.",
            )
        notes.append(f"config.json: {key} is {_shown(other)} in {name}; the base has {_shown(mine)}, which is kept.")
    return notes


def _completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings with the library's defaults filled in; empty for a model type that it does not know."""
    if config.get("auto_map") or not isinstance(config.get("model_type"), str):
        return {}
    known = importlib.import_module(
        "transformers"
    ).CONFIG_MAPPING  # only now: merging needs no other part of the library
    try:
        full = known[config["model_type"]].from_dict(dict(config)).to_dict()
        return _flat(json.loads(json.dumps(full, default=str)))
    except Exception:  # settings that the library refuses are compared as they are
        return {}


def _shown(value: object) -> str:
    return "unset" if value is None else repr(value)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name; rope settings under one name for all library versions, unset ones left out."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            rope = key in ("rope_parameters", "rope_scaling")  # the text model's, wherever the library version puts it
            inner = ("" if prefix == "text_config." else prefix) if rope else f"{prefix}{key}."
            result.update(_flat(value, inner))
        elif value is not None:
            result[prefix + key] = value
    return result


def check_tokenizer(base: Path, branch: Path, name: str) -> list[str]:
    """Compare the tokenizers' vocabularies, merges and added tokens; a branch without tokenizer files passes.

    Returns:
        Warnings (a different normalizer, pre-tokenizer or post-processor: ids of the same text can differ).

    Raises:
        MergeError: The vocabularies differ.
    """
    notes = []
    if (base / "tokenizer.json").is_file() and (branch / "tokenizer.json").is_file():
        ours, theirs = _tokenizer(base), _tokenizer(branch)
        for part in ("vocabulary", "merges", "added tokens"):
            if ours[part] != theirs[part]:
                raise MergeError(
                    f"tokenizer.json: the {part} of {name} differ from the base's.",
                    "All branches must use the base's tokenizer: the same id would mean other text. Nothing was written.",
                )
        odd = [
            part for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder") if ours[part] != theirs[part]
        ]
        if odd:
            notes.append(f"tokenizer.json: {', '.join(odd)} of {name} differ from the base's, which are kept.")
        return notes
    for file in ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"):
        if (base / file).is_file() and (branch / file).is_file() and _sha(base / file) != _sha(branch / file):
            raise MergeError(f"{file} of {name} differs from the base's: the same id would mean different text.")
    return notes


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _tokenizer(folder: Path) -> dict[str, Any]:
    value = read_json(folder / "tokenizer.json", {"model": dict, "added_tokens": [dict]})
    model = value.get("model") or {}
    listed = model.get("merges") or []
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in listed] if isinstance(listed, list) else listed
    added = [(t.get("id"), t.get("content")) for t in value.get("added_tokens") or []]
    parts = {key: value.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    return {"vocabulary": model.get("vocab"), "merges": merges, "added tokens": sorted(added, key=repr), **parts}


def check_adapter_bases(base: Path, recorded: Mapping[str, str]) -> list[str]:
    """Compare the bases that adapters name in their configs (by adapter, "" for none); local paths are resolved.

    Returns:
        Warnings (they name a folder other than ``base``).

    Raises:
        MergeError: They name different bases.
    """
    known = {name: Path(path).resolve() if path and Path(path).exists() else path for name, path in recorded.items()}
    first, where = next(iter(known.items()))
    for name, other in known.items():
        if other != where:
            raise MergeError(
                f"Adapters differ in base_model_name_or_path: {recorded[first]!r} in {first}, {recorded[name]!r} in {name}.",
                "Adapters of different bases cannot be merged; if it is the same base, write the same path in both configs.",
            )
    if Path(where).is_absolute() and Path(where) != base.resolve():
        return [f"The adapters name {where} as their base; they are merged with {base}."]
    return []


def common_chat_template(base: Path, branches: Mapping[str, Path]) -> tuple[str | None, list[str]]:
    """The chat template to add to the merged model when the base has none: the one that all branches agree on.

    Returns:
        (template or None, warnings).
    """
    if chat_template(base) is not None:
        return None, []
    templates = {name: chat_template(folder) for name, folder in branches.items()}
    texts = {json.dumps(text) for text in templates.values() if text is not None}
    if len(texts) == 1:
        return json.loads(texts.pop()), ["The base has no chat template; the one that all branches share is included."]
    return None, ["The branches' chat templates differ and the base has none: none is included."] if texts else []


def common_processor(base: Path, branches: Sequence[Path]) -> dict[str, Path]:
    """Image processor files that the merged model gets instead of the base's: those that all branches were trained with.

    They contain a lowered pixel limit, if there is one. Where branches differ, the base's files are kept.
    """
    names = processor_files(base)
    found = [processor_files(branch) for branch in branches]
    common = {name for name in names if all(name in files for files in found)}
    return {name: found[0][name] for name in sorted(common) if len({files[name].read_bytes() for files in found}) == 1}
