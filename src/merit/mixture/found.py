"""The datasets of a recipe, found once per command: what check, fingerprints and encoding all start from."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations, islice
from pathlib import Path

import pyarrow.parquet as pq

from merit.errors import MixtureError
from merit.files import file_hash
from merit.hf.images import BadImage
from merit.mixture.chat import BadRow, Chat
from merit.mixture.images import look_at_images, usable
from merit.mixture.part import IMAGE_NAME, FileFacts, Part
from merit.mixture.reading import kind_of
from merit.mixture.sources import Role, Source, find_kept, find_sources, find_unseen
from merit.recipe.schema import EvaluateSettings, MixtureSettings

_LARGE = 256 * 10**6
_STAT_THREADS = 32  # they wait for a file server, not for a core


@dataclass(frozen=True)
class SourceSummary:
    """What :meth:`Found.check` saw of one dataset."""

    name: str
    path: str
    test: str | None
    format: str
    role: Role = "mixture"
    first_image: str | None = None
    """Place of the first row with an image, among those examined."""
    embedded_bytes: int = 0
    """Size of the images that lie in its rows and will be copied into the run folder, as far as metadata tell it."""
    cached: bool = True
    """Whether it is on this machine, if only in the hub's cache."""


_COUNTED = 8 * 10**9
"""Bytes of data files up to which rows are counted before they are read."""


