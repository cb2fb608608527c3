"""The mixture stage: from source files to encoded datasets with counts. Importing it loads no ML library.

::

    sources.py        which datasets a recipe means
    reading.py        their rows, each with its place
    formats.py        messages, prompt/completion, Alpaca, ShareGPT -> one chat form
    template.py       the chat template: text, and which of it is the assistant's
    encode.py         chat -> token ids + targets; EncodedDataset, one Parquet file
    representable.py  which characters a tokenizer cannot represent
    calibration.py    seeded draws of rows
    prepare.py        the stage: all of the above, counted and written
"""

from merit.mixture.calibration import draw
from merit.mixture.encode import EncodedDataset, EncodedRow, encode_chat
from merit.mixture.prepare import DatasetCounts, load_split, prepare_mixture, read_counts
from merit.mixture.sources import check_sources
from merit.mixture.template import default_chat_template

__all__ = [
    "DatasetCounts",
    "EncodedDataset",
    "EncodedRow",
    "check_sources",
    "default_chat_template",
    "draw",
    "encode_chat",
    "load_split",
    "prepare_mixture",
    "read_counts",
]
