"""Models in memory: loading, the trainable subset, and a branch's checkpoint folder.

With :mod:`merit.hf.families` (image inputs, roles of parameters) the only module that knows model families. It takes
folders and returns models; batches are made by :mod:`merit.hf.batches`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from merit.errors import CheckpointError, RecipeError, ResourceError
from merit.files import write_json
from merit.hf import checkpoint, side_files
from merit.hf.base import Base
from merit.hf.families import FAMILIES, ROLES, Family
from merit.progress import count
from merit.recipe.schema import ModelSettings

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def pick_device(wanted: str) -> torch.device:
    """The device to compute on: ``auto`` uses CUDA if available.

    Raises:
        ResourceError: ``cuda`` was requested but is not available.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "train.device: cuda was requested, but PyTorch finds no CUDA device here.",
            "Use device: auto or cpu, or a PyTorch build with CUDA on a machine that has one.",
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(settings: ModelSettings, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Arithmetic in ``model.dtype`` on a GPU; float32 on a CPU. Weights stay float32 in both."""
    dtype = getattr(torch, settings.dtype)
    if device.type == "cpu" or dtype is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def load_model(
    base: Base,
    device: torch.device,
    weights: Path | None = None,
    *,
    trainable: bool = False,
    seed: int = 0,
    quantize: Literal["none", "4bit"] = "none",
) -> PreTrainedModel:
    """A causal or vision-language LM in float32 on ``device``, in eval mode.

    Args:
        base: The base; its ``settings`` define the trainable subset.
        device: Where to put it.
        weights: Checkpoint folder to load instead of the base's (a branch, a merged model): full, or a LoRA adapter of the
            base.
        trainable: Mark the trainable subset (adding adapters for ``lora``); otherwise every parameter is frozen.
        seed: Seed of new adapters' initial values, so that every branch starts from the same point.
        quantize: ``4bit`` holds the linear layers in 4-bit NF4, for adapters to be trained on (needs bitsandbytes).

    Returns:
        The library's own class; with adapters, PEFT's wrapper around it, which has the same interface.

    Raises:
        CheckpointError: Weights are missing, left over, or have the wrong shape.
    """
    settings, family = base.settings, base.family
    folder = Path(weights) if weights is not None else base.folder
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    source = base.folder if adapter else folder
    kind = AutoModelForCausalLM if family is None else AutoModelForImageTextToText
    options = {} if quantize == "none" else _four_bits(settings, device)
    model = read_model(kind, source, torch.float32, trust_remote_code=settings.trust_remote_code, options=options)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if trainable and family is not None and quantize == "none":
        _check_names(model, source)
    if adapter is not None:
        model = cast(PreTrainedModel, PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable))
    elif trainable:
        model = mark_trainable(model, settings, seed)
    model.config.use_cache = True
    if quantize == "none":
        model.to(device)  # type: ignore[arg-type]
    model.eval()
    return model


def _four_bits(settings: ModelSettings, device: torch.device) -> dict[str, object]:
    """Loading options for a base in 4-bit NF4 with double quantization, as in QLoRA (arXiv 2305.14314)."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def read_model(
    kind: type[AutoModelForCausalLM | AutoModelForImageTextToText | AutoModel],
    folder: Path,
    dtype: torch.dtype,
    *,
    where: str = "",
    trust_remote_code: bool = False,
    options: Mapping[str, object] | None = None,
    allow_unused: bool = False,
) -> PreTrainedModel:
    """A model with exactly the weights in its files.

    Args:
        kind: The library's auto class, which chooses the model class.
        folder: Checkpoint folder.
        dtype: Of the weights in memory.
        where: Prefix of messages, such as a recipe key.
        trust_remote_code: Run the checkpoint's own code.
        options: Passed on to the library: a ``config`` to use instead of the folder's, a quantization.
        allow_unused: The files may contain more than the model needs.

    Raises:
        CheckpointError: Weights are missing, left over, or have the wrong shape, or the library cannot load the folder.
    """
    quiet()
    try:
        loaded: Any = kind.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **(options or {}),
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the library raises on a config that does not fit
        raise CheckpointError(
            f"{where}{folder} cannot be loaded as a model: {side_files.reason(error)}",
            "Its config.json and weights must be from one checkpoint, of a type that this version of transformers knows.",
        ) from None
    model, info = loaded
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys")[: 2 if allow_unused else 3]:
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(problem) or ())
        if names:
            raise CheckpointError(
                f"{where}{folder}: {len(names)} {problem.replace('_', ' ')} between its files and its architecture, "
                f"first {names[0]}.",
                "Such weights would be random or ignored; the checkpoint and its config.json do not match.",
            )
    return cast(PreTrainedModel, model)


