"""Join a vision encoder and a language model into one vision-language checkpoint, tensor by tensor unchanged.

Checked first (:func:`plan_assembly`), from configs, headers and tokenizers: families, shapes, image tokens. Then written
(:func:`assemble`) and read back: every tensor of the result is bit-identical with its source, apart from a new projector and
new embedding rows. It trains nothing and chooses no paths. The encoder comes from a vision-language model of a known family,
or is a bare CLIP or SigLIP (:mod:`merit.prepare.encoder`); other bare encoders are not covered.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xxhash

from merit.errors import CheckpointError
from merit.hf import checkpoint
from merit.hf.families import FAMILIES, Family
from merit.prepare import encoder

if TYPE_CHECKING:
    import torch

_LANGUAGE = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3"}
"""Families whose language part is a class of its own: the model type of the language models that fit into it."""

_SHAPE = (
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "rope_parameters",
)  # fmt: skip
_IMAGE_WORDS = re.compile(r"image|img|video|vision|row_\d+_col_\d+")


@dataclass(frozen=True)
class Assembly:
    """Two checkpoints that fit together, and what becomes of them.

    Attributes:
        language: Folder of the language model.
        vision: Folder of the checkpoint that gives the encoder.
        giver: Its config; for a bare encoder that of the LLaVA around it.
        family: Its family.
        projector: copy or new.
        config: Config of the result (a transformers config).
        shapes: Shape of every parameter of the result, by its name in the model (tied ones once).
        dtypes: File dtype of the two checkpoints (such as BF16), language first.
        added: Special tokens that the language model's tokenizer lacks and gets.
        rows: Rows that its embedding gets for them (0 where unused rows are left).
        notes: What a person should know.
    """

    language: Path
    vision: Path
    giver: Any = field(repr=False)
    family: Family
    projector: Literal["copy", "new"]
    config: Any
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
        projector: copy: the projector of ``vision``, which must fit; new: one drawn by seed.

    Raises:
        CheckpointError: They do not fit: what, where, expected and found.
    """
    given, text = _config(vision, "prepare.assemble.vision_from"), _config(language, "model.base")
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
            "Give a vision-language checkpoint; its vision encoder, image processor and image tokens are taken.",
        )
    wanted = _LANGUAGE.get(model_type, text.model_type)
    if text.model_type in FAMILIES or text.model_type != wanted:
        expected = f"a language model of the type {wanted}" if model_type in _LANGUAGE else "a causal language model"
        raise CheckpointError(
            f"model.base: to join it with the encoder of {model_type}, {expected} is expected; {language} is of the type "
            f"{text.model_type}.",
            "Without prepare.assemble a vision-language model.base is prepared as it stands.",
        )
    tokenizer, added, ids = _tokens(language, vision, given)
    rows = max(0, len(tokenizer) - text.vocab_size)
    config, notes = _join_configs(given, text, ids, rows)
    shapes, old = _shapes(config), _shapes(given)
    odd = [n for n, shape in shapes.items() if family.role(n) == "projector" and old.get(n) != shape]
    if odd and projector == "copy":
        raise CheckpointError(
            f"prepare.assemble.projector: the projector of {vision} does not fit {language}: {odd[0]} is "
            f"{old.get(odd[0])}, and the language model needs {shapes[odd[0]]} (its hidden size is {text.hidden_size}).",
            "Set prepare.assemble.projector: new, and train it in a first stage.",
        )
    held = _shapes(text, causal=True)
    names = _renamed(held, shapes)
    odd = sorted(names.keys() ^ {name for name in shapes if family.role(name) == "language"})
    odd = odd or [new for new, old in names.items() if shapes[new][1:] != held[old][1:]]  # rows may be added
    if odd:
        raise CheckpointError(
            f"model.base: {language} does not fit into a {model_type} model: {len(odd)} parameters have no counterpart of "
            f"their shape, first {odd[0]}."
        )
    if added:
        where = f"{rows} new embedding rows, drawn by seed" if rows else "unused embedding rows, as they stand"
        notes.append(f"{len(added)} special tokens are added to the tokenizer ({where}): {', '.join(added[:6])}")
    template = "" if bare else checkpoint.chat_template(vision) or ""
    foreign = [token for token in added if token in template and not _IMAGE_WORDS.search(token)]
    if foreign:
        notes.append(
            f"the assembled chat template is that of {given.model_type} and writes {', '.join(foreign)}, which the language "
            "model has never seen; model.chat_template can name another (the language model's own will do)"
        )
    dtypes = (_file_dtype(language), _file_dtype(vision))
    return Assembly(language, vision, given, family, projector, config, shapes, dtypes, added, rows, tuple(notes))


