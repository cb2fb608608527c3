"""Which datasets a recipe means, in an order that no file system decides: folders, files, one cut file, the hub.

It reads no row but those of files that are cut (:mod:`merit.mixture.part`) and does not know what a row means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, overload

from merit.errors import MixtureError, nearest
from merit.mixture.formats import RowFormat, describe_formats, recognise
from merit.mixture.images import ImageFile, ImageFolder
from merit.mixture.part import FileFacts, Part, cut_by_column
from merit.mixture.reading import SUFFIXES, hub_caches, kind_of
from merit.recipe.schema import Column, DataFormat, DatasetSettings, EvaluateSettings, ImageSettings, MixtureSettings

Role = Literal["mixture", "kept", "unseen"]
"""What a dataset is for: training; or evaluation alone, because the base can do it, or because no branch trains on it."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,119}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One dataset of the mixture before it is read.

    Attributes:
        name: Dataset name.
        train: Training rows; None for a set that only evaluation reads.
        test: Held-out rows, if any.
        row_format: The recipe's format, possibly ``auto``.
        samples: Sample budget (rows).
        tokens: Token budget (target tokens).
        images: Folder that image paths are relative to; None: that of the data file.
        repeat: How often each row within the budget is trained per epoch.
        role: What it is for.
    """

    name: str
    train: Part | None
    test: Part | None
    row_format: DataFormat = "auto"
    samples: int | None = None
    tokens: int | None = None
    images: str | None = None
    repeat: float = 1.0
    role: Role = "mixture"

    @property
    def parts(self) -> tuple[Part, ...]:
        """Training and test rows, whichever there are."""
        return tuple(part for part in (self.train, self.test) if part is not None)

    def format_of(self, part: Part) -> RowFormat:
        """The format of a part's rows, from the recipe or from the first row's columns.

        Raises:
            MixtureError: The part is empty, or its columns match no format.
        """
        if part.first is None:
            raise MixtureError(
                f"Dataset {self.name} is empty: {part.where} has no rows.",
                "Add rows, or leave the dataset out with mixture.exclude.",
            )
        if self.row_format != "auto":
            return self.row_format
        place, row = part.first
        if not isinstance(row, dict):
            raise MixtureError(
                f"Dataset {self.name}: {place}: a row must be an object with named columns; found {row!r:.60}."
            )
        found = recognise(row)
        if found is None:
            raise MixtureError(f"Dataset {self.name}: {place}: {describe_formats(row)}")
        return found

    def image_folder(self, part: Part, settings: ImageSettings, store: ImageFile | None = None) -> ImageFolder:
        """Where the images of a part's rows are looked for.

        Raises:
            MixtureError: The folder that the recipe names is not a folder.
        """
        if self.images is not None and not Path(self.images).is_dir():
            raise MixtureError(
                f"{self.images} is not a folder; image paths are relative to it (a dataset's images, or "
                "mixture.images.folder)."
            )
        start = Path(self.images) if self.images is not None else part.folder
        caches = hub_caches() if part.hub is not None and start is None else ()
        return ImageFolder((start,) if start is not None else caches, settings, relative=start is not None, store=store)


def find_sources(mixture: MixtureSettings, known: dict[Path, FileFacts]) -> list[Source]:
    """The datasets that the recipe means: in its order when listed one by one, else by name.

    Args:
        mixture: Where they are.
        known: Facts about the files that are read are added here.

    Raises:
        MixtureError: A file or folder is missing or of an unknown kind, a name is invalid or used twice, a pattern
            matches nothing.
    """
    if mixture.datasets is not None:
        sources = [source for item in mixture.datasets for source in _listed(item, "mixture.datasets", known)]
    elif mixture.folder is not None:
        sources = _from_folder(Path(mixture.folder), mixture.format, "mixture.folder", mixture.include, mixture.exclude)
        named = mixture.columns
        sources = [
            replace(s, train=_named(s.train, named, shared=True), test=_named(s.test, named, shared=True))
            for s in sources
        ]
    else:
        assert mixture.path is not None
        assert mixture.split_by is not None
        train = _part(mixture.path, "mixture.path", None, "train", stem="train")
        test = _part(mixture.test, "mixture.test", None, "test", stem="test") if mixture.test else None
        train, test = _named(train, mixture.columns), _named(test, mixture.columns)
        sources = _from_column(train, test, mixture.split_by, mixture.format, known)
    sources = _select(sources, mixture)
    sources += [source for item in mixture.added for source in _listed(item, "mixture.added", known)]
    _refuse_twins([source.name for source in sources])
    sources = [replace(source, images=source.images or mixture.images.folder) for source in sources]
    return [
        source if source.samples or source.tokens else replace(source, samples=mixture.samples, tokens=mixture.tokens)
        for source in sources
    ]


def find_kept(evaluate: EvaluateSettings, known: dict[Path, FileFacts]) -> list[Source]:
    """The datasets that only evaluation reads: what the base is already good at. Their rows are the ``test`` part."""
    sources = [
        replace(source, train=None, test=source.test or source.train, role="kept")
        for item in evaluate.kept
        for source in _listed(item, "evaluate.kept", known)
    ]
    if evaluate.kept_folder is not None:
        sources += _from_folder(Path(evaluate.kept_folder), "auto", "evaluate.kept_folder", role="kept")
    _refuse_twins([source.name for source in sources])
    return sources


def find_unseen(evaluate: EvaluateSettings) -> list[Source]:
    """The tasks that no branch trains on. Their rows are the ``test`` part."""
    if evaluate.unseen_folder is None:
        return []
    return _from_folder(Path(evaluate.unseen_folder), "auto", "evaluate.unseen_folder", role="unseen")


def cached_bytes(item: DatasetSettings, samples: int | None = None) -> int | None:
    """Bytes of the images in a hub dataset's rows, from this machine's cache alone; None where it is not there.

    Args:
        item: A listed dataset. Its test rows count too, if they are on the hub and in the cache.
        samples: The mixture's budget of rows, for a dataset that has none of its own.
    """
    if not _HUB_ID.fullmatch(item.path):
        return None
    train, test = (
        _named(Part(name, hub=(name, item.subset, split)), item.columns)
        for name, split in ((item.path, item.split), (item.test or "", "test"))
    )
    found = train.cached_bytes(item.samples or samples)
    return found if found is None or not _HUB_ID.fullmatch(test.where) else found + (test.cached_bytes() or 0)


# -- finding ----------------------------------------------------------------------------------------------------------


def _listed(item: DatasetSettings, key: str, known: dict[Path, FileFacts]) -> list[Source]:
    where = f"{key}: {item.name}"
    train = _part(item.path, where, item.subset, item.split, stem="train")
    test = None
    if item.test is not None:
        test = _part(item.test, f"{where} (test)", item.subset, "test", stem="test")
    elif (folder := Path(item.path)).is_dir() and _stem_files(folder, "train"):
        files = _stem_files(folder, "test")
        test = Part(str(folder), tuple(files), folder=folder) if files else None
    train, test = _named(train, item.columns), _named(test, item.columns)
    own = Source(item.name, train, test, item.format, item.samples, item.tokens, item.images, item.repeat)
    if item.split_by is None:
        return [own]
    cut = _from_column(train, test, item.split_by, item.format, known)
    return [replace(own, name=f"{item.name}.{source.name}", train=source.train, test=source.test) for source in cut]


@overload
def _named(part: Part, columns: Mapping[Column, str], *, shared: bool = False) -> Part: ...
@overload
def _named(part: Part | None, columns: Mapping[Column, str], *, shared: bool = False) -> Part | None: ...
def _named(part: Part | None, columns: Mapping[Column, str], *, shared: bool = False) -> Part | None:
    """A part whose rows use other names for a format's columns; ``shared`` ones are of a whole folder."""
    pairs = tuple(("completion" if name == "response" else name, own) for name, own in columns.items())
    return part if part is None or not pairs else replace(part, columns=pairs, shared=shared)


