"""Join a vision encoder and a language model into one vision-language checkpoint, with every tensor unchanged.

The result is read back: every tensor is bit-identical to its source, apart from a new projector and new
embedding rows. :mod:`merit.prepare.plan` checks whether two checkpoints fit together.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from merit.errors import CheckpointError
from merit.files import write_json, write_text
from merit.hf import checkpoint, side_files
from merit.hf.base import load_tokenizer
from merit.hf.families import Family
from merit.hf.models import read_model
from merit.prepare import encoder
from merit.prepare.plan import Assembly, empty_model, join_tokenizers, renamed_parameters
from merit.progress import count

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Assembled:
    """The result of an assembly.

    Attributes:
        parameters: Number of weights by role.
        family: transformers' ``model_type``.
        projector: copy or new.
        tensors_copied: Number of tensors copied from a source.
        tensors_drawn: Names of the new ones.
        tokens_added: Special tokens added to the tokenizer.
        embedding_rows_added: Rows added to the embedding.
        notes: What the user should know.
    """

    parameters: dict[str, int]
    family: str
    projector: Literal["copy", "new"]
    tensors_copied: int
    tensors_drawn: tuple[str, ...]
    tokens_added: tuple[str, ...]
    embedding_rows_added: int
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Plain JSON values for a record."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def assemble(plan: Assembly, folder: Path, *, seed: int) -> Assembled:
    """Write the joined checkpoint into ``folder`` and read it back.

    Args:
        plan: From :func:`plan_assembly`.
        folder: New folder: config, weights, tokenizer, image processor, chat template.
        seed: Of a new projector and of new embedding rows.

    Raises:
        CheckpointError: A source lacks weights, or what was read back differs from what was written.
    """
    family = plan.family
    taken = ("vision",) if plan.projector == "new" else ("vision", "projector")
    if encoder.is_bare(plan.vision):
        state = encoder.encoder_state(plan.vision, plan.giver.vision_config, _loading_dtype(plan.vision))
    else:
        giver = _load(AutoModelForImageTextToText, plan.vision, "prepare.assemble.vision_from: ")
        state = {name: tensor for name, tensor in giver.state_dict().items() if family.role(name) in taken}
        del giver
    state |= _language_state(plan, seed)
    model = empty_model(plan.config)
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
    return Assembled(
        parameters=dict(sorted(counts.items())),
        family=str(plan.config.model_type),
        projector=plan.projector,
        tensors_copied=len(digests) - len(drawn),
        tensors_drawn=tuple(drawn),
        tokens_added=plan.added,
        embedding_rows_added=plan.rows,
        notes=plan.notes,
    )


# ---- weights -------------------------------------------------------------------------------------------------------


def _load(kind: type[AutoModelForCausalLM | AutoModelForImageTextToText], folder: Path, where: str) -> PreTrainedModel:
    return read_model(kind, folder, _loading_dtype(folder), where=where)


def _loading_dtype(folder: Path) -> torch.dtype:
    """The files' dtype, or float32 if they have several, which represents every value exactly."""
    dtypes = {tensor.dtype.tag for tensor in checkpoint.read_headers(folder).tensors.values()}
    return _FLOATS.get(next(iter(dtypes)), torch.float32) if len(dtypes) == 1 else torch.float32


def _language_state(plan: Assembly, seed: int) -> dict[str, torch.Tensor]:
    """The language model's tensors under the joined model's names; with rows for the added tokens."""
    model = _load(AutoModelForCausalLM, plan.language, "model.base: ")
    if plan.rows:
        torch.manual_seed(seed)
        model.resize_token_embeddings(plan.config.text_config.vocab_size)
    state = model.state_dict()
    names = renamed_parameters(state, plan.shapes)
    return {new: state[old] for new, old in names.items()}


