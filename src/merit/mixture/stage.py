"""The stage itself: read every dataset, encode it within its budget, count, and write the folder.

It joins sources, formats, images, encoding and draws. What it writes: ``train/<name>.parquet``, ``test/<name>.parquet``,
``kept/<name>.parquet``, ``images/<split>/<name>.bin`` (images that were embedded in the rows), ``datasets.json`` (the
mixture's counts, in recipe order), ``kept.json`` (the same for kept sets) and ``encoding.json`` (template, length, datasets
left out). Nothing appears before everything is done.
"""

from __future__ import annotations

import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from merit.errors import MixtureError
from merit.files import write_json
from merit.hf.base import Base
from merit.hf.rows import EncodedRow
from merit.mixture.calibration import draw
from merit.mixture.counts import DatasetCounts, read_counts
from merit.mixture.encode import ChatEncoder, EncodedDataset
from merit.mixture.formats import IMAGE, BadRow, Chat, RowFormat
from merit.mixture.image_store import (
    UNREAD,
    ImageFile,
    ImageFolder,
    fetch_images,
    look_at_images,
    put_images,
    read_chats,
    usable,
)
from merit.mixture.reading import Part
from merit.mixture.sources import (
    Source,
    bad_row_error,
    discover,
    discover_kept,
    images_without_sight,
    is_fatal,
    refuse_shared_names,
)
from merit.recipe.schema import Recipe

Split = Literal["train", "test", "kept"]

_FILES = ("images", "train", "test", "kept", "kept.json", "encoding.json")
_CHUNK, _CHUNK_OF_IMAGES = 512, 64
_READ_BACK_ROWS = 32


