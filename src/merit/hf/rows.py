"""One row as a model sees it: token ids, which of them are targets, and its images. No files are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from merit.hf.images import ImageRef


@dataclass(frozen=True)
class EncodedRow:
    """One row as the model sees it.

    Attributes:
        input_ids: (n,) int32 token ids.
        targets: (n,) bool; ``targets[i]`` means that token i counts in the loss. ``targets[0]`` is always False.
        prompt_length: Tokens before the first target of the last assistant turn: the prompt of a generated answer.
        truncated: The row was truncated to ``max_length``.
        answer: Text of that assistant turn, as in its source.
        images: Its images, in the order of their tokens.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    prompt_length: int = 0
    truncated: bool = False
    answer: str = ""
    images: tuple[ImageRef, ...] = ()

    def prompt(self) -> EncodedRow:
        """The prompt of a generated answer: the tokens before the last answer, and their images."""
        ids = self.input_ids[: self.prompt_length]
        return EncodedRow(ids, np.zeros(len(ids), dtype=bool), self.prompt_length, images=self.images)