def _part(text: str, where: str, subset: str | None, split: str, stem: str) -> Part:
    path = Path(text)
    if path.is_dir():
        # A folder that keeps train.* and test.* apart is not read as a whole: that would train on the test rows.
        files = _stem_files(path, stem) or ([] if _stem_files(path, "train") else _data_files(path))
        if not files:
            raise MixtureError(f"{where}: {path} contains no data files ({', '.join(SUFFIXES)}).{_inside(path)}")
        return Part(text, tuple(_confined(file, path) for file in files), folder=path)
    if path.is_file():
        if kind_of(path) is None:
            raise MixtureError(
                f"{where}: {path} is not a {', '.join(SUFFIXES)} file.", "Convert it, or name another file."
            )
        return Part(text, (path,), folder=path.parent)
    if path.is_absolute() or kind_of(path) or not _HUB_ID.fullmatch(text):
        raise MixtureError(f"{where}: {path} does not exist.{_nearby(path)}")
    return Part(text, hub=(text, subset, split))


def _from_folder(
    folder: Path,
    row_format: DataFormat,
    key: str,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    role: Role = "mixture",
) -> list[Source]:
    if not folder.is_dir():
        raise MixtureError(
            f"{key}: {folder} is not a folder.{_nearby(folder)}",
            f"If it was moved (or the run folder was copied to another machine): --set {key}=DIR",
        )
    sources, trained = [], role == "mixture"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for name in names:
        if include is not None and not _wanted(name, include, exclude or []):
            sources.append(Source(name, None, None))  # known by name, for patterns; never read
            continue
        if not _NAME.fullmatch(name):
            raise MixtureError(
                f"{key}: the sub-folder {name!r} cannot be a dataset name. A name may have only the letters A-Z and a-z, "
                "the digits 0-9 and . _ + -, at most 120 characters in all, and must begin with a letter or digit.",
                "Rename it, or move it out of the folder."
                if not trained
                else f"Rename it; or list every dataset under mixture.datasets, this one as {{name: my-name, path: "
                f"{folder / name}}}; or leave it out with mixture.exclude.",
            )
        sub = _confined(folder / name, folder)
        parts = {}
        for stem in ("train", "test"):
            files = tuple(_confined(file, folder) for file in _stem_files(sub, stem))
            parts[stem] = Part(str(files[0] if len(files) == 1 else sub), files, folder=sub) if files else None
        needed = "train" if trained else "test"
        if not trained and parts["test"] is None:
            parts["test"] = parts["train"]
        if parts[needed] is None:
            raise MixtureError(
                f"{key}: {sub} has no {needed}.jsonl (nor {', '.join(SUFFIXES[1:])}).{_inside(sub)}",
                "Add the file, or leave the sub-folder out" + (" with mixture.exclude." if trained else "."),
            )
        sources.append(Source(name, parts["train"] if trained else None, parts["test"], row_format, role=role))
    if not sources:
        raise MixtureError(
            f"{key}: {folder} has no sub-folder; expected one per dataset, each with "
            f"{'train' if trained else 'test'}.jsonl.{_inside(folder)}"
        )
    return sources


