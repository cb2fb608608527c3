"""How rows go through a model when it is measured: batches, device, progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from merit.hf.batches import Batcher

__all__ = ["LOGITS_BUDGET", "Forward", "logits_tokens"]

LOGITS_BUDGET = 2**29
"""Maximum logits per batch (float32 entries, 2.1 GB): a large vocabulary makes batches smaller than ``batch_tokens``."""


def _nobody(rows: int, /) -> None:
    """Ignore the number of rows."""


@dataclass(frozen=True)
class Forward:
    """How rows go through a model.

    Attributes:
        batcher: Makes the batches.
        device: The model's device.
        batch_tokens: Padded tokens per batch; figures depend on it only by float rounding.
        on_batch: Called with the number of rows just finished.
    """

    batcher: Batcher
    device: torch.device
    batch_tokens: int = 8192
    on_batch: Callable[[int], None] = _nobody


def logits_tokens(model: PreTrainedModel, budget: int = LOGITS_BUDGET) -> int:
    """Tokens of a batch whose logits over the whole vocabulary stay within ``budget`` entries."""
    return max(1, budget // int(model.config.get_text_config().vocab_size))
