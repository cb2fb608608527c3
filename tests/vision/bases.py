"""The vision bases of :mod:`tests.builders`, under the name that tests here still use."""

from tests.builders import (  # noqa: F401
    ALL_FAMILIES,
    FAMILIES,
    IDEFICS3_TEMPLATE,
    LLAVA_TEMPLATE,
    QWEN_TEMPLATE,
    TEXT,
    byte_symbols,
    byte_tokenizer,
)
from tests.builders import make_vision_base as make_base  # noqa: F401