def _from_column(
    whole: Part, held_out: Part | None, column: str, row_format: DataFormat, known: dict[Path, FileFacts]
) -> list[Source]:
    train = cut_by_column(whole, column, known)
    test = cut_by_column(held_out, column, known) if held_out else {}
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
                "Names may have only letters, digits and . _ + -; other characters become _. Rename one of the two.",
            )
        names[name] = value
    return [Source(name, train[value], test.get(value), row_format) for name, value in names.items()]


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
            text = f"is used twice: {name!r}" if twin == name else f"differs in case only: {twin!r} and {name!r}"
            raise MixtureError(f"A dataset name {text}.", "Rename one: a dataset's files carry its name.")


def _data_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if kind_of(p) and not p.name.startswith(".") and p.is_file())


def _stem_files(folder: Path, stem: str) -> list[Path]:
    """``stem.jsonl`` or its shards ``stem-*.jsonl`` (any one suffix)."""
    files = [p for p in _data_files(folder) if p.name.split(".")[0] == stem or p.name.startswith(f"{stem}-")]
    kinds = sorted({kind_of(p) or "" for p in files})
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
    return f" It contains: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}." if names else " It is empty."


def _nearby(path: Path) -> str:
    """What there is instead of a missing path."""
    parent = next((p for p in path.absolute().parents if p.is_dir()), None)
    if parent is None:
        return ""
    missing = path.absolute().relative_to(parent).parts[0]
    names = sorted(p.name for p in parent.iterdir())
    hint = nearest(missing, names)
    return (
        f"{hint} {parent} contains: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
        if names
        else f" {parent} is empty."
    )
