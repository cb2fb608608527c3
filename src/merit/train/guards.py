"""Around the loop: quiet libraries, peak memory, and system errors turned into messages. It trains nothing."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers

from merit.errors import ResourceError
from merit.files import free_bytes, is_disk_full
from merit.progress import size
from merit.recipe.schema import TrainSettings


@contextlib.contextmanager
def plain_errors(folder: Path, unfinished: Path) -> Iterator[None]:
    """Turn a full disk and a full device into messages; ``unfinished`` is removed however the block ends."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{folder}: out of device memory: {str(error).splitlines()[0]}",
            "Lower train.micro_batch_size (the result stays the same), or set train.gradient_checkpointing: true, or "
            "lower train.max_length, or shard the model over several GPUs (train.processes, train.sharding).",
        ) from None
    except Exception as error:  # safetensors and torch.save wrap the system's error in their own
        if not is_disk_full(error):
            raise
        raise _disk_full(folder, error) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _disk_full(folder: Path, error: Exception) -> ResourceError:
    return ResourceError(
        f"{folder}: the disk is full ({size(free_bytes(folder))} free): {str(error).splitlines()[0]}",
        "Free some space, then run the same command again: it continues from the last complete checkpoint.",
    )


def memory_meter(device: torch.device) -> Callable[[], int]:
    """Peak memory from here on (bytes): of the device on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux: reset the process's high-water mark
        switch = os.open("/proc/self/clear_refs", os.O_WRONLY)
        os.write(switch, b"5")
        os.close(switch)
    return _peak_resident


def _peak_resident() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def silence_libraries() -> None:
    """No telemetry, no progress bars, no library chatter: what matters is said by our own progress and errors."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|accelerate|peft)\.")


@contextlib.contextmanager
def kernels(settings: TrainSettings) -> Iterator[None]:
    """Inside, ``train.deterministic`` and ``train.tf32`` are in force."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cuda.matmul.allow_tf32 = before[1]
