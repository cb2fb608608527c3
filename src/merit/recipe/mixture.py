"""The ``mixture`` block: the datasets and their rows."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from merit.recipe.base import Name, Settings

DataFormat = Literal["auto", "messages", "prompt_completion", "alpaca", "flan", "sharegpt", "cauldron"]
Column = Literal[
    "messages", "conversations", "texts", "prompt", "completion", "response", "instruction", "input", "output", "inputs",
    "targets", "system", "history", "tools", "images", "image",
]  # fmt: skip
"""Columns that row formats know; ``response`` is another name for ``completion``."""


class DatasetSettings(Settings):
    """One dataset: the unit that is never split."""

    name: Name
    """Name in every table and file."""
    path: str
    """Training rows: a .jsonl, .json, .parquet or .csv file, a folder of such files, or a hub dataset id."""
    test: str | None = None
    """Held-out rows in the same form; without them the dataset is trained on but not scored."""
    format: DataFormat = "auto"
    """Row format; auto recognises it from the columns and says which it found."""
    split_by: str | None = None
    """Column that splits this source into one dataset per value, named NAME.VALUE; budgets apply to each."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    images: str | None = None
    """Folder that image paths in the rows are relative to and must stay in. Default: ``mixture.images.folder``, else the
    folder of the data file."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Sample budget: at most this many rows, drawn by seed. Default: all."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Token budget n_t: rows are drawn by seed until their target tokens reach this number. Default: all."""
    repeat: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each row within the budget is trained per epoch: 2.5 takes every row twice and half of them, drawn by seed,
    once more; 0.5 takes half of them."""
    columns: dict[Column, str] = {}
    """The rows' names for a format's columns: {prompt: question, response: answer} reads question as prompt."""


class UnrepresentableSettings(Settings):
    """What to do about text that the base's tokenizer cannot represent (dropped or unknown characters)."""

    max_share: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Share of a dataset's characters (train rows, prompts and answers) that may be lost before ``action`` applies."""
    action: Literal["warn", "leave_out", "error"] = "warn"
    """warn: keep the dataset and say so; leave_out: leave the whole dataset out of the mixture and say so; error: stop."""


class ImageSettings(Settings):
    """Images in the rows; read only for vision-language bases."""

    bad: Literal["error", "drop"] = "error"
    """An image that is missing, damaged, mislabelled or too large to be decoded safely: stop with its dataset and row, or
    drop the row and count it."""
    folder: str | None = None
    """Folder that image paths in the rows are relative to, if the dataset does not set one."""
    max_file_pixels: Annotated[int, Field(ge=1)] = 89478485
    """Maximum pixels of an image file; a larger one counts as bad (a small file can hold an image that fills the memory)."""


class MixtureSettings(Settings):
    """The datasets: exactly one of ``folder``, ``datasets``, or ``path`` with ``split_by``."""

    folder: str | None = None
    """Folder with one sub-folder per dataset, each with train.jsonl and optionally test.jsonl (.json, .parquet and .csv
    work too)."""
    datasets: list[DatasetSettings] | None = None
    """Datasets listed one by one."""
    path: str | None = None
    """One file that contains every dataset; ``split_by`` names the column that tells them apart."""
    test: str | None = None
    """Held-out rows for ``path``, with the same ``split_by`` column."""
    split_by: str | None = None
    """Column of ``path`` that names a row's dataset."""
    format: DataFormat = "auto"
    """Row format of ``folder`` or ``path``."""
    added: list[DatasetSettings] = []
    """Datasets besides those of ``folder``, ``datasets`` or ``path``; `merit add` lists them here."""
    include: list[str] = ["*"]
    """Shell patterns over dataset names; a dataset is used when one matches."""
    exclude: list[str] = []
    """Shell patterns over dataset names to leave out, after ``include``."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Sample budget per dataset (rows), unless the dataset sets one. Default: all."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Target-token budget per dataset, unless the dataset sets one. Default: all."""
    temperature: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Mixing temperature T: datasets get rows in proportion to n^(1/T), n being their rows after budget and ``repeat``,
    at the same total. 1: unchanged; larger: towards equal shares, small ones repeated, large ones subsampled by seed."""
    columns: dict[Column, str] = {}
    """The rows' names for a format's columns, for ``folder`` and ``path``; listed datasets have their own. Datasets of a
    ``folder`` that have none of these columns, but those of a format, are read as they are."""
    min_rows: Annotated[int, Field(ge=0)] = 0
    """Leave out datasets with fewer usable training rows than this, and say which; budgets do not count against it."""
    bad_rows: Literal["error", "drop"] = "error"
    """A row without an assistant turn, with an unknown role or empty text: stop with its file and line, or drop and
    count it."""
    unrepresentable: UnrepresentableSettings = UnrepresentableSettings()
    """Text that the tokenizer cannot represent."""
    images: ImageSettings = ImageSettings()
    """Images in the rows."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("folder", "datasets", "path") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"give exactly one of folder, datasets, path (with split_by); found {found}")
        if (self.path is None) != (self.split_by is None):
            raise ValueError("path and split_by go together: path is the file, split_by its column of dataset names")
        if self.test is not None and self.path is None:
            raise ValueError("test goes with path; with folder or datasets each dataset has its own test file")
        if self.datasets is not None:
            if not self.datasets:
                raise ValueError("datasets is empty; list at least one")
            seen: set[str] = set()
            for dataset in self.datasets:
                if dataset.name in seen:
                    raise ValueError(f"two datasets are named {dataset.name!r}; names must differ")
                seen.add(dataset.name)
        return self
