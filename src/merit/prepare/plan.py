"""Can a vision encoder and a language model be joined, and into what? From configs, headers and tokenizers only.

No weights are read and nothing is written (:mod:`merit.prepare.assemble` does that). The encoder comes from a
vision-language model of a known family, or is a bare CLIP or SigLIP (:mod:`merit.prepare.encoder`).
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from merit.errors import CheckpointError
from merit.hf import checkpoint, side_files
from merit.hf.base import load_tokenizer
from merit.hf.families import FAMILIES, Family
from merit.hf.models import file_names
from merit.prepare import encoder
from merit.progress import count

_LANGUAGE = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3"}
"""Families with a language model class of their own: the model type of the language models that fit."""

_SHAPE = (
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "rope_parameters",
)  # fmt: skip
_IMAGE_WORDS = re.compile(r"image|img|video|vision|row_\d+_col_\d+")


Config = Any
"""A transformers config: which settings it has depends on the architecture."""


@dataclass(frozen=True)
class Assembly:
    """Two checkpoints that fit together, and the resulting model.

    Attributes:
        language: Folder of the language model.
        vision: Folder of the checkpoint with the encoder.
        giver: Its config; for a bare encoder that of the LLaVA around it.
        family: Its family.
        projector: copy or new.
        config: Config of the result (a transformers config).
        shapes: Shape of every parameter of the result, by its name in the model (tied ones once).
        dtypes: File dtype of the two checkpoints (such as BF16), language first.
        added: Special tokens to add to the language model's tokenizer.
        rows: Rows to add to its embedding for them (0 if there are unused rows).
        notes: What the user should know.
    """

    language: Path
    vision: Path
    giver: Config = field(repr=False)
    family: Family
    projector: Literal["copy", "new"]
    config: Config
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    dtypes: tuple[str, str]
    added: tuple[str, ...]
    rows: int
    notes: tuple[str, ...]


def plan_assembly(language: Path, vision: Path, *, projector: Literal["copy", "new"] = "copy") -> Assembly:
    """Check that two checkpoints can be joined, and how; no weights are read and nothing is written.

    Args:
        language: Folder of a causal language model.
        vision: Folder of a vision-language model of a known family, or of a bare CLIP or SigLIP.
        projector: copy: the projector of ``vision``, which must fit; new: one initialised by seed.

    Raises:
        CheckpointError: They do not fit together.
    """
    given, text = read_model_config(vision, "prepare.assemble.vision_from"), read_model_config(language, "model.base")
    bare = encoder.is_bare(vision)
    if bare:
        given = encoder.llava_around(vision, given, text)
        if projector == "copy":
            raise CheckpointError(
                f"prepare.assemble.projector: {vision} is a bare encoder and has no projector to copy.",
                "Set prepare.assemble.projector: new, and train it in a first stage.",
            )
    model_type = str(given.model_type)
    family = FAMILIES.get(model_type)
    if family is None:
        raise CheckpointError(
            f"prepare.assemble.vision_from: {vision} is of the type {model_type}, not of a known vision-language family "
            f"({', '.join(FAMILIES)}) or encoder ({', '.join(encoder.BARE)}).",
            "Give a vision-language checkpoint; its vision encoder, image processor and image tokens are used.",
        )
    wanted = _LANGUAGE.get(model_type, text.model_type)
    if text.model_type in FAMILIES or text.model_type != wanted:
        expected = f"a language model of the type {wanted}" if model_type in _LANGUAGE else "a causal language model"
        raise CheckpointError(
            f"model.base: to join it with the encoder of {model_type}, {expected} is expected; {language} is of the type "
            f"{text.model_type}.",
            "Without prepare.assemble a vision-language model.base is prepared as it is.",
        )
    tokenizer, added, ids = join_tokenizers(language, vision, given)
    rows = max(0, len(tokenizer) - text.vocab_size)
    config, notes = join_configs(given, text, ids, rows)
    shapes, old = parameter_shapes(config), parameter_shapes(given)
    odd = [n for n, shape in shapes.items() if family.role(n) == "projector" and old.get(n) != shape]
    if odd and projector == "copy":
        raise CheckpointError(
            f"prepare.assemble.projector: the projector of {vision} does not fit {language}: {odd[0]} is "
            f"{old.get(odd[0])}, and the language model needs {shapes[odd[0]]} (its hidden size is {text.hidden_size}).",
            "Set prepare.assemble.projector: new, and train it in a first stage.",
        )
    held = parameter_shapes(text, causal=True)
    names = renamed_parameters(held, shapes)
    odd = sorted(names.keys() ^ {name for name in shapes if family.role(name) == "language"})
    odd = odd or [new for new, old in names.items() if shapes[new][1:] != held[old][1:]]  # rows may be added
    if odd:
        raise CheckpointError(
            f"model.base: {language} does not fit into a {model_type} model: no counterpart for "
            f"{count(len(odd), 'parameter')} of its shape, first {odd[0]}."
        )
    if added:
        where = f"{rows} new embedding rows, initialised by seed" if rows else "unused embedding rows, unchanged"
        notes.append(f"added to the tokenizer: {count(len(added), 'special token')} ({where}): {', '.join(added[:6])}")
    template = "" if bare else side_files.chat_template(vision) or ""
    foreign = [token for token in added if token in template and not _IMAGE_WORDS.search(token)]
    if foreign:
        notes.append(
            f"the assembled chat template is that of {given.model_type} and writes {', '.join(foreign)}, which the language "
            "model has never seen; model.chat_template can replace it (the language model's own will do)"
        )
    dtypes = (_file_dtype(language), _file_dtype(vision))
    return Assembly(language, vision, given, family, projector, config, shapes, dtypes, added, rows, tuple(notes))


def parameter_sizes(plan: Assembly) -> dict[str, int]:
    """Number of weights of every parameter of the result, by its name in files."""
    names = file_names(empty_model(plan.config))
    return {names[name]: math.prod(shape) for name, shape in plan.shapes.items()}


# ---- configs and tokens --------------------------------------------------------------------------------------------


def read_model_config(folder: Path, key: str) -> Config:
    """The library's config of a checkpoint folder, which the recipe names under ``key``.

    Raises:
        CheckpointError: There is none, or the library does not know it.
    """
    side_files.read_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the library raises on invalid settings
        raise CheckpointError(
            f"{key}: {folder / 'config.json'} cannot be read: {side_files.reason(error)}",
            "Expected the folder of a Hugging Face checkpoint that needs no code of its own.",
        ) from None


def join_configs(given: Config, text: Config, ids: Mapping[str, int], rows: int) -> tuple[Config, list[str]]:
    """The result's config: that of ``vision_from``, with the language model's text part and token ids; and notes."""
    config, notes = copy.deepcopy(given), []
    config.architectures = None
    if str(given.model_type) in _LANGUAGE:
        values = {k: v for k, v in text.to_dict().items() if k not in _SHAPE and hasattr(given.text_config, k)}
        rope = {**(text.rope_parameters or {})}
        section = _sections(given.text_config, text)
        rope |= {k: v for k, v in given.text_config.rope_parameters.items() if k.startswith("mrope_")}
        if section != rope["mrope_section"]:
            notes.append(
                f"position sections {section} instead of {rope['mrope_section']}: the language model's heads have another "
                "width (text is not affected)"
            )
        rope["mrope_section"] = section
        config.text_config = type(given.text_config)(**values, rope_parameters=rope)
    else:
        config.text_config = copy.deepcopy(text)
    config.text_config.vocab_size = text.vocab_size + rows
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = bool(text.tie_word_embeddings)
    for key, value in ids.items():
        setattr(config, key, value)
    width = "out_hidden_size" if hasattr(config.vision_config, "out_hidden_size") else None
    width = "hidden_size" if str(given.model_type) == "qwen2_vl" else width  # its encoder calls the output so
    if width:  # a projector of another width is then found by its shapes
        setattr(config.vision_config, width, text.hidden_size)
    context, before = text.max_position_embeddings, given.text_config.max_position_embeddings
    if context < before:
        notes.append(f"the context is the language model's: {context} tokens, not {before}")
    return config, notes


def _sections(giver: Config, text: Config) -> list[int]:
    """Rotary pairs for time, height and width: the shares of ``vision_from`` at the language model's head size."""
    old = list(giver.rope_parameters["mrope_section"])
    pairs = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
    space = round(pairs * old[1] / sum(old))
    return [pairs - 2 * space, space, space]


