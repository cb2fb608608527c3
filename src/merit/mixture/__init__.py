"""The mixture stage: from source files to encoded datasets with counts. Importing it loads no ML library.

::

    sources.py        which datasets a recipe means
    reading.py        their rows, each with its place
    formats.py        messages, prompt/completion, Alpaca, ShareGPT, Cauldron -> one chat form
    row_images.py     the images of a row: paths, bytes, parts
    image_store.py    found, decoded once, embedded ones kept in one file
    image_check.py    all of them, for `merit check --images`
    template.py       the chat template: text, and which of it is the assistant's
    encode.py         chat -> token ids + targets; EncodedDataset, one Parquet file
    representable.py  which characters a tokenizer cannot represent
    calibration.py    seeded draws of rows
    counts.py         what is counted of every dataset
    prepare.py        the stage: all of the above, counted and written
    fingerprint.py    what the sources hold, to notice a change
"""

from merit.mixture.calibration import draw
from merit.mixture.counts import DatasetCounts, read_counts
from merit.mixture.encode import EncodedDataset, encode_chat
from merit.mixture.sources import check_sources
from merit.mixture.stage import load_split, prepare_mixture
from merit.mixture.template import default_chat_template

__all__ = [
    "DatasetCounts",
    "EncodedDataset",
    "check_sources",
    "default_chat_template",
    "draw",
    "encode_chat",
    "load_split",
    "prepare_mixture",
    "read_counts",
]