@dataclass(frozen=True)
class Found:
    """The datasets that a recipe means, before they are read.

    Attributes:
        settings: The ``mixture`` block.
        sources: Its datasets, in order.
        kept: Datasets that only evaluation reads, since the base can do them already.
        unseen: Datasets that only evaluation reads, since nobody trains on them.
        files: What is known of files that were read while the datasets were found.
    """

    settings: MixtureSettings
    sources: tuple[Source, ...]
    kept: tuple[Source, ...] = ()
    unseen: tuple[Source, ...] = ()
    files: dict[Path, FileFacts] = field(default_factory=dict)

    @property
    def everything(self) -> tuple[Source, ...]:
        """The mixture's datasets, then those that only evaluation reads."""
        return (*self.sources, *self.kept, *self.unseen)

    def most_rows(self) -> dict[str, int] | None:
        """Rows of each dataset per epoch, at most, by its files and the recipe's budgets; None where only the hub knows.

        None, too, where the files are so large that counting would take minutes.

        Raises:
            MixtureError: A file cannot be read.
        """
        found: dict[str, int] = {}
        files = {file for source in self.sources for part in source.parts for file in part.files}
        if sum(file.stat().st_size for file in files) > _COUNTED:
            return None
        for source in self.sources:
            part, budget = source.train, source.samples
            if part is None:
                continue
            if part.hub is not None and part.cut is None:
                if budget is None:
                    return None
                rows = budget
            else:
                rows = part.count() if budget is None else min(budget, part.count())
            found[source.name] = math.ceil(rows * source.repeat)
        return found

    def check(self, rows: int | None = 8) -> list[SourceSummary]:
        """Check, without a model, that every dataset has a known format and that its first rows can be used.

        Args:
            rows: Rows to look at per file; None for all.

        Raises:
            MixtureError: What is wrong with the first dataset that cannot be used.
        """
        summaries = []
        for source in self.everything:
            formats, first_image, embedded = [], None, 0
            for part in source.parts:
                formats.append(source.format_of(part))
                folder, text = source.image_folder(part, self.settings.images), False
                for place, chat, seen in look_at_images(part.chats(formats[-1], rows), folder):
                    first_image = first_image or (place if seen else None)
                    text |= isinstance(chat, Chat) and any(isinstance(image, bytes) for image in chat.raw)
                    try:
                        usable(chat, seen)
                    except BadRow as bad:
                        refuse_if_fatal(self.settings, source.name, place, bad)
                embedded += part.embedded_bytes(text=text, most=source.samples if part is source.train else None)
            test = source.test.where if source.test else None
            where = source.train.where if source.train else test or ""
            summaries.append(SourceSummary(source.name, where, test, formats[0], source.role, first_image, embedded))
        return summaries

    def fingerprints(self, memo: MutableMapping[str, str] | None = None) -> dict[str, str]:
        """SHA-256 (hex) of every dataset's source files, kept and unseen sets included; the place of files plays no part.

        Data files count by their bytes. Of the image files that their rows name, name and size count: a look at every
        file's entry costs seconds where reading a hundred gigabytes would cost an hour, and, unlike a modification time,
        it says the same on every machine. An image that changes without changing its size is noticed when it is next
        decoded. Hub datasets count by id, configuration and split; the encoded rows' fingerprints hold their content.

        Args:
            memo: Known file hashes by path, size and modification time; read and extended.

        Raises:
            MixtureError: A source is missing.
        """
        memo = {} if memo is None else memo
        found = {}
        for source in self.everything:
            parts = {"train": source.train, "test": source.test}
            content = {split: self._content(part, source, memo) for split, part in parts.items() if part is not None}
            if source.role == "unseen":
                content = {"unseen": content}
            found[source.name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return found

    def _content(self, part: Part, source: Source, memo: MutableMapping[str, str]) -> object:
        if part.hub is not None:
            return part.hub
        hashes = [self._hash(file, memo) for file in part.files]
        without = json.dumps(["names no image files", part.where, *hashes])
        if without in memo:
            return hashes
        possible = [self._may_name_images(file, known, memo) for file, known in zip(part.files, hashes, strict=True)]
        images = self._image_files(part, source) if any(possible) else None
        if images is None:
            memo[without] = ""
            return hashes
        return {"files": hashes, "images": images}

    def _hash(self, file: Path, memo: MutableMapping[str, str]) -> str:
        facts = file.stat()
        key = json.dumps([str(file.resolve()), facts.st_size, facts.st_mtime_ns])
        if key in memo:
            return memo[key]
        found = self.files[file].sha256 if file in self.files else file_hash(file)
        if facts.st_size >= _LARGE:  # a smaller one is read in a moment: no reason to trust a modification time
            memo[key] = found
        return found

    def _may_name_images(self, file: Path, content: str, memo: MutableMapping[str, str]) -> bool:
        """False where no row of a data file can have an image; decided once per file, without parsing its rows."""
        key = json.dumps(["may name image files", content])
        if key not in memo:
            memo[key] = str(self.files[file].images if file in self.files else _has_the_words(file))
        return memo[key] == str(True)

    def _image_files(self, part: Part, source: Source) -> str | None:
        """SHA-256 over names and sizes of the image files that a part's rows name; None where they name none."""
        folder = source.image_folder(part, self.settings.images)

        def size(name: str) -> int:
            try:
                return folder.locate(name).stat().st_size
            except (BadImage, OSError):
                return -1  # missing: it counts as a change when it comes

        hashed, names = None, _image_names(part, source)
        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            while some := list(islice(names, 4096)):
                hashed = hashed or hashlib.sha256()
                for name, count in zip(some, pool.map(size, some), strict=True):
                    hashed.update(f"{name}\0{count}\n".encode())
        return None if hashed is None else hashed.hexdigest()


def find_datasets(mixture: MixtureSettings | str | Path, evaluate: EvaluateSettings | None = None) -> Found:
    """Find the datasets that a recipe means. Rows are read later, but for a file that is cut by a column: that is read once.

    Args:
        mixture: The recipe's ``mixture`` block; or just a folder with one sub-folder per dataset.
        evaluate: The recipe's ``evaluate`` block, for the sets that only evaluation reads.

    Raises:
        MixtureError: A file or folder is missing or of an unknown kind, a name is invalid or used twice, a pattern
            matches nothing.
    """
    settings = mixture if isinstance(mixture, MixtureSettings) else MixtureSettings(folder=str(mixture))
    files: dict[Path, FileFacts] = {}
    sources = find_sources(settings, files)
    kept = [] if evaluate is None else find_kept(evaluate, files)
    unseen = [] if evaluate is None else find_unseen(evaluate)
    named = {"the mixture": sources, "evaluate.kept": kept, "evaluate.unseen_folder": unseen}
    for (one, ones), (other, others) in combinations(named.items(), 2):
        shared = sorted({source.name for source in ones} & {source.name for source in others})
        if shared:
            raise MixtureError(
                f"{other} and {one} both have a dataset named {', '.join(shared)}.",
                "Rename one: results are listed by name.",
            )
    return Found(settings, tuple(sources), tuple(kept), tuple(unseen), files)


def refuse_if_fatal(settings: MixtureSettings, name: str, place: str, bad: BadRow) -> None:
    """Stop at a row that cannot be used, where the recipe wants that rather than dropping and counting it.

    Raises:
        MixtureError: It does.
    """
    if (settings.images.bad if bad.about_image else settings.bad_rows) != "error":
        return
    key = "mixture.images.bad" if bad.about_image else "mixture.bad_rows"
    raise MixtureError(
        f"Dataset {name}: {place}: {bad.detail}.",
        f"Correct the row, or set {key}: drop to leave such rows out and count them. Nothing was written.",
        *(["`merit check --images RECIPE` lists every image that cannot be used."] if bad.about_image else []),
    )


def refuse_images(summaries: Sequence[SourceSummary]) -> None:
    """Refuse datasets with images, for a text-only base.

    Raises:
        MixtureError: One of the rows examined has an image.
    """
    for summary in summaries:
        if summary.first_image is not None:
            raise images_without_sight(summary.name, summary.first_image)


def images_without_sight(name: str, place: str) -> MixtureError:
    """The error for a row with images where the base is text-only."""
    return MixtureError(
        f"Dataset {name}: {place}: the row has images, but the base (model.base) is text-only.",
        "Choose a vision-language base, leave the dataset out with mixture.exclude, or take the images out of its rows.",
        "Nothing was written.",
    )


def _image_names(part: Part, source: Source) -> Iterator[str]:
    """Paths of images as the rows have them, each once."""
    seen: set[str] = set()
    try:
        for _, chat in part.chats(source.format_of(part)):
            for image in chat.raw if isinstance(chat, Chat) else ():
                if isinstance(image, str) and image not in seen:
                    seen.add(image)
                    yield image
    except MixtureError:  # unreadable: its bytes are in the hash, and reading its rows raises the error
        return


def _has_the_words(file: Path) -> bool:
    if kind_of(file) == ".parquet":
        try:
            schema = str(pq.read_schema(file))
        except Exception:  # not Parquet: reading it raises the error
            return False
        return "image" in schema or "path" in schema or "url" in schema
    if file.suffix in (".gz", ".zst"):
        return True
    if not file.stat().st_size:
        return False
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(IMAGE_NAME if kind_of(file) in (".json", ".jsonl") else b"image") >= 0