def assemble(plan: Assembly, folder: Path, *, seed: int) -> dict[str, Any]:
    """Write the joined checkpoint into ``folder`` and read it back.

    Args:
        plan: From :func:`plan_assembly`.
        folder: New folder: config, weights, tokenizer, image processor, chat template.
        seed: Of a new projector and of new embedding rows.

    Returns:
        Facts for the record: parameters by role, tensors copied and drawn, tokens added, notes.

    Raises:
        CheckpointError: A source lacks weights, or what was read back is not what was to be written.
    """
    from transformers import AutoModelForImageTextToText

    family = plan.family
    taken = ("vision",) if plan.projector == "new" else ("vision", "projector")
    if encoder.is_bare(plan.vision):
        state = encoder.encoder_state(plan.vision, plan.giver.vision_config, _loading_dtype(plan.vision))
    else:
        giver = _load(AutoModelForImageTextToText, plan.vision, "prepare.assemble.vision_from")
        state = {name: tensor for name, tensor in giver.state_dict().items() if family.role(name) in taken}
        del giver
    state |= _language_state(plan, seed)
    model = _empty(plan.config)
    drawn: list[str] = []
    if plan.projector == "new":
        new = _new_projector(model, family, seed, next(iter(state.values())).dtype)
        drawn, state = sorted(new), state | new
    expected = {name for name in model.state_dict()}
    if expected != state.keys():
        raise CheckpointError(
            f"{plan.vision} and {plan.language} do not make a whole model: {min(expected ^ state.keys())} is "
            f"{'missing' if expected - state.keys() else 'left over'}."
        )
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    digests = {name: _digest(tensor) for name, tensor in model.state_dict().items()}
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[family.role(name)] += parameter.numel()
    folder.mkdir(parents=True)
    model.save_pretrained(folder, safe_serialization=True)
    del model, state
    _side_files(plan, folder)
    _read_back(folder, digests)
    return {
        "parameters": dict(sorted(counts.items())),
        "family": str(plan.config.model_type),
        "projector": plan.projector,
        "tensors_copied": len(digests) - len(drawn),
        "tensors_drawn": drawn,
        "tokens_added": list(plan.added),
        "embedding_rows_added": plan.rows,
        "notes": list(plan.notes),
    }


def parameter_sizes(plan: Assembly) -> dict[str, int]:
    """Number of weights of every parameter of the result, by its name in files."""
    from merit.hf.models import file_names

    names = file_names(_empty(plan.config))
    return {names[name]: math.prod(shape) for name, shape in plan.shapes.items()}


# ---- configs and tokens --------------------------------------------------------------------------------------------


def _config(folder: Path, key: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{key}: {folder / 'config.json'} cannot be read: {str(error).splitlines()[0]}",
            "Expected the folder of a Hugging Face checkpoint that needs no code of its own.",
        ) from None


