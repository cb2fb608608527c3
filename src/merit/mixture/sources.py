"""Where a mixture's rows come from: folders, files, one file cut by a column, hub datasets.

It finds the datasets that a recipe means, in an order that no file system decides, and checks them. It reads no row
itself (:mod:`merit.mixture.reading`), does not know what a row means (:mod:`merit.mixture.formats`) and tokenises nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from merit.errors import MixtureError, nearest
from merit.mixture.formats import BadRow, RowFormat, describe_formats, recognise, refuse_surrogates
from merit.mixture.image_store import ImageFolder, look_at_images, read_chats, usable
from merit.mixture.reading import Part
from merit.recipe.schema import DataFormat, DatasetSettings, EvaluateSettings, MixtureSettings, Recipe

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,119}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One dataset of the mixture before it is read.

    Attributes:
        name: Dataset name.
        train: Training rows; None for a kept set.
        test: Held-out rows, if any.
        row_format: The recipe's format, possibly ``auto``.
        samples: Sample budget (rows).
        tokens: Token budget (target tokens).
        images: Folder that image paths start from; None: that of the data file.
    """

    name: str
    train: Part | None
    test: Part | None
    row_format: DataFormat = "auto"
    samples: int | None = None
    tokens: int | None = None
    images: str | None = None

    def recognise(self, part: Part) -> RowFormat:
        """The format of a part's rows, from the recipe or from the first row's columns.

        Raises:
            MixtureError: The part is empty or its columns fit no format.
        """
        place, row = next(part.read(), ("", None))
        if not place:
            raise MixtureError(
                f"Dataset {self.name} is empty: {part.where} has no rows.",
                "Add rows, or leave the dataset out with mixture.exclude.",
            )
        if self.row_format != "auto":
            return self.row_format
        if not isinstance(row, dict):
            raise MixtureError(
                f"Dataset {self.name}: {place}: a row must be an object with named columns; found {row!r:.60}."
            )
        found = recognise(row)
        if found is None:
            raise MixtureError(f"Dataset {self.name}: {place}: {describe_formats(row)}")
        return found


@dataclass(frozen=True)
class SourceSummary:
    """What :func:`check_sources` found out about one dataset."""

    name: str
    path: str
    test: str | None
    format: str
    kept: bool = False
    first_image: str | None = None
    """Place of the first row with an image, among those looked at."""


def discover(mixture: MixtureSettings) -> list[Source]:
    """The datasets that the recipe means: in its order when listed one by one, else by name.

    Raises:
        MixtureError: A file or folder is missing or of no known kind, a name is impossible or stands twice, a pattern
            matches nothing.
    """
    if mixture.datasets is not None:
        sources = [source for item in mixture.datasets for source in _listed(item)]
    elif mixture.folder is not None:
        sources = _from_folder(Path(mixture.folder), mixture.format, "mixture.folder", mixture.include, mixture.exclude)
    else:
        assert mixture.path is not None
        assert mixture.split_by is not None
        train = _part(mixture.path, "mixture.path", None, "train", stem="train")
        test = _part(mixture.test, "mixture.test", None, "test", stem="test") if mixture.test else None
        sources = _from_column(train, test, mixture.split_by, mixture.format)
    sources = _select(sources, mixture)
    _refuse_twins([source.name for source in sources])
    sources = [replace(source, images=source.images or mixture.images.folder) for source in sources]
    return [
        source if source.samples or source.tokens else replace(source, samples=mixture.samples, tokens=mixture.tokens)
        for source in sources
    ]


def discover_kept(evaluate: EvaluateSettings) -> list[Source]:
    """The datasets that only evaluation reads: what the base is already good at. Their rows are the ``test`` part."""
    sources = [
        replace(source, train=None, test=source.test or source.train)
        for item in evaluate.kept
        for source in _listed(item, key="evaluate.kept")
    ]
    if evaluate.kept_folder is not None:
        sources += _from_folder(Path(evaluate.kept_folder), "auto", "evaluate.kept_folder", kept=True)
    _refuse_twins([source.name for source in sources])
    return sources


