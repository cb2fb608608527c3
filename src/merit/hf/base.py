"""The base (θ0): its facts, tokenizer, chat template, image inputs, and the fingerprints of their files.

One :class:`Base` is opened per command and passed to every stage. State set on a live tokenizer does not affect the
fingerprints: both depend only on files and settings. Weights are loaded by :mod:`merit.hf.models`.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging

from merit.errors import CheckpointError, RecipeError
from merit.files import file_hash, fingerprint, write_json, write_text
from merit.hf import checkpoint, side_files
from merit.hf.batches import Batcher
from merit.hf.families import FAMILIES, Family, image_inputs
from merit.hf.image_inputs import ImageInputs
from merit.recipe.schema import ModelSettings

_SENSES = ("vision_config", "audio_config", "video_config", "vision_tower", "mm_vision_tower", "visual", "vision")
"""Config keys that show an encoder for something other than text."""

TemplateOrigin = Literal["recipe", "base", "default"]


@dataclass(frozen=True)
class BaseFacts:
    """What is known of a base without loading its weights.

    Attributes:
        folder: Folder of its files on this machine.
        model_type: transformers' name of the architecture.
        architecture: Class name from its config.
        parameters: Number of stored weights (tied ones once).
        dtypes: File dtype by tensor name, in safetensors' notation (BF16, F32 ...).
        context: Longest sequence that it supports (tokens), or None if its config does not say.
        family: Its vision-language family; None for a text-only base.
    """

    folder: Path
    model_type: str
    architecture: str
    parameters: int
    dtypes: Mapping[str, str]
    context: int | None
    family: Family | None = None


@dataclass(frozen=True)
class Template:
    """A chat template and its origin.

    Attributes:
        text: Jinja.
        origin: ``recipe`` (model.chat_template), ``base`` (its files) or ``default`` (the documented one).
    """

    text: str
    origin: TemplateOrigin


@dataclass(frozen=True, eq=False)
class Base(BaseFacts):
    """The base as used by every stage; tokenizer and image inputs are opened on first use.

    Attributes:
        settings: The recipe's ``model`` block that it was opened with.
        hashes: Known hashes of its weight files by path, size and time; new ones are added.
    """

    settings: ModelSettings = field(kw_only=True)
    hashes: MutableMapping[str, str] | None = field(default=None, kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        """Facts and fingerprints only: another process opens tokenizer and image inputs from the files."""
        live = ("tokenizer", "images", "template")
        return {key: value for key, value in self.__dict__.items() if key not in live}

    @cached_property
    def template(self) -> Template:
        """The chat template in force: the recipe's file, else the base's own, else the documented default.

        Raises:
            RecipeError: The recipe's file cannot be read.
            CheckpointError: One of the base's cannot.
        """
        if self.settings.chat_template:
            try:
                return Template(_template_file(self.settings.chat_template).read_text(encoding="utf-8"), "recipe")
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(
                    f"model.chat_template: {self.settings.chat_template} cannot be read ({error})."
                ) from None
        if own := side_files.chat_template(self.folder):
            return Template(own, "base")
        return Template(default_chat_template(), "default")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Its tokenizer, with a pad token, right padding and :attr:`template` set.

        Raises:
            CheckpointError: The folder has no usable tokenizer.
        """
        tokenizer = load_tokenizer(self.folder, "model.base", trust_remote_code=self.settings.trust_remote_code)
        tokenizer.chat_template = self.template.text
        if tokenizer.eos_token_id is None:
            raise CheckpointError(f"model.base: the tokenizer in {self.folder} has no end-of-sequence token.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        return tokenizer

    @cached_property
    def images(self) -> ImageInputs | None:
        """How it processes images; None for a text-only base.

        Raises:
            CheckpointError: Its image processor or image token is missing.
        """
        config = side_files.read_config(self.folder)
        return image_inputs(self.folder, config, self.tokenizer, self.settings.max_pixels)

    def write_inputs(self, folder: Path) -> None:
        """Update the side files of a model folder, copied from this base, to show how its rows were made.

        That is the chat template, if it is not the base's own, and the image processor's size, if ``max_pixels``
        lowered it: inference then sees images as training did. Tokenizer files are never rewritten, since the
        library's rewriting can change ids.
        """
        if self.template.origin != "base":
            write_text(folder / "chat_template.jinja", self.template.text)
        changed = {} if self.images is None else self.images.changed
        for name, path in side_files.processor_files(folder).items() if changed else ():
            content = side_files.read_json(path, side_files.PROCESSOR)
            inner = content.get("image_processor") if name == "processor_config.json" else content
            if name.startswith("video") or not inner:
                continue
            inner.update({key: value for key, value in changed.items() if key in inner or key == "size"})
            write_json(path, content)

    @property
    def batcher(self) -> Batcher:
        """Makes batches of encoded rows."""
        return Batcher(int(self.tokenizer.pad_token_id), self.images)

    @cached_property
    def fingerprint(self) -> str:
        """Content of weights, config, tokenizer and template files (:func:`merit.hf.checkpoint.fingerprint`)."""
        return checkpoint.fingerprint(self.folder, self.hashes)

    @cached_property
    def input_fingerprint(self) -> str:
        """Content of what turns rows into model inputs: tokenizer and image processor files, template, pixel limit.

        A hash of bytes on disk and of settings; nothing is loaded.
        """
        files = side_files.input_files(self.folder)
        if self.family is not None:  # image token, patch size
            files["config.json"] = self.folder / "config.json"
        if self.settings.trust_remote_code:
            files |= {path.name: path for path in self.folder.glob("*.py")}
        content = {
            "files": {name: file_hash(path) for name, path in files.items()},
            "template": self.template.text,
            "max_pixels": self.settings.max_pixels if self.family is not None else None,
        }
        return fingerprint(content)


def default_chat_template() -> str:
    """The template of a base that has none (docs/mixture.md shows what it renders)."""
    return (Path(__file__).parent / "default_chat_template.jinja").read_text(encoding="utf-8")


def _template_file(given: str) -> Path:
    """The file that ``model.chat_template`` names: ``builtin:NAME``, or a path.

    Raises:
        RecipeError: There is no such built-in template.
    """
    if not given.startswith("builtin:"):
        return Path(given)
    known = {f"builtin:{file.stem}": file for file in (Path(__file__).parent / "chat_templates").glob("*.jinja")}
    if given not in known:
        names = ", ".join(sorted(known))
        raise RecipeError(f"model.chat_template: {given} is unknown; there are {names}.")
    return known[given]


def resolve_base(settings: ModelSettings) -> Path:
    """Folder of the base's files: the given folder, or a hub snapshot (safetensors and side files only).

    Raises:
        CheckpointError: It is not a folder, and not a hub id that can be downloaded.
    """
    folder = Path(settings.base)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or settings.base.count("/") > 1 or settings.base.startswith("."):
        raise CheckpointError(
            f"model.base: {settings.base} is not a folder on this machine.",
            "Give the folder of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer), or a hub id.",
            "If it was moved (or the run folder was copied to another machine): --set model.base=DIR",
        )
    try:
        return Path(
            snapshot_download(settings.base, revision=settings.revision, allow_patterns=list(side_files.DOWNLOADED))
        )
    except Exception as error:  # the libraries' network errors have no common base class
        raise CheckpointError(
            f"model.base: {settings.base} is not a folder here, and as a hub id it could not be downloaded: "
            f"{side_files.reason(error)}",
            "Check the spelling; a relative folder is looked up next to the recipe, then in the working directory.",
            "Offline: download it elsewhere and give the folder.",
        ) from None


def open_base(settings: ModelSettings | str | Path, hashes: MutableMapping[str, str] | None = None) -> Base:
    """Open a base: check from its small files and headers that it can be trained. Weights are not read.

    Args:
        settings: The recipe's ``model`` block, or just a folder or hub id.
        hashes: Known hashes of big files; new ones are added (:func:`merit.hf.checkpoint.weights_digest`).

    Raises:
        CheckpointError: No config, no safetensors weights, neither a causal LM nor of a known vision-language family, or
            already quantized.
    """
    if not isinstance(settings, ModelSettings):
        settings = ModelSettings(base=str(settings))
    folder = resolve_base(settings)
    config = side_files.read_config(folder)
    model_type = config.get("model_type") or ""
    architecture = (config.get("architectures") or [""])[0]
    family = FAMILIES.get(model_type)
    # Some of these are also in the library's list of causal language models: they would pass as text models.
    sees = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or any(config.get(key) for key in _SENSES)
    if sees and family is None:
        raise CheckpointError(
            f"model.base: {settings.base} is a {architecture or 'model'} (model_type {model_type or 'none'}), which takes "
            "more than text; it is not of a known vision-language family.",
            f"Known families, by model_type: {', '.join(FAMILIES)}.",
            "For text only, give a checkpoint of just its language model.",
        )
    known = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family is None else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES).get(
        model_type
    )
    remote = settings.trust_remote_code and "AutoModelForCausalLM" in (config.get("auto_map") or {})
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
    if family is not None:
        for name in headers.tensors:
            family.role(name)  # refuses a tensor without a role
    # A vision-language config has its language model's settings in a separate block, or (old files) among its own.
    text = config.get("text_config") or {}
    context = text.get("max_position_embeddings") or config.get("max_position_embeddings")
    return Base(
        folder=folder,
        model_type=model_type,
        architecture=architecture,
        parameters=sum(header.size for header in headers.tensors.values()),
        dtypes={name: header.dtype.tag for name, header in headers.tensors.items()},
        context=context or None,
        family=family,
        settings=settings,
        hashes=hashes,
    )


def load_tokenizer(folder: Path, key: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """A fresh tokenizer object from a folder's files.

    Raises:
        CheckpointError: There is none, or only one without character offsets; ``key`` is the recipe key of the folder.
    """
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever the library raises on damaged files
        raise CheckpointError(
            f"{key}: no tokenizer could be loaded from {folder}: {side_files.reason(error)}",
            "The folder must contain tokenizer.json (or its older forms) next to config.json.",
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"{key}: {folder} gives a {type(tokenizer).__name__}, which cannot say which token holds which character.",
            "Save the base once with its fast tokenizer (tokenizer.json).",
        )
    if type(length := tokenizer.model_max_length) not in (int, float):
        raise CheckpointError(
            f"{key}: {folder / 'tokenizer_config.json'}: model_max_length must be a number; found {length!r:.60}."
        )
    return tokenizer