def join_tokenizers(
    language: Path, vision: Path, given: Config
) -> tuple[PreTrainedTokenizerFast, tuple[str, ...], dict[str, int]]:
    """The language model's tokenizer with the image tokens it lacks, those tokens, and the config's token ids in it."""
    tokenizer = load_tokenizer(language, "model.base")
    if encoder.is_bare(vision):
        return _with_tokens(tokenizer, {"image_token_index": encoder.IMAGE_TOKEN}, [])
    other = load_tokenizer(vision, "prepare.assemble.vision_from")
    named = {
        key: cast(str, other.convert_ids_to_tokens(value))  # None for an id beyond the vocabulary
        for key, value in given.to_dict().items()
        if key.endswith(("_token_id", "_token_index")) and _IMAGE_WORDS.search(key) and isinstance(value, int)
    }
    lost = [key for key, token in named.items() if token is None]
    if lost or not any("image" in key for key in named):
        raise CheckpointError(
            f"prepare.assemble.vision_from: {vision} names no image token that its tokenizer has "
            f"({', '.join(lost) or 'none at all'})."
        )
    template = side_files.chat_template(vision) or ""
    special = [str(token) for _, token in sorted(other.added_tokens_decoder.items()) if token.special]
    needed = [t for t in special if t in named.values() or t in template or _IMAGE_WORDS.search(t)]
    return _with_tokens(tokenizer, named, needed)