def check_sources(recipe: Recipe, rows: int | None = 8) -> list[SourceSummary]:
    """Check, without a model, that every dataset is there, has a known format, and that its first rows can be used.

    Args:
        recipe: The recipe.
        rows: Rows to look at per file; None for all.

    Raises:
        MixtureError: What is wrong with the first dataset that cannot be used.
    """
    sources, kept = discover(recipe.mixture), discover_kept(recipe.evaluate)
    refuse_shared_names(sources, kept)
    summaries = []
    for source in [*sources, *kept]:
        formats, first_image = [], None
        for part in (source.train, source.test):
            if part is None:
                continue
            formats.append(source.recognise(part))
            folder = ImageFolder(part, source.images, recipe.mixture.images)
            for place, chat, seen in look_at_images(read_chats(part, formats[-1], rows), folder):
                first_image = first_image or (place if seen else None)
                try:
                    usable(chat, seen)
                except BadRow as bad:
                    if is_fatal(bad, recipe.mixture):
                        raise bad_row_error(source.name, place, bad) from None
        where = [part.where if part else None for part in (source.train, source.test)]
        summaries.append(
            SourceSummary(
                source.name,
                where[0] or where[1] or "",
                where[1],
                formats[0],
                kept=source.train is None,
                first_image=first_image,
            )
        )
    return summaries


def refuse_shared_names(sources: list[Source], kept: list[Source]) -> None:
    """Kept sets must not be named like datasets of the mixture: results are listed by name."""
    shared = sorted({source.name for source in sources} & {source.name for source in kept})
    if shared:
        raise MixtureError(
            f"evaluate.kept and the mixture both have a dataset named {', '.join(shared)}.",
            "Rename one: results are listed by name.",
        )


def is_fatal(bad: BadRow, settings: MixtureSettings) -> bool:
    """Whether the recipe wants to stop at such a row rather than drop and count it."""
    return (settings.images.bad if bad.about_image else settings.bad_rows) == "error"


def bad_row_error(name: str, place: str, bad: BadRow) -> MixtureError:
    """The error for a row that cannot be used."""
    key = "mixture.images.bad" if bad.about_image else "mixture.bad_rows"
    return MixtureError(
        f"Dataset {name}: {place}: {bad.detail}.",
        f"Correct the row, or set {key}: drop to leave such rows out and count them. Nothing was written.",
        *(["`merit check --images RECIPE` lists every image that cannot be used."] if bad.about_image else []),
    )