def prepare_mixture(
    recipe: Recipe, base: Base, folder: Path, progress: Callable[..., None] | None = None
) -> list[DatasetCounts]:
    """Read, encode and count all datasets of a recipe, and write them into ``folder``.

    Args:
        recipe: The recipe; its paths are absolute or hub ids.
        base: The base; its tokenizer must be a fast one.
        folder: Where the stage's files go; made if absent.
        progress: Called as ``progress(done, total, name)`` before every dataset, and with fractions while images are
            looked at.

    Returns:
        The mixture's counts, in recipe order (also in ``datasets.json``).

    Raises:
        MixtureError: A dataset cannot be used; nothing was written then.
    """
    sources, kept = discover(recipe.mixture), discover_kept(recipe.evaluate)
    refuse_shared_names(sources, kept)
    stage = _Stage(recipe, base)
    counts: list[DatasetCounts] = []
    kept_counts: list[DatasetCounts] = []
    left_out: list[dict[str, Any]] = []
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for number, source in enumerate([*sources, *kept]):
            if progress:
                total = len(sources) + len(kept)
                progress(number, total, source.name)
                stage.tick = partial(_share, progress, number, total, source.name)
            if source.train is None:
                kept_counts.append(stage.kept_set(source, unfinished))
            elif isinstance(entry := stage.dataset(source, unfinished), DatasetCounts):
                counts.append(entry)
            else:
                left_out.append(entry)
        if not counts:
            raise MixtureError(
                f"No dataset is left of {len(left_out)}. The first: {left_out[0]['reason']}.",
                "Use a base with another tokenizer, raise mixture.unrepresentable.max_share, or lower mixture.min_rows.",
            )
        write_json(unfinished / "kept.json", [asdict(entry) for entry in kept_counts])
        write_json(unfinished / "encoding.json", {**stage.description(), "left_out": left_out})
        write_json(unfinished / "datasets.json", [asdict(entry) for entry in counts])
        for name in ("datasets.json", *_FILES):
            _remove(folder / name)
        for name in (*_FILES, "datasets.json"):
            if (unfinished / name).exists():
                (unfinished / name).replace(folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if progress:
        progress(len(sources) + len(kept), len(sources) + len(kept), "")
    return counts


def load_split(folder: Path, split: Split) -> dict[str, EncodedDataset]:
    """Open the encoded datasets of one split, in the order of ``datasets.json`` (``kept.json``); none is read yet.

    Raises:
        MixtureError: The folder is not what :func:`prepare_mixture` writes.
    """
    key = "rows" if split == "train" else "test_rows"
    entries = read_counts(folder, "kept" if split == "kept" else "mixture")
    return {
        entry["name"]: EncodedDataset.load(folder / split / f"{entry['name']}.parquet")
        for entry in entries
        if entry[key]
    }


class _Stage:
    """What all datasets share: settings and the encoder."""

    def __init__(self, recipe: Recipe, base: Base) -> None:
        tokenizer = base.tokenizer
        self.settings = recipe.mixture
        self.seed = recipe.seed
        self.tokenizer = tokenizer
        self.max_length = min(recipe.train.max_length, tokenizer.model_max_length or recipe.train.max_length)
        self.encoder = ChatEncoder(tokenizer, self.max_length, base.images)
        self.tick: Callable[[float], None] = lambda share: None
        self.seeing = None if self.encoder.images is None else self.encoder.images.settings

    def description(self) -> dict[str, Any]:
        return {
            "template_source": self.encoder.template.source,
            "chat_template": self.encoder.template.text,
            "template_characters_lost": self.encoder.template_characters_lost(),
            "max_length": self.max_length,
            "tokenizer": type(self.tokenizer).__name__,
            "vocabulary": len(self.tokenizer),
        }

    def dataset(self, source: Source, folder: Path) -> DatasetCounts | dict[str, Any]:
        """Encode and write one dataset; what was left out and why, if it is too small or cannot be represented."""
        assert source.train is not None
        counts = DatasetCounts(
            source.name, path=source.train.where, budget={"samples": source.samples, "tokens": source.tokens}
        )
        with ImageFile(folder, f"images/train/{source.name}.bin") as store:
            chats, counts.format = self._chats(source, source.train, store)
            counts.source_rows = chats.source_rows
            part = self._encode(source, chats, ImageFolder(source.train, source.images, self.settings.images, store))
            counts.image_bytes = part.keep_images(store)
        self._count_losses(counts, part)
        over = counts.characters_lost["all"] > self.settings.unrepresentable.max_share
        if over and self.settings.unrepresentable.action != "warn":
            _remove(folder / "images" / "train" / f"{source.name}.bin")
            return self._leave_out(counts)
        if len(part.rows) + part.over_budget < self.settings.min_rows:
            _remove(folder / "images" / "train" / f"{source.name}.bin")
            return self._too_small(counts, len(part.rows) + part.over_budget)
        if not part.rows:
            hints = {
                "answer_lost": "answer_lost: the base's tokenizer cannot represent the answers; leave the dataset out with "
                "mixture.exclude or mixture.unrepresentable.action: leave_out.",
                "no_target_after_truncation": "no_target_after_truncation: the prompts alone fill train.max_length "
                f"({self.max_length} tokens); raise it, or leave the dataset out with mixture.exclude.",
            }
            raise MixtureError(
                f"Dataset {source.name}: no row of {source.train.where} has a target left ({_listing(part.dropped)}).",
                *(hint for reason, hint in hints.items() if part.dropped[reason]),
                "Nothing was written.",
            )
        counts.rows, counts.rows_dropped = len(part.rows), dict(sorted(part.dropped.items()))
        counts.rows_over_budget = part.over_budget
        counts.images, counts.image_tokens = self._count_images(part.rows)
        encoded = EncodedDataset(source.name, [_without_answer(row) for row in part.rows], seeing=self.seeing)
        counts.tokens, counts.target_tokens = int(encoded.lengths.sum()), int(encoded.target_counts.sum())
        counts.rows_truncated = int(encoded.truncated.sum())
        counts.answer_tokens = _quantiles(encoded.target_counts)
        counts.fingerprint = encoded.fingerprint
        encoded.save(folder / "train" / f"{source.name}.parquet")
        if source.test is not None:
            self._test(
                source, source.test, counts, folder / "test", {_key(chat) for chat in chats.chats if not chat.raw}
            )
        self._warn(counts, over, part)
        return counts

    def kept_set(self, source: Source, folder: Path) -> DatasetCounts:
        """Encode and write one kept set."""
        assert source.test is not None
        counts = DatasetCounts(
            source.name, path=source.test.where, budget={"samples": source.samples, "tokens": source.tokens}
        )
        self._test(source, source.test, counts, folder / "kept", set())
        if not counts.test_rows:
            raise MixtureError(
                f"Kept set {source.name}: no row of {source.test.where} has a target left "
                f"({_listing(counts.test_rows_dropped)})."
            )
        return counts

    def _too_small(self, counts: DatasetCounts, rows: int) -> dict[str, Any]:
        reason = f"Dataset {counts.name}: {rows} usable rows, fewer than mixture.min_rows ({self.settings.min_rows})"
        return {"name": counts.name, "reason": reason, "path": counts.path, "source_rows": counts.source_rows}

    def _leave_out(self, counts: DatasetCounts) -> dict[str, Any]:
        share, limit = counts.characters_lost["all"], self.settings.unrepresentable.max_share
        text = (
            f"Dataset {counts.name}: the base's tokenizer cannot represent {share:.1%} of its characters "
            f"(limit {limit:.1%}; prompts {counts.characters_lost['prompt']:.1%}, answers "
            f"{counts.characters_lost['answer']:.1%}; such as {counts.characters_lost_most!r})"
        )
        if self.settings.unrepresentable.action == "error":
            raise MixtureError(
                f"{text}.",
                "Use another base, mixture.exclude, or mixture.unrepresentable.action: leave_out (or warn).",
                "Nothing was written.",
            )
        return {
            "name": counts.name,
            "reason": text,
            "path": counts.path,
            "source_rows": counts.source_rows,
            "rows_answer_lost": counts.rows_answer_lost,
            "characters_lost": counts.characters_lost,
            "characters_lost_most": counts.characters_lost_most,
        }

    def _chats(self, source: Source, part: Part, store: ImageFile) -> tuple[_Chats, RowFormat]:
        row_format = source.recognise(part)
        found = _Chats([], [], Counter(), [], part, row_format)
        later = (source.samples is not None or source.tokens is not None) and part.by_number
        for number, (place, chat) in enumerate(read_chats(part, row_format)):
            if isinstance(chat, BadRow):
                if is_fatal(chat, self.settings):
                    raise bad_row_error(source.name, place, chat)
                found.dropped[chat.reason] += 1
                continue
            if chat.raw:
                if self.encoder.images is None:
                    raise images_without_sight(source.name, place)
                chat = put_images(chat, store, later=later)
            found.chats.append(chat)
            found.places.append(place)
            found.numbers.append(number)
        store.written()
        return found, row_format

    def _encode(self, source: Source, found: _Chats, folder: ImageFolder) -> _Part:
        """Encode chats in a seeded order until a budget is reached; without budgets all, in source order.

        Images are decoded as their rows' turn comes: a budget of a few rows looks at few.
        """
        chats, dropped = found.chats, Counter(found.dropped)
        samples, tokens = source.samples, source.tokens
        drawn = samples is not None or tokens is not None
        order = draw(len(chats), len(chats), self.seed, source.name, "budget") if drawn else np.arange(len(chats))
        used: list[tuple[int, EncodedRow]] = []
        looked, targets = 0, 0
        while looked < len(order) and not _reached(len(used), targets, samples, tokens):
            chunk = order[looked : looked + _CHUNK]
            bad_images = {}
            if any(chats[i].raw for i in chunk):
                chunk = chunk[: min(_CHUNK_OF_IMAGES, samples - len(used) if samples is not None else _CHUNK)]
                if any(UNREAD in chats[i].raw for i in chunk):  # so many at once that few passes over the files do
                    needed = samples - len(used) if samples is not None else 0
                    found.fetch(order[looked : looked + max(needed, looked, _CHUNK_OF_IMAGES)], folder)
                bad_images = self._open_images(source, found, chunk, folder)
                if source.train is not None:
                    self.tick(looked / len(order))
            good = [i for i in chunk if i not in bad_images]
            encoded = dict(zip(good, self.encoder.encode([chats[i] for i in good]), strict=True))
            for index in chunk:
                row: EncodedRow | str = bad_images.get(index) or encoded[index]
                looked += 1
                if isinstance(row, EncodedRow):
                    used.append((int(index), row))
                    targets += int(row.targets.sum())
                    if _reached(len(used), targets, samples, tokens):
                        break
                elif (bad := self._refused(row, chats[index])) is not None and is_fatal(bad, self.settings):
                    raise bad_row_error(source.name, found.places[index], bad)
                else:
                    dropped[row] += 1
        used.sort(key=lambda item: item[0])
        seen = [chats[i] for i in sorted(order[:looked])]
        return _Part([row for _, row in used], [chats[i] for i, _ in used], seen, dropped, len(order) - looked)

    def _open_images(self, source: Source, found: _Chats, indices: np.ndarray, folder: ImageFolder) -> dict[int, str]:
        """Look at the images of some chats, in place; why a row cannot be used, by index."""
        bad_images = {}
        rows: Iterator[tuple[str, Chat | BadRow]] = ((found.places[i], found.chats[i]) for i in indices)
        for index, (place, chat, seen) in zip(indices, look_at_images(rows, folder), strict=True):
            try:
                found.chats[index] = usable(chat, seen)
            except BadRow as bad:
                if is_fatal(bad, self.settings):
                    raise bad_row_error(source.name, place, bad) from None
                bad_images[index] = bad.reason
        return bad_images

    def _refused(self, reason: str, chat: Chat) -> BadRow | None:
        """What to say about a row that cannot be encoded through a fault of its own."""
        if reason == "refused_by_template":
            said = self.encoder.template.refusal(chat.messages)
            return BadRow(reason, f"the base's chat template refuses the row: {said}")
        if reason == "image_token_in_text" and (sight := self.encoder.images) is not None:
            return BadRow(reason, f"its text holds {sight.token}, which the base reads as a place for an image")
        if reason == "image_refused":
            shapes = ", ".join(f"{image.width} x {image.height}" for image in chat.images)
            return BadRow(reason, f"the base's image processor refuses an image of its shape (pixels: {shapes})")
        return None

    def _count_images(self, rows: Sequence[EncodedRow]) -> tuple[int, int]:
        """Images of the rows, and the tokens that stand for them."""
        sight = self.encoder.images
        tokens = 0 if sight is None else sum(int((row.input_ids == sight.token_id).sum()) for row in rows)
        return sum(len(row.images) for row in rows), tokens

    def _test(self, source: Source, part: Part, counts: DatasetCounts, folder: Path, train: set[int]) -> None:
        split = folder.name
        with ImageFile(folder.parent, f"images/{split}/{source.name}.bin") as store:
            # No budget holds for test rows.
            budgeted = source if source.train is None else replace(source, train=None, samples=None, tokens=None)
            found, row_format = self._chats(budgeted, part, store)
            counts.format, counts.test_path = counts.format or row_format, part.where
            images = ImageFolder(part, source.images, self.settings.images, store)
            encoded = self._encode(budgeted, found, images)
            encoded.keep_images(store)
        if source.train is None:
            counts.source_rows = found.source_rows
            self._count_losses(counts, encoded)
        rows = encoded.rows
        counts.test_rows, counts.test_rows_dropped = len(rows), dict(sorted(encoded.dropped.items()))
        counts.test_images, _ = self._count_images(rows)
        counts.test_rows_in_train = sum(_key(chat) in train for chat in encoded.chats)
        if not rows:
            return
        dataset = EncodedDataset(source.name, rows, self._read_back(rows), self.seeing)
        counts.test_tokens, counts.test_target_tokens = int(dataset.lengths.sum()), int(dataset.target_counts.sum())
        counts.test_rows_truncated = int(dataset.truncated.sum())
        counts.test_answer_tokens = _quantiles(np.array([int(row.targets[row.prompt_length :].sum()) for row in rows]))
        counts.test_fingerprint = dataset.fingerprint
        dataset.save(folder / f"{source.name}.parquet")

    def _read_back(self, rows: Sequence[EncodedRow]) -> list[str]:
        """What the target tokens of every row's last answer stand for, without special tokens."""
        ids = [row.input_ids[row.prompt_length :][row.targets[row.prompt_length :]].tolist() for row in rows]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _count_losses(self, counts: DatasetCounts, part: _Part) -> None:
        texts: dict[str, list[str]] = {"prompt": [], "answer": []}
        for chat in part.seen:
            for turn in chat.messages:
                text = turn["content"].replace(IMAGE, "") if chat.images or chat.raw else turn["content"]
                texts["answer" if turn["role"] == "assistant" else "prompt"].append(text)
        most: Counter[str] = Counter()
        totals: dict[str, tuple[int, int]] = {}
        for key, parts in texts.items():
            tally = self.encoder.inventory.count_lost(parts)
            most.update(tally)
            totals[key] = (sum(tally.values()), sum(map(len, parts)))
        totals["all"] = (sum(n for n, _ in totals.values()), sum(n for _, n in totals.values()))
        counts.characters_lost = {key: lost / total if total else 0.0 for key, (lost, total) in totals.items()}
        counts.characters_lost_most = "".join(
            c for c, _ in sorted(most.items(), key=lambda item: (-item[1], item[0]))[:12]
        )
        counts.rows_answer_lost = part.dropped["answer_lost"]

    def _warn(self, counts: DatasetCounts, over: bool, part: _Part) -> None:
        if over:
            counts.warnings.append(
                f"the tokenizer cannot represent {counts.characters_lost['all']:.1%} of the characters (prompts "
                f"{counts.characters_lost['prompt']:.1%}, answers {counts.characters_lost['answer']:.1%}; such as "
                f"{counts.characters_lost_most!r})"
            )
        if counts.rows_answer_lost:
            counts.warnings.append(
                f"{counts.rows_answer_lost} rows lost their whole answer to the tokenizer and are left out"
            )
        if counts.rows_truncated:
            counts.warnings.append(f"{counts.rows_truncated} rows were cut at {self.max_length} tokens")
        if counts.test_path and not counts.test_rows:
            counts.warnings.append(
                f"no test row has a target left ({_listing(counts.test_rows_dropped)}): it is not scored"
            )
        if counts.test_rows_in_train:
            counts.warnings.append(f"{counts.test_rows_in_train} test rows are also training rows")
        sample = [(row, chat) for row, chat in zip(part.rows, part.chats, strict=True) if not row.truncated][
            :_READ_BACK_ROWS
        ]
        texts = self._read_back([row for row, _ in sample])
        wrong = 0
        for (row, _), text in zip(sample, texts, strict=True):
            wrong += _plain(self.encoder.inventory.kept(row.answer)) not in _plain(text)
        if wrong:
            counts.warnings.append(
                f"the targets of {wrong} of {len(sample)} rows looked at do not read back as their answers"
            )


@dataclass
class _Chats:
    """A part's usable chats, where each stands, the bad rows by reason, and what to read a row's images again by."""

    chats: list[Chat]
    places: list[str]
    dropped: Counter[str]
    numbers: list[int]
    part: Part
    row_format: RowFormat

    def fetch(self, indices: np.ndarray, folder: ImageFolder) -> None:
        """Read the embedded images of these chats again, where that was put off, and keep them on disk."""
        assert folder.store is not None
        wanted = [i for i in sorted(indices.tolist()) if UNREAD in self.chats[i].raw]
        numbers = [self.numbers[i] for i in wanted]
        for i, chat in zip(wanted, fetch_images(self.part, self.row_format, numbers, folder.store), strict=True):
            self.chats[i] = chat

    @property
    def source_rows(self) -> int:
        return len(self.chats) + sum(self.dropped.values())


@dataclass
class _Part:
    """Rows used, their chats, every chat looked at, rows dropped by reason, and usable chats not looked at."""

    rows: list[EncodedRow]
    chats: list[Chat]
    seen: list[Chat]
    dropped: Counter[str]
    over_budget: int

    def keep_images(self, store: ImageFile) -> int:
        """Keep the embedded images of these rows only, and follow those that move; returns their bytes on disk."""
        moved = store.keep(row.images for row in self.rows)
        if moved:
            place = lambda ref: replace(ref, offset=moved[ref.digest]) if ref.file == store.name else ref  # noqa: E731
            self.rows = [replace(row, images=tuple(map(place, row.images))) if row.images else row for row in self.rows]
        return store.size


def _share(progress: Callable[..., None], number: int, total: int, name: str, share: float) -> None:
    progress(number + share, total, name)


def _reached(rows: int, targets: int, samples: int | None, tokens: int | None) -> bool:
    return (samples is not None and rows >= samples) or (tokens is not None and targets >= tokens)


def _without_answer(row: EncodedRow) -> EncodedRow:
    return replace(row, answer="")


def _key(chat: Chat) -> int:
    turns = tuple((turn["role"], turn["content"]) for turn in chat.messages)
    return hash((turns, tuple(image.digest for image in chat.images)))


def _plain(text: str) -> str:
    """Letters without case, accents, white space and width: what survives any tokenizer's normalisation."""
    return "".join(
        c
        for c in unicodedata.normalize("NFKD", text).casefold()
        if unicodedata.category(c) not in ("Mn", "Cc", "Cf", "Zs")
    )


def _quantiles(values: np.ndarray) -> dict[str, int]:
    levels = {"p50": 0.5, "p90": 0.9, "max": 1.0}
    return {key: int(np.quantile(values, level, method="higher")) for key, level in levels.items()}


def _listing(dropped: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items())) or "no rows"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
