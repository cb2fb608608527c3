"""The mixture stage: from source files to encoded datasets with counts. Importing it loads no ML library.

::

    sources.py        which datasets a recipe means
    found.py          all of them, found once per command: checked, fingerprinted
    reading.py        rows of one file or hub dataset, each with its place
    part.py           the rows of one side of a dataset; one file cut into many
    formats.py        messages, prompt/completion, Alpaca, ShareGPT, Cauldron -> one chat form (chat.py)
    images.py         the images of rows: found, decoded once, embedded ones kept in one file
    image_check.py    all of them, for `merit check --images`
    template.py       the chat template: text, and which of it is the assistant's
    encode.py         chat -> token ids + targets
    representable.py  which characters a tokenizer cannot represent
    calibration.py    seeded draws of rows
    dataset.py        encoded rows of one dataset, one Parquet file
    intake.py         rows on their way through the stage
    counting.py       what is counted of them
    stage.py          the stage: all of the above, counted and written
    result.py         what it leaves
"""

from merit.mixture.calibration import draw
from merit.mixture.dataset import Datasets, EncodedDataset
from merit.mixture.found import Found, find_datasets
from merit.mixture.result import DatasetCounts, Mixture, load_split, read_counts

__all__ = [
    "DatasetCounts",
    "Datasets",
    "EncodedDataset",
    "Found",
    "Mixture",
    "draw",
    "find_datasets",
    "load_split",
    "read_counts",
]