def refuse_images(summaries: Sequence[SourceSummary]) -> None:
    """Refuse datasets with images, for a text-only base.

    Raises:
        MixtureError: One of the rows looked at has an image.
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


# -- finding ----------------------------------------------------------------------------------------------------------


def _listed(item: DatasetSettings, key: str = "mixture.datasets") -> list[Source]:
    where = f"{key}: {item.name}"
    train = _part(item.path, where, item.subset, item.split, stem="train")
    test = None
    if item.test is not None:
        test = _part(item.test, f"{where} (test)", item.subset, "test", stem="test")
    elif (folder := Path(item.path)).is_dir() and _stem_files(folder, "train"):
        files = _stem_files(folder, "test")
        test = Part(str(folder), tuple(files), folder=folder) if files else None
    own = Source(item.name, train, test, item.format, item.samples, item.tokens, item.images)
    if item.split_by is None:
        return [own]
    cut = _from_column(train, test, item.split_by, item.format)
    return [replace(own, name=f"{item.name}.{source.name}", train=source.train, test=source.test) for source in cut]


def _part(text: str, where: str, subset: str | None, split: str, stem: str) -> Part:
    path = Path(text)
    if path.is_dir():
        # A folder that keeps train.* and test.* apart is not read as one heap: that would train on the test rows.
        files = _stem_files(path, stem) or ([] if _stem_files(path, "train") else _data_files(path))
        if not files:
            raise MixtureError(f"{where}: {path} holds no data files ({', '.join(SUFFIXES)}).{_inside(path)}")
        return Part(text, tuple(_confined(file, path) for file in files), folder=path)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise MixtureError(
                f"{where}: {path} is no {', '.join(SUFFIXES)} file.", "Convert it, or name another file."
            )
        return Part(text, (path,), folder=path.parent)
    if path.is_absolute() or path.suffix in SUFFIXES or not _HUB_ID.fullmatch(text):
        raise MixtureError(f"{where}: {path} does not exist.{_nearby(path)}")
    return Part(text, hub=(text, subset, split))


def _from_folder(
    folder: Path,
    row_format: DataFormat,
    key: str,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    kept: bool = False,
) -> list[Source]:
    if not folder.is_dir():
        raise MixtureError(f"{key}: {folder} is not a folder.{_nearby(folder)}")
    sources = []
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for name in names:
        if include is not None and not _wanted(name, include, exclude or []):
            sources.append(Source(name, None, None))  # known by name, for patterns; never read
            continue
        if not _NAME.fullmatch(name):
            raise MixtureError(
                f"{key}: the sub-folder {name!r} cannot be a dataset name. A name holds the letters A-Z and a-z, the digits "
                "0-9 and . _ + - only, at most 120 of them, and begins with a letter or digit.",
                "Rename it, or move it out of the folder and list it under evaluate.kept with a name of its own."
                if kept
                else f"Rename it; or list every dataset under mixture.datasets, this one as {{name: my-name, path: "
                f"{folder / name}}}; or leave it out with mixture.exclude.",
            )
        sub = _confined(folder / name, folder)
        parts = {}
        for stem in ("train", "test"):
            files = tuple(_confined(file, folder) for file in _stem_files(sub, stem))
            parts[stem] = Part(str(files[0] if len(files) == 1 else sub), files, folder=sub) if files else None
        needed = "test" if kept else "train"
        if kept and parts["test"] is None:
            parts["test"] = parts["train"]
        if parts[needed] is None:
            raise MixtureError(
                f"{key}: {sub} has no {needed}.jsonl (nor .json, .parquet, .csv).{_inside(sub)}",
                "Add the file, or leave the sub-folder out" + ("." if kept else " with mixture.exclude."),
            )
        sources.append(Source(name, None if kept else parts["train"], parts["test"], row_format))
    if not sources:
        raise MixtureError(
            f"{key}: {folder} has no sub-folder; expected one per dataset, each with train.jsonl.{_inside(folder)}"
        )
    return sources


def _from_column(whole: Part, held_out: Part | None, column: str, row_format: DataFormat) -> list[Source]:
    train = _groups(whole, column)
    test = _groups(held_out, column) if held_out else {}
    strangers = sorted(set(test) - set(train))
    if strangers:
        raise MixtureError(
            f"{held_out.where if held_out else ''} has {column} {strangers[0]!r}, which {whole.where} does not have."
            f"{nearest(strangers[0], list(train))}"
        )
    names: dict[str, str] = {}
    for value in sorted(train):
        name = re.sub(r"[^A-Za-z0-9._+-]", "_", value)
        if not _NAME.fullmatch(name):
            raise MixtureError(
                f"{whole.where}: {column} {value!r} cannot be a dataset name (as {name!r}): it must begin with a letter or "
                "digit and have at most 120 characters."
            )
        if name in names:
            raise MixtureError(
                f"{whole.where}: {column} {names[name]!r} and {value!r} would both be named {name!r}.",
                "Names hold letters, digits and . _ + - only, other characters become _; rename one of the two.",
            )
        names[name] = value
    return [Source(name, train[value], test.get(value), row_format) for name, value in names.items()]


def _groups(part: Part, column: str) -> dict[str, Part]:
    groups: dict[str, list[tuple[str, Any]]] = {}
    chosen: dict[str, dict[Path | None, list[int]]] = {}
    for place, row, later in part.split(column):
        if not isinstance(row, dict) or column not in row:
            columns = list(row) if isinstance(row, dict) else []
            raise MixtureError(
                f"{place}: no column {column!r} (mixture.split_by); columns: {columns}.{nearest(column, columns)}"
            )
        value = row[column]
        if value is None or value == "":
            raise MixtureError(
                f"{place}: {column} (mixture.split_by) is null, so the row belongs to no dataset.",
                "Name it, or remove the row.",
            )
        try:
            refuse_surrogates(str(value), f"{column} (mixture.split_by)")
        except BadRow as bad:
            raise MixtureError(f"{place}: {bad.detail}.", "Correct the row, or remove it.") from None
        rows = groups.setdefault(str(value), [])
        if later is None:
            rows.append((place, row))
        else:
            chosen.setdefault(str(value), {}).setdefault(later[0], []).append(later[1])
    if not groups:
        raise MixtureError(f"{part.where} has no rows.")
    return {
        value: Part(
            f"{part.where} [{column}={value}]",
            hub=part.hub,
            rows=tuple(rows) or None,
            chosen=tuple((file, tuple(indices)) for file, indices in chosen.get(value, {}).items()),
            folder=part.folder,
            cut_from=part.files,
        )
        for value, rows in groups.items()
    }


def _wanted(name: str, include: list[str], exclude: list[str]) -> bool:
    return any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)


def _select(sources: list[Source], mixture: MixtureSettings) -> list[Source]:
    names = [source.name for source in sources]
    for key, patterns in (("include", mixture.include), ("exclude", mixture.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise MixtureError(
                    f"mixture.{key}: {pattern!r} matches no dataset.{nearest(pattern, names)}",
                    f"Datasets: {', '.join(names[:12])}{f' and {len(names) - 12} more' if len(names) > 12 else ''}.",
                )
    chosen = [source for source in sources if _wanted(source.name, mixture.include, mixture.exclude)]
    if not chosen:
        raise MixtureError("mixture.include and mixture.exclude together leave no dataset.")
    return chosen


def _refuse_twins(names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(name.casefold(), name)
        if twin is not name:
            text = f"stands twice: {name!r}" if twin == name else f"differs in case only: {twin!r} and {name!r}"
            raise MixtureError(f"A dataset name {text}.", "Rename one: every dataset gets files of its own name.")


def _data_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and not p.name.startswith(".") and p.is_file())


def _stem_files(folder: Path, stem: str) -> list[Path]:
    """``stem.jsonl`` or its shards ``stem-*.jsonl`` (any one suffix)."""
    files = [p for p in _data_files(folder) if p.stem == stem or p.stem.startswith(f"{stem}-")]
    kinds = sorted({p.suffix for p in files})
    if len(kinds) > 1:
        raise MixtureError(
            f"{folder} has {stem} as {' and as '.join(kinds)}: it is not clear which one is meant.", "Remove one."
        )
    return files


def _confined(path: Path, folder: Path) -> Path:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise MixtureError(
            f"{path} is a link that leads out of {folder}.", "Name its target in mixture.datasets if that is meant."
        )
    return path


def _inside(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return f" It holds: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}." if names else " It is empty."


def _nearby(path: Path) -> str:
    """What there is instead of a missing path."""
    parent = next((p for p in path.absolute().parents if p.is_dir()), None)
    if parent is None:
        return ""
    missing = path.absolute().relative_to(parent).parts[0]
    names = sorted(p.name for p in parent.iterdir())
    hint = nearest(missing, names)
    return (
        f"{hint} {parent} holds: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
        if names
        else f" {parent} is empty."
    )
