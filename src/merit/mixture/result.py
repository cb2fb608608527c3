"""What the mixture stage leaves: encoded datasets with their counts, in one folder; the names and keys of its files.

::

    datasets.json               one entry per dataset, in recipe order
    kept.json, unseen.json      the same for sets that only evaluation reads; unseen.json only if there are any
    encoding.json               template, longest row, datasets left out
    train|test|kept|unseen/NAME.parquet, images/SPLIT/NAME.bin
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from merit.files import read_as, write_json
from merit.mixture.dataset import Datasets, EncodedDataset
from merit.mixture.sources import Role
from merit.progress import count

Split = Literal["train", "test", "kept", "unseen"]
FILES = ("datasets.json", "images", "train", "test", "kept", "kept.json", "unseen", "unseen.json", "encoding.json")
"""What the stage writes; the first is removed first and written last."""
_COUNTS: dict[Role, str] = {"mixture": "datasets.json", "kept": "kept.json", "unseen": "unseen.json"}


@dataclass
class DatasetCounts:
    """One entry of ``datasets.json``. Rows, tokens and target tokens count what is kept and used.

    Attributes:
        name: Dataset name.
        rows: Training rows of an epoch, repeated ones counted as often (0 for sets that only evaluation reads).
        rows_distinct: Of these, different rows of the source.
        rows_dropped: Rows examined and left out, by reason.
        tokens: Tokens of the training rows.
        target_tokens: Of these, predicted in the loss: n_t.
        format: Row format recognised.
        path: Source of the training rows.
        source_rows: Rows in the source.
        rows_over_budget: Usable rows that the budget left out (not examined further).
        rows_truncated: Used rows that were cut at max_length.
        images: Images of the rows used, each as often as it stands in a row.
        image_bytes: Bytes of those images that were embedded in the rows and lie in the stage's folder, each once.
        image_tokens: Tokens that stand for images (also in tokens).
        keys_ignored: Rows by key of theirs (or of their turns) that nothing reads.
        rows_answer_lost: Rows whose whole answer the tokenizer cannot represent (also in rows_dropped).
        characters_lost: Share of prompt, answer and all characters that the tokenizer cannot represent.
        characters_lost_most: The lost characters that occur most often.
        budget: Sample and token budget.
        answer_tokens: Quantiles of target tokens per row.
        test_path: Source of the test rows, if any; the ``test_`` fields say the same about them.
        test_rows_in_train: Test rows whose whole conversation is also a training row.
        test_answer_tokens: Quantiles of the last answer's tokens over test rows, end of turn included.
        fingerprint: Of the encoded training rows.
        test_fingerprint: Of the encoded test rows.
        warnings: What a person should know.
    """

    name: str
    rows: int = 0
    rows_distinct: int = 0
    rows_dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    target_tokens: int = 0
    format: str = ""
    path: str = ""
    source_rows: int = 0
    rows_over_budget: int = 0
    rows_truncated: int = 0
    images: int = 0
    image_bytes: int = 0
    image_tokens: int = 0
    keys_ignored: dict[str, int] = field(default_factory=dict)
    rows_answer_lost: int = 0
    characters_lost: dict[str, float] = field(default_factory=dict)
    characters_lost_most: str = ""
    budget: dict[str, int | None] = field(default_factory=dict)
    answer_tokens: dict[str, int] = field(default_factory=dict)
    test_path: str | None = None
    test_rows: int = 0
    test_rows_dropped: dict[str, int] = field(default_factory=dict)
    test_rows_truncated: int = 0
    test_images: int = 0
    test_tokens: int = 0
    test_target_tokens: int = 0
    test_rows_in_train: int = 0
    test_answer_tokens: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    test_fingerprint: str = ""
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LeftOut:
    """A dataset that is not in the mixture, and why.

    Attributes:
        name: Dataset name.
        reason: For a person.
        path: Source of its training rows.
        source_rows: Rows in the source.
        rows_answer_lost: As in :class:`DatasetCounts`; likewise the next two. Empty where it has too few rows.
    """

    name: str
    reason: str
    path: str
    source_rows: int
    rows_answer_lost: int | None = None
    characters_lost: dict[str, float] | None = None
    characters_lost_most: str | None = None


@dataclass(frozen=True)
class Encoding:
    """How all rows were encoded.

    Attributes:
        template_source: How the assistant's text was located.
        chat_template: The template.
        template_characters_lost: Characters of the template's own text that the tokenizer cannot represent.
        max_length: Longest row (tokens).
        tokenizer: Class of the tokenizer.
        vocabulary: Its number of tokens.
        max_share: Share of lost characters above which a dataset is worth a warning.
        left_out: Datasets that are not in the mixture.
    """

    template_source: str
    chat_template: str
    template_characters_lost: str
    max_length: int
    tokenizer: str
    vocabulary: int
    max_share: float
    left_out: list[LeftOut] = field(default_factory=list)


@dataclass(frozen=True)
class Mixture:
    """The encoded mixture.

    Attributes:
        folder: Its files.
        counts: What was counted of every dataset, in recipe order.
        kept_counts: The same of sets that only evaluation reads.
        encoding: How rows were encoded, and what was left out.
        keeper: Removes a temporary folder when the last reference to the mixture is gone.
    """

    folder: Path
    counts: tuple[DatasetCounts, ...]
    kept_counts: tuple[DatasetCounts, ...]
    encoding: Encoding
    keeper: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def load(cls, folder: Path) -> Mixture:
        """Open what the stage wrote; no row is read yet.

        Raises:
            RunFolderError: A file is missing or damaged.
        """
        return cls(
            folder,
            tuple(read_counts(folder)),
            tuple(read_counts(folder, "kept")),
            read_as(folder / "encoding.json", Encoding),
        )

    def save(self, folder: Path) -> None:
        """Write a copy of it into ``folder``."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)

    @cached_property
    def train(self) -> Datasets:
        """Training rows by dataset."""
        return load_split(self.folder, "train")

    @cached_property
    def test(self) -> Datasets:
        """Held-out rows by dataset, where there are any."""
        return load_split(self.folder, "test")

    @cached_property
    def kept(self) -> Datasets:
        """Rows of what the base could already do; only evaluation reads them."""
        return load_split(self.folder, "kept")

    @cached_property
    def unseen(self) -> Datasets:
        """Rows of the tasks that no branch trains on."""
        return load_split(self.folder, "unseen")

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content of the encoded training rows, by dataset, in recipe order."""
        return {item.name: item.fingerprint for item in self.counts}

    @property
    def rows(self) -> dict[str, int]:
        """Training rows used, by dataset."""
        return {item.name: item.rows for item in self.counts}

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of the training rows, by dataset."""
        return {item.name: item.tokens for item in self.counts}

    @property
    def target_tokens(self) -> dict[str, int]:
        """Tokens of the training rows that the loss predicts, by dataset."""
        return {item.name: item.target_tokens for item in self.counts}

    @property
    def warnings(self) -> list[str]:
        """What a person should know, most general first."""
        said = []
        cut = [item for item in self.counts if item.rows_truncated]
        if cut:
            total, length = sum(item.rows_truncated for item in cut), self.encoding.max_length
            said.append(
                f"cut at {length} tokens (train.max_length): {count(total, 'row')} of {count(len(cut), 'dataset')}"
            )
        gone = {item.name: item.rows_dropped.get("no_target_after_truncation", 0) for item in self.counts}
        if any(gone.values()):
            most = max(gone, key=gone.__getitem__)
            said.append(
                f"left out, with nothing of the answer within {self.encoding.max_length} tokens (train.max_length): "
                f"{count(sum(gone.values()), 'row')}, most of them in {most}"
            )
        limit = self.encoding.max_share
        lossy = [item for item in self.counts if item.rows_answer_lost or item.characters_lost.get("all", 0.0) > limit]
        if lossy:
            worst = max(lossy, key=lambda item: item.characters_lost["all"])
            lost = sum(item.rows_answer_lost for item in lossy)
            said.append(
                f"the tokenizer cannot represent part of the text of {count(len(lossy), 'dataset')}: up to "
                f"{worst.characters_lost['all']:.1%} of the characters, in {worst.name} (such as "
                f"{worst.characters_lost_most!r})"
                + (f"; left out, with nothing left of the answer: {count(lost, 'row')}" if lost else "")
            )
        said += [f"{item.name}: {text}" for item in self.counts for text in item.warnings]
        for why, small in (("the tokenizer cannot represent their text", False), ("they have too few rows", True)):
            names = [item.name for item in self.left_out if (item.characters_lost is None) == small]
            if names:
                said.append(f"left out, since {why}: {', '.join(names)}")
        return said

    @property
    def left_out(self) -> list[LeftOut]:
        """Datasets that are not in the mixture, and why."""
        return self.encoding.left_out