def quiet() -> None:
    """Keep transformers' advice and progress bars out of this package's own output."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def mark_trainable(model: PreTrainedModel, settings: ModelSettings, seed: int) -> PreTrainedModel:
    """Enable gradients for the trainable subset; ``lora`` wraps the model in adapters.

    Raises:
        RecipeError: A pattern matches no parameter, or a role that a language model does not have was requested.
    """
    wanted = settings.trainable
    family = FAMILIES.get(model.config.model_type)
    if wanted == "lora":
        return _with_adapters(model, settings, seed, family)
    names = file_names(model)
    chosen = trainable_names(list(names.values()), wanted, family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names[name] in chosen)
    return model


def trainable_names(names: Sequence[str], wanted: str | Sequence[str], family: Family | None) -> set[str]:
    """The base's parameters that ``model.trainable`` selects.

    Args:
        names: Parameter names as in the base's files.
        wanted: A role, ``all``, ``lora`` (the language decoder's, with adapters), or a list of roles and patterns.
        family: The base's vision-language family; None for a text-only base, all of which is language decoder.

    Raises:
        RecipeError: A pattern matches no parameter, or a role that a text-only base does not have was requested.
    """
    chosen: set[str] = set()
    for item in [wanted] if isinstance(wanted, str) else wanted:
        role = "language" if item == "lora" else item
        if item == "all":
            chosen |= set(names)
        elif role in ROLES:
            found = {name for name in names if (family.role(name) if family else "language") == role}
            if not found:
                reason = "this base is text-only" if family is None else "the base has no such parameters"
                raise RecipeError(f"model.trainable: {item} is a role of vision-language models; {reason}.")
            chosen |= found
        else:
            found = set(fnmatch.filter(names, item))
            if not found:
                raise RecipeError(
                    f"model.trainable: pattern {item!r} matches none of the {count(len(names), 'parameter')}.",
                    f"Names, as in the base's files, look like {names[0]} and {names[-1]}"
                    + (f"; roles are {', '.join(ROLES)}." if family else "."),
                )
            chosen |= found
    return chosen


def _with_adapters(
    model: PreTrainedModel, settings: ModelSettings, seed: int, family: Family | None
) -> PreTrainedModel:
    lora = settings.lora
    torch.manual_seed(seed)
    elsewhere = [
        name for name, _ in model.named_modules() if family and family.roles(f"{name}.weight") not in ([], ["language"])
    ]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a fraction is fine at run time
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=elsewhere or None,
        use_rslora=lora.rslora,
        task_type="CAUSAL_LM",
    )
    try:
        return cast(PreTrainedModel, get_peft_model(model, config))
    except ValueError as error:
        raise RecipeError(f"model.lora: {side_files.reason(error)}") from None


def file_names(model: PreTrainedModel) -> dict[str, str]:
    """Name in a checkpoint's files of every entry of the model's state dict, by its name in the model.

    They differ for vision-language models whose modules were rearranged after their files were published.
    """
    names = list(model.state_dict())
    if model.config.model_type not in FAMILIES:
        return {name: name for name in names}
    marks = {
        name: torch.empty(1) for name in names
    }  # only the renaming is needed: one marker per tensor goes through it
    back = {id(mark): name for name, mark in marks.items()}
    return {back[id(mark)]: file_name for file_name, mark in revert_weight_conversion(model, marks).items()}


def _check_names(model: PreTrainedModel, folder: Path) -> None:
    """Refuse, before training, a base whose tensors the library would save under other names.

    Branches and base are merged by tensor name, so names must be the same.
    """
    stored, written = set(checkpoint.read_headers(folder).tensors), set(file_names(model).values())
    odd = sorted(stored - written)
    if odd:
        raise CheckpointError(
            f"model.base: {folder} names {len(odd)} tensors as this version of transformers would not write them, first "
            f"{odd[0]}.",
            "Load and save the base once with it: AutoModelForImageTextToText.from_pretrained(...).save_pretrained(...).",
        )


def trainable_parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name, each tied one once, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_branch(model: PreTrainedModel, folder: Path, base: Base, *, save_dtype: str) -> None:
    """Write a trained model as a Hugging Face checkpoint folder (an adapter folder for LoRA).

    Args:
        model: A model from :func:`load_model`, trained or not.
        folder: New folder.
        base: Determines each tensor's file dtype; its config and tokenizer files are copied unchanged. A chat
            template that is not its own is written next to them.
        save_dtype: ``base``: every tensor in the base's file dtype, so that frozen tensors stay bit-identical;
            ``float32``: everything in float32.
    """
    folder.mkdir(parents=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), safe_serialization=True)
        side_files.copy_files(side_files.input_files(base.folder), folder)
    else:
        names = file_names(model)
        stored = {tensor.data_ptr() for name, tensor in model.state_dict().items() if names[name] in base.dtypes}
        fallback = next(iter(base.dtypes.values()))
        state = {}
        for name, tensor in model.state_dict().items():
            if names[name] not in base.dtypes and tensor.data_ptr() in stored:
                continue  # the other name of a tied tensor, which the base's files do not have
            kept = base.dtypes.get(names[name], fallback)
            dtype = torch.float32 if save_dtype == "float32" else _DTYPES[kept]
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        model.save_pretrained(folder, state_dict=state, safe_serialization=True)
        side_files.copy_side_files(base.folder, folder)
        if save_dtype == "float32":
            config = side_files.read_config(folder)
            write_json(folder / "config.json", side_files.set_config_dtype(config, "float32"))
    base.write_inputs(folder)


def limit_threads(threads: int | None) -> int:
    """Set PyTorch's CPU threads (None: unchanged) and return their number; results depend on it bit for bit."""
    if threads:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    return torch.get_num_threads()
