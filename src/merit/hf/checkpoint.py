"""The weights of a Hugging Face checkpoint folder as stored on disk: headers, tensors, fingerprint. Storage, no maths.

Everything works from the safetensors files themselves: no model is built and no ML library is imported. A tensor's name is
its name on disk; modules can name it differently. :mod:`merit.hf.side_files` handles the folder's other files.

Format: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, then the data.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from merit.errors import CheckpointError
from merit.hf.dtypes import BLOCK, DTYPES, DType
from merit.hf.side_files import parse_json, read_json, side_files
from merit.parallel import parallel, threads

MODEL_STEM, ADAPTER_STEM = "model", "adapter_model"
SECOND_MOMENTS = "second_moments"
"""Stem of the file with a branch's second moments, next to its checkpoint folder: tensors by their names in the base."""
_LARGEST = 2**63
LARGE = 2 * 10**9
"""From this many bytes of weights, the known hash of an unchanged file (by size and time) is used without reading it."""
_HEADER_LIMIT = 100_000_000  # the reference implementation's limit


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor is stored.

    Attributes:
        name: Its name on disk.
        dtype: One of ``DTYPES``.
        shape: Its shape; () is a scalar, a 0 makes it empty.
        file: The file that contains it, as an index-relative name (``model-00001-of-00002.safetensors``).
        start: Absolute offset of its first byte in that file.
        nbytes: Its size in bytes.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.nbytes // self.dtype.itemsize

    @property
    def blocks(self) -> int:
        """Number of ``BLOCK``-element blocks (the last may be short)."""
        return -(-self.size // BLOCK)


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file: its size in bytes, its metadata, and its tensors in the order of their data."""

    name: str
    size: int
    metadata: dict[str, str]
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The headers of a checkpoint folder; no tensor data is held.

    Attributes:
        folder: The folder.
        files: Weight files by name, in sorted order.
        tensors: All tensors by name on disk.
        stem: ``model`` or ``adapter_model``.
    """

    folder: Path
    files: dict[str, WeightFile]
    tensors: dict[str, TensorInfo] = field(repr=False)
    stem: str = MODEL_STEM

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(f.size for f in self.files.values())

    def path(self, tensor: TensorInfo) -> Path:
        """The file that contains ``tensor``."""
        return self.folder / tensor.file


# ---- headers -------------------------------------------------------------------------------------------------------


def read_headers(folder: str | os.PathLike[str], stem: str | None = None) -> Checkpoint:
    """Read and validate the headers of a checkpoint folder: one file, or shards with an index.

    Args:
        folder: A Hugging Face checkpoint folder.
        stem: ``model`` (one file or shards), ``adapter_model`` (a PEFT adapter), or None: whichever exists.

    Returns:
        The headers; every byte of every file's data section belongs to exactly one tensor.

    Raises:
        CheckpointError: The folder is missing or contains only pickles; a file is truncated, or has overlapping or wrong
            offsets; the index and the shards disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; one with config.json and *.safetensors is expected.")
    if stem is None:
        stem = ADAPTER_STEM if not _weights(folder, MODEL_STEM) and _weights(folder, ADAPTER_STEM) else MODEL_STEM
    found = _weights(folder, stem)
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} contains both {found[0]} and {found[1]}, so it is unclear which weights are meant.",
            "Remove the leftover one (transformers would load the single file).",
        )
    if not found:
        _refuse_without_weights(folder, stem)
    single = not found[0].endswith(".json")
    files = {found[0]: _read_file(folder, found[0])} if single else _read_sharded(folder, found[0])
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(files):
        for tensor in files[name].tensors:
            if tensor.name in tensors:
                raise CheckpointError(f"{folder}: {tensor.name} is in both {tensors[tensor.name].file} and {name}.")
            tensors[tensor.name] = tensor
    if not tensors:
        raise CheckpointError(f"{folder} contains no tensors.")
    return Checkpoint(folder, {name: files[name] for name in sorted(files)}, tensors, stem)


def _weights(folder: Path, stem: str) -> list[str]:
    names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    return [name for name in names if (folder / name).is_file()]


def _refuse_without_weights(folder: Path, stem: str) -> None:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    pickles = [p for p in pickles if p not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    if pickles:
        raise CheckpointError(
            f"{folder} contains pickled weights ({pickles[0]}), which can run code when loaded; only safetensors are read.",
            "Convert once, in a Python that trusts the file:",
            f"  AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('CONVERTED')  # plus the tokenizer",
        )
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    there = f"it contains {', '.join(shards[:3])}" if shards else "there is no safetensors file"
    raise CheckpointError(f"{folder} has neither {stem}.safetensors nor {stem}.safetensors.index.json ({there}).")


def _read_sharded(folder: Path, index: str) -> dict[str, WeightFile]:
    weight_map = read_json(folder / index, {"weight_map": dict}).get("weight_map")
    if not weight_map:
        raise CheckpointError(f"{folder / index} has no weight_map.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{folder / index}: the shard of {tensor} is not a text.")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{folder / index} names a shard outside the folder: {name!r}.")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / index} names the shard {name!r}, expected *.safetensors.")
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: shard {name}, named by {index}, is missing.", "Copy or download it again."
            )
    files = {name: _read_file(folder, name) for name in sorted(set(weight_map.values()))}
    held = {tensor.name: name for name, file in files.items() for tensor in file.tensors}
    for tensor in sorted(weight_map.keys() | held.keys()):
        if weight_map.get(tensor) != held.get(tensor):
            raise CheckpointError(
                f"{folder}: {index} places {tensor} in {weight_map.get(tensor, 'no file')}, "
                f"but it is in {held.get(tensor, 'no file')}.",
                "The shards were swapped or belong to different checkpoints; copy or download them again.",
            )
    return files


def _read_file(folder: Path, name: str) -> WeightFile:
    path = folder / name
    size = path.stat().st_size

    def bad(why: str) -> CheckpointError:
        return CheckpointError(
            f"{path} is damaged: {why}.", "Copy or download it again, or retrain the branch that wrote it."
        )

    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, _HEADER_LIMIT):
            raise bad(f"its header length is {length} bytes, its size {size}")
        header = parse_json(stream.read(length), f"{path} is damaged: its header", {"__metadata__": dict})
    metadata = header.pop("__metadata__", None) or {}
    data = 8 + length
    tensors = sorted(
        (_tensor_info(key, value, name, data, bad) for key, value in header.items()), key=lambda t: (t.start, t.nbytes)
    )
    end = data
    for tensor in tensors:
        if tensor.start != end:
            kind = "overlaps the previous tensor" if tensor.start < end else "leaves a gap before it"
            raise bad(f"tensor {tensor.name} starts at byte {tensor.start}, expected {end}: it {kind}")
        end += tensor.nbytes
    if end != size:
        raise bad(f"its header describes {end} bytes, found {size}" + (": it is truncated" if size < end else ""))
    return WeightFile(name, size, {str(k): str(v) for k, v in metadata.items()}, tuple(tensors))


def _tensor_info(name: str, entry: object, file: str, data: int, bad: Callable[[str], CheckpointError]) -> TensorInfo:
    fields = entry if isinstance(entry, dict) else {}
    tag, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(tag, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise bad(f"tensor {name} lacks dtype, shape or data_offsets")
    start, stop = offsets
    if tag not in DTYPES:
        raise bad(f"tensor {name} has the unknown dtype {tag!r}")
    if not all(type(x) is int and 0 <= x < _LARGEST for x in (*shape, start, stop)):
        raise bad(f"tensor {name} has an impossible shape or offset: {shape}, [{start}, {stop}]")
    dtype, nbytes = DTYPES[tag], DTYPES[tag].itemsize
    for length in shape:
        nbytes = min(nbytes * length, _LARGEST)
    if stop - start != nbytes:
        raise bad(f"tensor {name} {tag}{shape} needs {nbytes} bytes, its offsets span {stop - start}")
    return TensorInfo(name, dtype, tuple(shape), file, data + start, nbytes)


# ---- tensors -------------------------------------------------------------------------------------------------------


def pread_into(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill ``buffer`` (bytes) from ``offset`` of an open file; CheckpointError if the file is too short."""
    while buffer:
        got = os.preadv(descriptor, [buffer], offset)
        if got == 0:
            raise CheckpointError(f"{path} became shorter while it was read.")
        buffer, offset = buffer[got:], offset + got


def read_tensor(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Read one tensor's raw values.

    Returns:
        An array of the tensor's shape in ``DType.raw`` (bf16 as uint16: pass it through ``to_float``).

    Raises:
        CheckpointError: No such tensor, or the file became shorter.
    """
    if name not in checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.folder} has no tensor {name}.")
    tensor = checkpoint.tensors[name]
    data, path = bytearray(tensor.nbytes), checkpoint.path(tensor)
    with path.open("rb") as stream:
        pread_into(stream.fileno(), memoryview(data), tensor.start, path)
    return np.frombuffer(data, tensor.dtype.raw).reshape(tensor.shape)


# ---- fingerprint ---------------------------------------------------------------------------------------------------


class TensorDigest:
    """Digest of tensors, filled block by block in any order and from any thread.

    A tensor's digest is the SHA-256 of its blocks' 128-bit XXH3 values; a checkpoint's weights digest is the SHA-256 of
    (name, dtype, shape, digest) over the sorted names. So it does not depend on how tensors are distributed over files.
    XXH3 runs at memory speed (SHA-256 alone would cost more than the whole merge) and finds every accidental change; it
    is not a defence against somebody who forges weights on purpose.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, bytearray] = {}
        self._steps: dict[str, int] = {}
        self._tensors: dict[str, TensorInfo] = {}

    def add_tensor(self, tensor: TensorInfo) -> None:
        """Announce a tensor (before its blocks; from one thread)."""
        self._tensors[tensor.name] = tensor
        self._blocks[tensor.name] = bytearray(16 * tensor.blocks)
        self._steps[tensor.name] = BLOCK * tensor.dtype.itemsize

    def add(self, name: str, first: int, data: memoryview) -> None:
        """Add bytes of tensor ``name``, from the start of block number ``first`` to the end of a block or of the tensor."""
        step, digest = self._steps[name], xxhash.xxh3_128_digest
        parts = b"".join([digest(data[start : start + step]) for start in range(0, len(data), step)])
        self._blocks[name][16 * first : 16 * first + len(parts)] = parts

    def same(self, other: TensorDigest) -> list[str]:
        """Names of tensors that differ from ``other`` or are missing there."""
        names = self._blocks.keys() | other._blocks.keys()
        return sorted(n for n in names if self._blocks.get(n) != other._blocks.get(n))

    def covers(self, names: Iterable[str]) -> bool:
        """Whether exactly these tensors were announced and all their blocks were added."""
        if set(names) != self._blocks.keys():
            return False
        return all(np.frombuffer(b, "<u8").reshape(-1, 2).any(axis=1).all() for b in self._blocks.values() if b)

    def hexdigest(self) -> str:
        """The weights digest: 64 hexadecimal characters."""
        total = hashlib.sha256()
        for name in sorted(self._blocks):
            tensor = self._tensors[name]
            part = hashlib.sha256(self._blocks[name]).hexdigest()
            total.update(json.dumps([name, tensor.dtype.tag, list(tensor.shape), part]).encode())
        return total.hexdigest()


def read_digest(tensors: Iterable[TensorInfo], descriptors: Mapping[str, int], folder: Path) -> TensorDigest:
    """Read tensors of open files (file name → descriptor) and hash them, with one thread per core.

    Raises:
        CheckpointError: A file became shorter.
    """
    digest, jobs, piece = TensorDigest(), [], 4
    for tensor in tensors:
        digest.add_tensor(tensor)
        jobs += [(tensor, first) for first in range(0, tensor.blocks, piece)]

    def work(take: Callable[[], int]) -> None:
        buffer = memoryview(bytearray(piece * 8 * BLOCK))
        while (job := take()) < len(jobs):
            tensor, first = jobs[job]
            start = first * BLOCK * tensor.dtype.itemsize
            part = buffer[: min(piece * BLOCK * tensor.dtype.itemsize, tensor.nbytes - start)]
            pread_into(descriptors[tensor.file], part, tensor.start + start, folder / tensor.file)
            digest.add(tensor.name, first, part)

    parallel(work, min(threads(), max(1, len(jobs))))
    return digest


def weights_digest(checkpoint: Checkpoint, memo: MutableMapping[str, str] | None = None) -> str:
    """Digest of all tensors (names, dtypes, shapes, values), independent of their order and of the sharding.

    Args:
        checkpoint: Headers from ``read_headers``.
        memo: Known digests, to which new ones are added: the key has every file's name, size and modification time (ns), so
            unchanged files are not read again. Only checkpoints of at least ``LARGE`` bytes are cached; None always reads
            the data.

    Returns:
        64 hexadecimal characters; ``TensorDigest`` gives the definition.
    """
    stats = [(n, (s := (checkpoint.folder / n).stat()).st_size, s.st_mtime_ns) for n in checkpoint.files]
    key = json.dumps([str(checkpoint.folder.resolve()), stats])
    if checkpoint.nbytes < LARGE:  # quick to read: no reason to trust a modification time
        memo = None
    if memo is not None and key in memo:
        return memo[key]
    descriptors = {name: os.open(checkpoint.folder / name, os.O_RDONLY) for name in checkpoint.files}
    try:
        digest = read_digest(checkpoint.tensors.values(), descriptors, checkpoint.folder)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    result = digest.hexdigest()
    if memo is not None:
        memo[key] = result
    return result


def fingerprint(folder: str | os.PathLike[str], memo: MutableMapping[str, str] | None = None) -> str:
    """Content fingerprint of a checkpoint or adapter folder: same weights, config, tokenizer and chat template, same value.

    It covers the tensors (``weights_digest``), config.json, generation_config.json, adapter_config.json, tokenizer and
    processor files and chat templates. It ignores README.md, records, optimizer states, the order of files and the sharding.

    Args:
        folder: The checkpoint folder.
        memo: See ``weights_digest``.

    Returns:
        64 hexadecimal characters.

    Raises:
        CheckpointError: See ``read_headers``.
    """
    checkpoint = read_headers(folder)
    return combine_fingerprint(checkpoint.folder, weights_digest(checkpoint, memo))


def combine_fingerprint(folder: Path, weights: str) -> str:
    """The fingerprint of ``folder`` from its known weights digest and its side files."""
    files = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in side_files(folder).items()}
    return hashlib.sha256(json.dumps({"weights": weights, "files": files}, sort_keys=True).encode()).hexdigest()
