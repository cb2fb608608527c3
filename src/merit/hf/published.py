"""Sizes of a few published checkpoints, so that a plan can say what a run needs without the weights.

Counts follow from the published configs (``tests/hf/test_published.py`` builds and counts them). Only the
offline plan uses this table: if the checkpoint itself exists, its headers are counted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Sizes of a published checkpoint.

    Attributes:
        family: transformers' name of the architecture (``model_type``).
        language: Parameters of the language decoder, tied ones once.
        context: Longest supported sequence (tokens).
        projector: Parameters of the projector; 0 for a text model.
        vision: Parameters of the vision encoder; 0 for a text model.
        stored: Bytes per stored weight (2: bfloat16 or float16).
    """

    family: str
    language: int
    context: int
    projector: int = 0
    vision: int = 0
    stored: int = 2

    @property
    def parameters(self) -> int:
        """Total number of parameters."""
        return self.language + self.projector + self.vision


_VISION = 631_975_680  # the encoder of Qwen2.5-VL, the same in every size
PUBLISHED: dict[str, Published] = {
    "Qwen/Qwen2.5-0.5B": Published("qwen2", 494_032_768, 32768),
    "Qwen/Qwen2.5-0.5B-Instruct": Published("qwen2", 494_032_768, 32768),
    "Qwen/Qwen2.5-1.5B": Published("qwen2", 1_543_714_304, 131072),
    "Qwen/Qwen2.5-1.5B-Instruct": Published("qwen2", 1_543_714_304, 32768),
    "Qwen/Qwen2.5-3B": Published("qwen2", 3_085_938_688, 32768),
    "Qwen/Qwen2.5-3B-Instruct": Published("qwen2", 3_085_938_688, 32768),
    "Qwen/Qwen2.5-7B": Published("qwen2", 7_615_616_512, 131072),
    "Qwen/Qwen2.5-7B-Instruct": Published("qwen2", 7_615_616_512, 32768),
    "Qwen/Qwen2.5-VL-3B-Instruct": Published("qwen2_5_vl", 3_085_938_688, 128000, 36_708_608, _VISION),
    "Qwen/Qwen2.5-VL-7B-Instruct": Published("qwen2_5_vl", 7_615_616_512, 128000, 44_574_464, _VISION),
    "llava-hf/llava-1.5-7b-hf": Published("llava", 6_738_939_904, 4096, 20_979_712, 303_507_456),
}
"""By hub id."""
