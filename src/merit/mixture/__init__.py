"""The mixture stage: from source files to encoded datasets with counts. Importing it loads no ML library."""

from merit.mixture.calibration import draw
from merit.mixture.encode import EncodedDataset, EncodedRow, encode_chat

__all__ = ["EncodedDataset", "EncodedRow", "draw", "encode_chat"]