def _new_projector(model: PreTrainedModel, family: Family, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """New projector weights, from the family's own initialisation."""
    torch.manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        names = [n for n, _ in module.named_parameters(path, recurse=False) if family.role(n) == "projector"]
        if not names:
            continue
        module.to_empty(device="cpu", recurse=False)
        with torch.no_grad():
            for parameter in module.parameters(recurse=False):
                parameter.fill_(float("nan"))  # what the initialisation leaves untouched is found below
            operator.methodcaller("_init_weights", module)(model)  # the library's own initialisation
        found |= {name: model.get_parameter(name).detach().to(dtype) for name in names}
    undrawn = [name for name, tensor in found.items() if not torch.isfinite(tensor).all()]
    if undrawn or not found:
        raise CheckpointError(
            f"The {model.config.model_type} projector cannot be initialised: {undrawn or 'it has none'}."
        )
    return found


def _digest(tensor: torch.Tensor) -> str:
    """Shape and values; in float32, which represents every smaller type exactly, so that a mixed file can be compared."""
    flat = (tensor.detach().float() if tensor.is_floating_point() else tensor).contiguous().reshape(-1)
    return f"{tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(flat.view(torch.uint8).numpy().data)}"


def _read_back(folder: Path, digests: Mapping[str, str]) -> None:
    """Load what was written and compare every tensor.

    Raises:
        CheckpointError: One differs: a defect of the writing library or of the disk.
    """
    model = _load(AutoModelForImageTextToText, folder, "prepare.assemble: ")
    found = {name: _digest(tensor) for name, tensor in model.state_dict().items()}
    differs = sorted(name for name in digests.keys() | found.keys() if digests.get(name) != found.get(name))
    if differs:
        raise CheckpointError(
            f"{folder}: not what was written: {count(len(differs), 'tensor')}, first {differs[0]} "
            f"({digests.get(differs[0])} written, {found.get(differs[0])} read)."
        )


# ---- side files ----------------------------------------------------------------------------------------------------


def _side_files(plan: Assembly, folder: Path) -> None:
    """Tokenizer and generation settings of the language model; image processor and chat template of ``vision_from``.

    The template must support images; ``model.chat_template`` overrides it. With a bare encoder it is the language
    model's.
    """
    bare = encoder.is_bare(plan.vision)
    kept = side_files.tokenizer_files(plan.language)
    if (plan.language / "generation_config.json").is_file():
        kept["generation_config.json"] = plan.language / "generation_config.json"
    side_files.copy_files(kept, folder)
    side_files.copy_files(side_files.processor_files(plan.vision), folder)
    if bare:
        write_json(folder / "processor_config.json", encoder.processor_config(plan.config))
    template = side_files.chat_template(plan.language if bare else plan.vision)
    if template is not None:
        write_text(folder / "chat_template.jinja", template)
        if (folder / "tokenizer_config.json").is_file():
            side_files.edit_json(folder / "tokenizer_config.json", {"chat_template": None})
    if plan.added:
        tokenizer, _, _ = join_tokenizers(plan.language, plan.vision, plan.giver)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    _check_tokenizer(plan, folder)


def _check_tokenizer(plan: Assembly, folder: Path) -> None:
    """The tokenizer must load unchanged from the new folder: some classes are chosen by the config's model type."""
    wanted, _, ids = join_tokenizers(plan.language, plan.vision, plan.giver)
    found = load_tokenizer(folder, "prepare.assemble")
    probe = "".join(wanted.added_tokens_decoder[i].content for i in sorted(wanted.added_tokens_decoder)) + _PROBE
    same = found.backend_tokenizer.encode(probe).ids == wanted.backend_tokenizer.encode(probe).ids
    if not same or any(found.convert_ids_to_tokens(i) != wanted.convert_ids_to_tokens(i) for i in ids.values()):
        raise CheckpointError(
            f"{folder}: the tokenizer of {plan.language} reads text differently in a {plan.config.model_type} folder.",
            "Its tokenizer_config.json should name its class (tokenizer_class).",
        )


_PROBE = " The quick  brown fox,\n\n\tÉté 2024: naïve 漢字 🙂 don't <tag> x=1+1; FIN "
