"""The base model and its tokenizer: loading, the trainable subset, and a branch's checkpoint folder.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit.errors import CheckpointError, RecipeError, ResourceError
from merit.hf.families import FAMILIES, ROLES, Family, image_inputs
from merit.recipe.schema import ModelSettings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BaseInfo:
    """What is known of the base without loading its weights.

    Attributes:
        folder: Where its files lie on this machine.
        model_type: transformers' name of the architecture.
        architecture: Class name from its config.
        parameters: Number of stored weights (tied ones once).
        dtypes: File dtype by tensor name, by safetensors' names (BF16, F32 ...).
        context: Longest sequence it was made for (tokens), or None when its config names none.
        family: Its vision-language family; None for a text-only base.
    """

    folder: Path
    model_type: str
    architecture: str
    parameters: int
    dtypes: Mapping[str, str]
    context: int | None
    family: Family | None = None


def resolve_base(settings: ModelSettings) -> Path:
    """Folder of the base's files: the given folder, or a hub snapshot (safetensors and side files only).

    Raises:
        CheckpointError: It is neither a folder nor a hub id that can be had.
    """
    folder = Path(settings.base)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or settings.base.count("/") > 1 or settings.base.startswith("."):
        raise CheckpointError(
            f"model.base: {settings.base} is no folder on this machine.",
            "Give the folder of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer), or a hub id.",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                settings.base,
                revision=settings.revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*"],
                tqdm_class=None,
            )
        )
    except Exception as error:
        raise CheckpointError(
            f"model.base: {settings.base} is no folder here, and as a hub id it could not be had: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "Check the spelling; a relative folder is looked up beside the recipe, then in the working directory.",
            "Offline: download it elsewhere and give the folder.",
        ) from None


def inspect_base(settings: ModelSettings) -> BaseInfo:
    """Check that the base can be trained, from its small files and headers alone.

    Raises:
        CheckpointError: No config, no safetensors weights, neither a causal LM nor of a known vision-language family, or
            already quantized.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    from merit.hf import checkpoint

    folder = resolve_base(settings)
    config_file = folder / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model.base: {config_file} cannot be read ({error}).",
            "Expected the folder of a Hugging Face checkpoint with config.json.",
        ) from None
    model_type = str(config.get("model_type", ""))
    architecture = str((config.get("architectures") or [""])[0])
    family = FAMILIES.get(model_type)
    known = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family is None else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES).get(
        model_type
    )
    remote = settings.trust_remote_code and "AutoModelForCausalLM" in config.get("auto_map", {})
    names = set(known) if isinstance(known, tuple | list) else {known}
    if not remote and (known is None or (architecture and architecture not in names)):
        raise CheckpointError(
            f"model.base: {settings.base} is neither a causal language model (LlamaForCausalLM, Qwen2ForCausalLM ...) nor "
            f"of a known vision-language family ({', '.join(FAMILIES)}): found {architecture or 'none'} (model_type "
            f"{model_type or 'none'}).",
            "Choose a decoder-only language model, or a vision-language model of one of these families."
            + (" It brings its own code: read it, then set model.trust_remote_code." if "auto_map" in config else ""),
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"model.base: {settings.base} is quantized, so its weights can be neither trained nor averaged.",
            "Give the unquantized checkpoint.",
        )
    headers = checkpoint.read_headers(folder)
    # A vision-language config keeps its language model's settings in a block of their own, or (old files) beside its own.
    context = config.get("text_config", {}).get("max_position_embeddings") or config.get("max_position_embeddings")
    return BaseInfo(
        folder=folder,
        model_type=model_type,
        architecture=architecture,
        parameters=sum(header.size for header in headers.tensors.values()),
        dtypes={name: header.dtype.tag for name, header in headers.tensors.items()},
        context=int(context) if context else None,
        family=family,
    )


def load_tokenizer(settings: ModelSettings) -> Any:
    """The base's tokenizer, with a pad token and a chat template set.

    The template is the recipe's file, else the base's own, else the documented default of :mod:`merit.mixture`.
    Its origin is kept in ``tokenizer.merit_template`` ("recipe", "base" or "default"). ``tokenizer.merit_images`` says how a
    vision-language base sees images; it is None for a text-only base.

    Raises:
        CheckpointError: The folder holds no usable tokenizer or image processor.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from merit.hf import checkpoint

    logging.set_verbosity_error()
    folder = resolve_base(settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=settings.trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise CheckpointError(
            f"model.base: no tokenizer could be loaded from {folder}: {str(error).splitlines()[0]}",
            "The folder must hold tokenizer.json (or its older forms) beside config.json.",
        ) from None
    if settings.chat_template:
        try:
            tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"model.chat_template: {settings.chat_template} cannot be read ({error}).") from None
        tokenizer.merit_template = "recipe"
    elif template := tokenizer.chat_template or checkpoint.chat_template(folder):
        tokenizer.chat_template = template  # published processors keep it in a file that the tokenizer does not read
        tokenizer.merit_template = "base"
    else:
        template = resources.files("merit.mixture").joinpath("default_chat_template.jinja")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
        tokenizer.merit_template = "default"
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"model.base: the tokenizer in {folder} has no end-of-sequence token.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.merit_images = image_inputs(folder, checkpoint.read_config(folder), tokenizer, settings.max_pixels)
    return tokenizer


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
    settings: ModelSettings,
    device: torch.device,
    weights: Path | None = None,
    *,
    trainable: bool = False,
    seed: int = 0,
) -> Any:
    """A causal or vision-language LM in float32 on ``device``, in eval mode.

    Args:
        settings: The base and its trainable subset.
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

    from merit.hf import checkpoint

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(weights) if weights is not None else resolve_base(settings)
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    source = resolve_base(settings) if adapter else folder
    family = FAMILIES.get(str(checkpoint.read_config(source).get("model_type")))
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
    from merit.hf import checkpoint

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


def save_branch(model: Any, folder: Path, base: BaseInfo, *, save_dtype: str, tokenizer: Any) -> None:
    """Write a trained model as a Hugging Face checkpoint folder (an adapter folder for LoRA).

    Args:
        model: A model from :func:`load_model`, trained or not.
        folder: New folder.
        base: Gives each tensor's file dtype and the config that is carried along unchanged.
        save_dtype: ``base``: every tensor in the base's file dtype, so that frozen tensors stay bit-identical;
            ``float32``: everything in float32.
        tokenizer: Its chat template is written beside the base's tokenizer files, where it is not the base's own.
    """
    import torch

    from merit.hf import checkpoint

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
    if tokenizer.merit_template != "base":
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


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