def write_facts(folder: Path, counts: Mapping[Role, Sequence[DatasetCounts]], encoding: Encoding) -> None:
    """Write the JSON files."""
    for role, items in counts.items():
        if role == "kept" or (role == "unseen" and items):
            write_json(folder / _COUNTS[role], [asdict(item) for item in items])
    write_json(folder / "encoding.json", asdict(encoding))
    write_json(folder / _COUNTS["mixture"], [asdict(item) for item in counts["mixture"]])


def read_counts(folder: Path, which: Role = "mixture") -> list[DatasetCounts]:
    """The entries of ``datasets.json``, ``kept.json`` or ``unseen.json``; none of the last if there is no such file.

    Raises:
        RunFolderError: The file is missing or damaged.
    """
    file = folder / _COUNTS[which]
    return [] if which == "unseen" and not file.exists() else read_as(file, list[DatasetCounts])


def load_split(folder: Path, split: Split) -> Datasets:
    """Open the encoded datasets of one split, in the order of its JSON file; none is read yet.

    Raises:
        MeritError: The folder is not what the stage writes.
    """
    entries = read_counts(folder, "mixture" if split == "train" or split == "test" else split)
    names = [item.name for item in entries if (item.rows if split == "train" else item.test_rows)]
    return Datasets({name: EncodedDataset.load(folder / split / f"{name}.parquet") for name in names})