def _join_configs(given: Any, text: Any, ids: Mapping[str, int], rows: int) -> tuple[Any, list[str]]:
    """The result's config: the giver's, with the language model's text part and token ids; and notes."""
    config, notes = copy.deepcopy(given), []
    config.architectures = None
    if str(given.model_type) in _LANGUAGE:
        values = {k: v for k, v in text.to_dict().items() if k not in _SHAPE and hasattr(given.text_config, k)}
        rope = {**(text.rope_parameters or {})}
        section = _sections(given.text_config, text)
        rope |= {k: v for k, v in given.text_config.rope_parameters.items() if k.startswith("mrope_")}
        if section != rope["mrope_section"]:
            notes.append(
                f"position sections {section} in place of {rope['mrope_section']}: the language model's heads have another "
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


def _sections(giver: Any, text: Any) -> list[int]:
    """How many rotary pairs stand for time, height and width: the giver's shares, in the language model's head size."""
    old = list(giver.rope_parameters["mrope_section"])
    pairs = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
    space = round(pairs * old[1] / sum(old))
    return [pairs - 2 * space, space, space]


def _tokens(language: Path, vision: Path, given: Any) -> tuple[Any, tuple[str, ...], dict[str, int]]:
    """The language model's tokenizer with the image tokens it lacks, those tokens, and the config's token ids in it."""
    tokenizer = _tokenizer(language, "model.base")
    if encoder.is_bare(vision):
        return _with_tokens(tokenizer, {"image_token_index": encoder.IMAGE_TOKEN}, [])
    other = _tokenizer(vision, "prepare.assemble.vision_from")
    named = {
        key: other.convert_ids_to_tokens(value)
        for key, value in given.to_dict().items()
        if key.endswith(("_token_id", "_token_index")) and _IMAGE_WORDS.search(key) and isinstance(value, int)
    }
    lost = [key for key, token in named.items() if token is None]
    if lost or not any("image" in key for key in named):
        raise CheckpointError(
            f"prepare.assemble.vision_from: {vision} names no image token that its tokenizer has "
            f"({', '.join(lost) or 'none at all'})."
        )
    template = checkpoint.chat_template(vision) or ""
    special = [str(token) for _, token in sorted(other.added_tokens_decoder.items()) if token.special]
    needed = [t for t in special if t in named.values() or t in template or _IMAGE_WORDS.search(t)]
    return _with_tokens(tokenizer, named, needed)


def _with_tokens(
    tokenizer: Any, named: Mapping[str, str], needed: list[str]
) -> tuple[Any, tuple[str, ...], dict[str, int]]:
    held = tokenizer.get_vocab()
    added = tuple(token for token in dict.fromkeys([*needed, *named.values()]) if token not in held)
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": list(added)}, replace_extra_special_tokens=False)
    ids = {key: int(tokenizer.convert_tokens_to_ids(token)) for key, token in named.items()}
    return tokenizer, added, ids


def _tokenizer(folder: Path, key: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{key}: no tokenizer in {folder}: {str(error).splitlines()[0]}") from None


def _file_dtype(folder: Path) -> str:
    tensors = checkpoint.read_headers(folder).tensors.values()
    return Counter(tensor.dtype.tag for tensor in tensors).most_common(1)[0][0]


# ---- weights -------------------------------------------------------------------------------------------------------


def _shapes(config: Any, *, causal: bool = False) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a model of this config; tied ones once."""
    return {name: tuple(parameter.shape) for name, parameter in _empty(config, causal=causal).named_parameters()}


def _empty(config: Any, *, causal: bool = False) -> Any:
    """A model of this config without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind: Any = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    with torch.device("meta"):
        return kind.from_config(config)


def _prefix(names: Iterable[str]) -> str:
    """What stands before the decoder's parameter names: ``model.`` alone, ``model.language_model.`` in a joined model."""
    embedding = next((name for name in names if name.endswith("embed_tokens.weight")), "")
    return embedding.removesuffix("embed_tokens.weight")


def _renamed(names: Iterable[str], joined: Iterable[str]) -> dict[str, str]:
    """Name in the joined model (key) of every name of the language model (value)."""
    names = list(names)
    old, new = _prefix(names), _prefix(joined)
    return {new + name.removeprefix(old) if name.startswith(old) else name: name for name in names}


def _load(kind: Any, folder: Path, key: str) -> Any:
    """The model in its files' own dtype, or in float32 where they have several, which holds every value exactly."""
    dtype = _loading_dtype(folder)
    try:
        model, info = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{key}: {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(str(name) for name in info.get(what) or ()):
            raise CheckpointError(f"{key}: {folder} has {len(names)} {what.replace('_', ' ')}, first {names[0]}.")
    return model


def _loading_dtype(folder: Path) -> torch.dtype:
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtypes = {tensor.dtype.tag for tensor in checkpoint.read_headers(folder).tensors.values()}
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return known.get(next(iter(dtypes)), torch.float32) if len(dtypes) == 1 else torch.float32


def _language_state(plan: Assembly, seed: int) -> dict[str, torch.Tensor]:
    """The language model's tensors under the joined model's names; with rows for the added tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = _load(AutoModelForCausalLM, plan.language, "model.base")
    if plan.rows:
        torch.manual_seed(seed)
        model.resize_token_embeddings(plan.config.text_config.vocab_size)
    state = model.state_dict()
    names = _renamed(state, plan.shapes)
    return {new: state[old] for new, old in names.items()}


def _new_projector(model: Any, family: Family, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Freshly drawn projector weights, by the family's own initialisation."""
    import torch

    torch.manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        names = [n for n, _ in module.named_parameters(path, recurse=False) if family.role(n) == "projector"]
        if not names:
            continue
        module.to_empty(device="cpu", recurse=False)
        with torch.no_grad():
            for parameter in module.parameters(recurse=False):
                parameter.fill_(float("nan"))  # what the initialisation leaves alone would be found below
            model._init_weights(module)
        found |= {name: model.get_parameter(name).detach().to(dtype) for name in names}
    undrawn = [name for name, tensor in found.items() if not torch.isfinite(tensor).all()]
    if undrawn or not found:
        raise CheckpointError(
            f"The {model.config.model_type} projector cannot be drawn anew: {undrawn or 'it has none'}."
        )
    return found


def _digest(tensor: torch.Tensor) -> str:
    """Shape and values; in float32, which holds every smaller type exactly, so that a mixed file can be compared."""
    import torch

    flat = (tensor.detach().float() if tensor.is_floating_point() else tensor).contiguous().reshape(-1)
    return f"{tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(flat.view(torch.uint8).numpy().data)}"


def _read_back(folder: Path, digests: Mapping[str, str]) -> None:
    """Load what was written and compare every tensor.

    Raises:
        CheckpointError: One differs: a defect of the writing library or of the disk.
    """
    from transformers import AutoModelForImageTextToText

    model = _load(AutoModelForImageTextToText, folder, "prepare.assemble")
    found = {name: _digest(tensor) for name, tensor in model.state_dict().items()}
    differs = sorted(name for name in digests.keys() | found.keys() if digests.get(name) != found.get(name))
    if differs:
        raise CheckpointError(
            f"{folder}: {len(differs)} tensors are not what was written, first {differs[0]} "
            f"({digests.get(differs[0])} written, {found.get(differs[0])} read)."
        )


# ---- side files ----------------------------------------------------------------------------------------------------

_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def _side_files(plan: Assembly, folder: Path) -> None:
    """Tokenizer and generation settings of the language model; image processor and chat template of the encoder's giver.

    The template must be one that knows images; ``model.chat_template`` replaces it. With a bare encoder it is the language
    model's.
    """
    bare = encoder.is_bare(plan.vision)
    for file in checkpoint.side_files(plan.language):
        if file.name in (*checkpoint.TEXT_FILES, "generation_config.json") and file.name not in (
            *_PROCESSOR,
            *_TEMPLATES,
        ):
            shutil.copyfile(file, folder / file.name)
    for name in _PROCESSOR:
        if (plan.vision / name).is_file():
            shutil.copyfile(plan.vision / name, folder / name)
    if bare:
        (folder / "processor_config.json").write_text(
            json.dumps(encoder.processor_config(plan.config), indent=2) + "\n"
        )
    template = checkpoint.chat_template(plan.language if bare else plan.vision)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        _edit(folder / "tokenizer_config.json", lambda config: config.pop("chat_template", None))
    if plan.added:
        tokenizer, _, _ = _tokens(plan.language, plan.vision, plan.giver)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    _check_tokenizer(plan, folder)


def _check_tokenizer(plan: Assembly, folder: Path) -> None:
    """The tokenizer must come back from the new folder as it was: some classes are chosen by the config's model type."""
    wanted, _, ids = _tokens(plan.language, plan.vision, plan.giver)
    found = _tokenizer(folder, "prepare.assemble")
    probe = "".join(wanted.added_tokens_decoder[i].content for i in sorted(wanted.added_tokens_decoder)) + _PROBE
    same = found.backend_tokenizer.encode(probe).ids == wanted.backend_tokenizer.encode(probe).ids
    if not same or any(found.convert_ids_to_tokens(i) != wanted.convert_ids_to_tokens(i) for i in ids.values()):
        raise CheckpointError(
            f"{folder}: the tokenizer of {plan.language} reads text otherwise in a {plan.config.model_type} folder.",
            "Its tokenizer_config.json should name its class (tokenizer_class).",
        )


_PROBE = " The quick  brown fox,\n\n\tÉté 2024: naïve 漢字 🙂 don't <tag> x=1+1; FIN "


def _edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        change(config)
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
