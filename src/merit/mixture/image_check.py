"""Every image of every dataset, decoded, for ``merit check --images``: what is wrong with which, and how large they are.

It changes nothing and needs no model. The mixture stage makes the same check as it reads; this one continues after the first
bad image and names them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from merit.hf.image_inputs import ImageInputs
from merit.hf.images import BadImage, ImageRef, renamed
from merit.mixture.chat import BadRow, Chat
from merit.mixture.found import Found
from merit.mixture.images import look_at_images
from merit.progress import Progress, silent

_EVERY = 64  # rows between two ticks


@dataclass(frozen=True)
class BadEntry:
    """A row with an image that cannot be used, or that cannot be placed."""

    dataset: str
    place: str
    reason: str
    detail: str


@dataclass
class DatasetImages:
    """The images of one dataset, train and test rows together.

    Attributes:
        name: Dataset name.
        rows: Rows read.
        rows_with_images: Of these, with at least one image.
        images: Images in the rows, good ones, each as often as it stands in one.
        distinct: Different ones among them, by content.
        pixels: Quantiles of width x height over the different ones.
        widest: Largest width and largest height (pixels).
        renamed: Image files in another format than their names say; they are read by content.
        renamed_first: The first of them, and its real format.
        bad: Rows that cannot be used for their images, by reason.
    """

    name: str
    rows: int = 0
    rows_with_images: int = 0
    images: int = 0
    distinct: int = 0
    pixels: dict[str, int] = field(default_factory=dict)
    widest: tuple[int, int] = (0, 0)
    renamed: int = 0
    renamed_first: str = ""
    bad: Counter[str] = field(default_factory=Counter)


@dataclass
class ImageReport:
    """What :func:`check_images` found.

    Attributes:
        datasets: One entry per dataset, kept and unseen sets last.
        bad: Every row that cannot be used for its images, one entry per bad image.
        fatal: The recipe stops at such rows (``mixture.images.bad: error``), and there are some.
    """

    datasets: list[DatasetImages]
    bad: list[BadEntry]
    fatal: bool

    def facts(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "datasets": [{**vars(item), "widest": list(item.widest), "bad": dict(item.bad)} for item in self.datasets],
            "bad": [vars(entry) for entry in self.bad],
            "fatal": self.fatal,
        }


def check_images(found: Found, progress: Progress = silent, sight: ImageInputs | None = None) -> ImageReport:
    """Decode every image of every dataset, kept and unseen sets included.

    Args:
        found: The datasets.
        sight: How the base sees images, where it is known: shapes that it refuses, and its image token in a text, are
            found as well.
        progress: Told of rows, now and then.

    Raises:
        MixtureError: A dataset's files cannot be read.
    """
    everything = found.everything
    total = sum(part.count() for source in everything for part in source.parts) if progress is not silent else 0
    datasets: list[DatasetImages] = []
    bad: list[BadEntry] = []
    done = 0
    for source in everything:
        entry = DatasetImages(source.name)
        sizes: dict[str, tuple[int, int]] = {}
        for part in source.parts:
            folder = source.image_folder(part, found.settings.images)
            for place, chat, seen in look_at_images(part.chats(source.format_of(part)), folder):
                if done % _EVERY == 0:
                    progress(done, total, source.name)
                done += 1
                entry.rows += 1
                entry.rows_with_images += bool(seen)
                wrong: list[BadImage | BadRow] = [item for item in seen if isinstance(item, BadImage)]
                if isinstance(chat, BadRow) and chat.about_image:
                    wrong.append(chat)
                good = [item for item in seen if not isinstance(item, BadImage)]
                if sight is not None:
                    wrong += _refused(chat, good, sight)
                for item in wrong:
                    bad.append(BadEntry(source.name, place, item.reason, item.detail))
                    entry.bad[item.reason] += 1
                entry.images += len(good)
                for ref in good:
                    if ref.digest not in sizes and (other := renamed(Path(ref.file))):
                        entry.renamed += 1
                        entry.renamed_first = entry.renamed_first or f"{ref.file}: {other}"
                sizes.update((ref.digest, (ref.width, ref.height)) for ref in good)
        if sizes:
            pixels = np.array(list(sizes.values()), dtype=np.int64)
            areas = pixels.prod(axis=1)
            levels = {"min": 0.0, "p50": 0.5, "p90": 0.9, "max": 1.0}
            entry.distinct = len(sizes)
            entry.pixels = {key: int(np.quantile(areas, level, method="higher")) for key, level in levels.items()}
            entry.widest = (int(pixels[:, 0].max()), int(pixels[:, 1].max()))
        datasets.append(entry)
    progress(total, total, "")
    return ImageReport(datasets, bad, bool(bad) and found.settings.images.bad == "error")


def _refused(chat: Chat | BadRow, images: list[ImageRef], sight: ImageInputs) -> Iterator[BadImage]:
    """What the encoder would refuse of a row whose images are sound."""
    for image in images:
        try:
            sight.text(image)
        except ValueError as error:
            yield BadImage("image_refused", f"the base cannot take {image.width} x {image.height} pixels: {error}")
    if not isinstance(chat, BadRow) and any(sight.token in turn["content"] for turn in chat.messages):
        yield BadImage("image_token_in_text", f"its text contains {sight.token}, which the base would read as an image")
