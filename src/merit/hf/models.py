"""Models in memory: loading, the trainable subset, and a branch's checkpoint folder.

With :mod:`merit.hf.families` (image inputs, roles of parameters) the only module that knows model families. It is handed
folders and returns models; it chooses no paths, reads no datasets, makes no batches (:mod:`merit.hf.batches`) and trains
nothing.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit.errors import CheckpointError, RecipeError, ResourceError
from merit.hf import checkpoint
from merit.hf.families import FAMILIES, ROLES, Family
from merit.recipe.schema import ModelSettings

if TYPE_CHECKING:
    import torch

    from merit.hf.base import Base


def pick_device(wanted: str) -> torch.device:
    """The device to compute on: ``auto`` takes CUDA where there is one.

    Raises:
        ResourceError: ``cuda`` was asked for and there is none.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "train.device: cuda was asked for, but PyTorch sees no CUDA device here.",
            "Use device: auto or cpu, or a PyTorch build with CUDA on a machine that has one.",
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(settings: ModelSettings, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Arithmetic in ``model.dtype`` on a GPU; float32 on a CPU. Weights stay float32 in both."""
    import torch

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
) -> Any:
    """A causal or vision-language LM in float32 on ``device``, in eval mode.

    Args:
        base: The base; its ``settings`` name the trainable subset.
        device: Where to put it.
        weights: Checkpoint folder to load in place of the base (a branch, a merged model): full, or a LoRA adapter of the
            base.
        trainable: Mark the trainable subset (adding adapters for ``lora``); otherwise every parameter is frozen.
        seed: Seed of new adapters' initial values, so that every branch starts from the same point.

    Raises:
        CheckpointError: Weights are missing, left over, or of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings, family = base.settings, base.family
    folder = Path(weights) if weights is not None else base.folder
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    source = base.folder if adapter else folder
    kind: Any = AutoModelForCausalLM if family is None else AutoModelForImageTextToText
    try:
        loaded: Any = kind.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source} cannot be loaded as a model: {str(error).splitlines()[0]}") from None
    model, info = loaded
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(what) or ())
        if names:
            raise CheckpointError(
                f"{source}: {len(names)} {what.replace('_', ' ')} between its files and its architecture, first {names[0]}.",
                "Such weights would be random or ignored; the checkpoint or its config.json is not what it says.",
            )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if trainable and family is not None:
        _check_names(model, source)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    elif trainable:
        model = mark_trainable(model, settings, seed)
    model.config.use_cache = True
    return model.to(device).eval()


def mark_trainable(model: Any, settings: ModelSettings, seed: int) -> Any:
    """Switch on gradients for the trainable subset; ``lora`` wraps the model in adapters.

    Raises:
        RecipeError: A pattern matches no parameter, or a role that a language model does not have was asked for.
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
    """Those of a base's parameters that ``model.trainable`` means.

    Args:
        names: Parameter names as they are in the base's files.
        wanted: A role, ``all``, ``lora`` (the language decoder's, in which adapters lie), or a list of roles and patterns.
        family: The base's vision-language family; None for a text-only base, all of which is language decoder.

    Raises:
        RecipeError: A pattern matches no parameter, or a role that a text-only base does not have was asked for.
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
                    f"model.trainable: pattern {item!r} matches none of the {len(names)} parameters.",
                    f"Names, as in the base's files, look like {names[0]} and {names[-1]}"
                    + (f"; roles are {', '.join(ROLES)}." if family else "."),
                )
            chosen |= found
    return chosen


def _with_adapters(model: Any, settings: ModelSettings, seed: int, family: Family | None) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    lora = settings.lora
    torch.manual_seed(seed)
    elsewhere = [name for name, _ in model.named_modules() if family and family.role(f"{name}.weight") != "language"]
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
        return get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"model.lora: {str(error).splitlines()[0]}") from None


def file_names(model: Any) -> dict[str, str]:
    """Name in a checkpoint's files of every entry of the model's state dict, by its name in the model.

    They differ for vision-language models, whose modules were rearranged after their files were published.
    """
    names = list(model.state_dict())
    if model.config.model_type not in FAMILIES:
        return {name: name for name in names}
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    marks = {
        name: torch.empty(1) for name in names
    }  # the renaming alone is wanted: one mark per tensor goes through it
    back = {id(mark): name for name, mark in marks.items()}
    return {back[id(mark)]: file_name for file_name, mark in revert_weight_conversion(model, marks).items()}


def _check_names(model: Any, folder: Path) -> None:
    """Refuse, before training, a base whose files the library would write back under other names.

    Branches and base are merged file by file: their names must be the same.
    """
    stored, written = set(checkpoint.read_headers(folder).tensors), set(file_names(model).values())
    odd = sorted(stored - written)
    if odd:
        raise CheckpointError(
            f"model.base: {folder} names {len(odd)} tensors as this version of transformers would not write them, first "
            f"{odd[0]}.",
            "Load and save the base once with it: AutoModelForImageTextToText.from_pretrained(...).save_pretrained(...).",
        )


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name, each tied one once, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_branch(model: Any, folder: Path, base: Base, *, save_dtype: str) -> None:
    """Write a trained model as a Hugging Face checkpoint folder (an adapter folder for LoRA).

    Args:
        model: A model from :func:`load_model`, trained or not.
        folder: New folder.
        base: Gives each tensor's file dtype, and the config and tokenizer files that are carried along unchanged. A chat
            template that is not its own is written beside them.
        save_dtype: ``base``: every tensor in the base's file dtype, so that frozen tensors stay bit-identical;
            ``float32``: everything in float32.
    """
    import torch

    folder.mkdir(parents=True)
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder, safe_serialization=True)
        for file in checkpoint.side_files(base.folder):
            if file.name in checkpoint.TEXT_FILES:
                shutil.copyfile(file, folder / file.name)
    else:
        names = file_names(model)
        stored = {tensor.data_ptr() for name, tensor in model.state_dict().items() if names[name] in base.dtypes}
        fallback = next(iter(base.dtypes.values()))
        state = {}
        for name, tensor in model.state_dict().items():
            if names[name] not in base.dtypes and tensor.data_ptr() in stored:
                continue  # the other name of a tied tensor, which the base's files do not have
            kept = base.dtypes.get(names[name], fallback)
            dtype = torch.float32 if save_dtype == "float32" else _torch_dtypes()[kept]
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        model.save_pretrained(folder, state_dict=state, safe_serialization=True)
        checkpoint.copy_side_files(base.folder, folder)
        if save_dtype == "float32":
            _set_config_dtype(folder / "config.json", "float32")
    # The base's own tokenizer files, never the library's rewriting of them: that can come back with other ids.
    if base.template.origin != "base":
        (folder / "chat_template.jinja").write_text(base.template.text, encoding="utf-8")


@lru_cache(maxsize=1)
def _torch_dtypes() -> dict[str, Any]:
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _set_config_dtype(config_file: Path, dtype: str) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def limit_threads(threads: int | None) -> int:
    """Set PyTorch's CPU threads (None leaves them) and return the number in force; results depend on it bit for bit."""
    import torch

    if threads:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    return torch.get_num_threads()