def _with_tokens(
    tokenizer: PreTrainedTokenizerFast, named: Mapping[str, str], needed: list[str]
) -> tuple[PreTrainedTokenizerFast, tuple[str, ...], dict[str, int]]:
    held = tokenizer.get_vocab()
    added = tuple(token for token in dict.fromkeys([*needed, *named.values()]) if token not in held)
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": list(added)}, replace_extra_special_tokens=False)
    ids = {key: cast(int, tokenizer.convert_tokens_to_ids(token)) for key, token in named.items()}
    return tokenizer, added, ids


def _file_dtype(folder: Path) -> str:
    tensors = checkpoint.read_headers(folder).tensors.values()
    return Counter(tensor.dtype.tag for tensor in tensors).most_common(1)[0][0]


def parameter_shapes(config: PreTrainedConfig, *, causal: bool = False) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a model of this config; tied ones once."""
    return {name: tuple(parameter.shape) for name, parameter in empty_model(config, causal=causal).named_parameters()}


def empty_model(config: PreTrainedConfig, *, causal: bool = False) -> PreTrainedModel:
    """A model of this config without memory for its weights."""
    kind = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    with torch.device("meta"):
        return cast(PreTrainedModel, kind.from_config(config))  # type: ignore[no-untyped-call]


def _prefix(names: Iterable[str]) -> str:
    """Prefix of the decoder's parameter names: ``model.`` alone, ``model.language_model.`` in a joined model."""
    embedding = next((name for name in names if name.endswith("embed_tokens.weight")), "")
    return embedding.removesuffix("embed_tokens.weight")


def renamed_parameters(names: Iterable[str], joined: Iterable[str]) -> dict[str, str]:
    """Name in the joined model (key) of every name of the language model (value)."""
    names = list(names)
    old, new = _prefix(names), _prefix(joined)
    return {new + name.removeprefix(old) if name.startswith(old) else name: name for name in names}
