"""The stage itself: read every dataset, encode it within its budget, count, and write the folder.

It joins sources, formats, images, encoding and draws; :mod:`merit.mixture.result` says what is written. Nothing appears
before everything is done.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from merit.errors import MixtureError
from merit.files import publish
from merit.hf.base import Base
from merit.hf.rows import EncodedRow
from merit.mixture.calibration import draw
from merit.mixture.chat import BadRow, Chat, Row
from merit.mixture.counting import conversation_key, count_losses, listing, not_read_back, quantiles
from merit.mixture.dataset import EncodedDataset
from merit.mixture.encode import ChatEncoder
from merit.mixture.formats import RowFormat
from merit.mixture.found import Found, images_without_sight, refuse_if_fatal
from merit.mixture.images import UNREAD, ImageFile, ImageFolder, look_at_images, put_images, usable
from merit.mixture.intake import Intake, Used
from merit.mixture.keys import MATTERS
from merit.mixture.mixing import repeated, shares
from merit.mixture.part import Part
from merit.mixture.result import FILES, DatasetCounts, Encoding, LeftOut, Mixture, write_facts
from merit.mixture.sources import Role, Source
from merit.progress import Progress, count, silent

__all__ = ["encode_mixture"]

_CHUNK, _CHUNK_OF_IMAGES = 512, 64
_READ_BACK_ROWS = 32


def encode_mixture(
    found: Found,
    base: Base,
    folder: Path | None = None,
    *,
    max_length: int = 2048,
    seed: int = 0,
    progress: Progress = silent,
) -> Mixture:
    """Read, encode and count all datasets, and write them into a folder.

    Args:
        found: The datasets.
        base: The base; its tokenizer must be a fast one.
        folder: Where the files go; made if absent. Default: a temporary folder that goes with the result.
        max_length: Longest row (tokens); longer ones are cut at the end.
        seed: Of the draws that sample budgets make.
        progress: Called per dataset, and with fractions while images are decoded.

    Raises:
        MixtureError: A dataset cannot be used; nothing was written then.
    """
    keeper = None
    if folder is None:
        keeper = tempfile.TemporaryDirectory(prefix="merit-mixture-")
        folder = Path(keeper.name)
    stage = _Stage(found, base, max_length, seed)
    counts: list[DatasetCounts] = []
    only_evaluated: dict[Role, list[DatasetCounts]] = {"kept": [], "unseen": []}
    left_out: list[LeftOut] = []
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    everything = found.everything
    try:
        for number, source in enumerate(everything):
            progress(number, len(everything), source.name)
            stage.tick = partial(_share, progress, number, len(everything), source.name)
            if source.train is None:
                only_evaluated[source.role].append(stage.evaluation_set(source, unfinished))
            elif isinstance(entry := stage.dataset(source, unfinished), DatasetCounts):
                counts.append(entry)
            else:
                left_out.append(entry)
        if not counts:
            raise MixtureError(
                f"All datasets are left out ({len(left_out)}). The first: {left_out[0].reason}.",
                "Use a base with another tokenizer, raise mixture.unrepresentable.max_share, or lower mixture.min_rows.",
            )
        for place, rows in shares(found, counts).items():
            stage.share(counts[place], rows, unfinished)
        write_facts(unfinished, {"mixture": counts, **only_evaluated}, stage.encoding(left_out))
        for name in FILES:
            _remove(folder / name)
        for name in reversed(FILES):
            if (unfinished / name).exists():
                publish(unfinished / name, folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    progress(len(everything), len(everything), "")
    return replace(Mixture.load(folder), keeper=keeper)


class _Stage:
    """What all datasets share: settings and the encoder."""

    def __init__(self, found: Found, base: Base, max_length: int, seed: int) -> None:
        tokenizer = base.tokenizer
        self.settings = found.settings
        self.seed = seed
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length or max_length)
        self.encoder = ChatEncoder(tokenizer, self.max_length, base.images)
        self.tick: Callable[[float], None] = lambda share: None
        self.seeing = None if self.encoder.images is None else self.encoder.images.settings

    def encoding(self, left_out: list[LeftOut]) -> Encoding:
        return Encoding(
            self.encoder.template.source,
            self.encoder.template.text,
            self.encoder.template_characters_lost(),
            self.max_length,
            type(self.tokenizer).__name__,
            len(self.tokenizer),
            self.settings.unrepresentable.max_share,
            left_out,
        )

    def dataset(self, source: Source, folder: Path) -> DatasetCounts | LeftOut:
        """Encode and write one dataset; what was left out and why, if it is too small or cannot be represented."""
        assert source.train is not None
        counts = DatasetCounts(
            source.name, path=source.train.where, budget={"samples": source.samples, "tokens": source.tokens}
        )
        with ImageFile(folder, f"images/train/{source.name}.bin") as store:
            chats, counts.format = self._chats(source, source.train, store)
            counts.source_rows = chats.source_rows
            counts.keys_ignored = dict(sorted(chats.ignored.items()))
            part = self._encode(source, chats, source.image_folder(source.train, self.settings.images, store))
            counts.image_bytes = part.keep_images(store)
        count_losses(counts, self.encoder.inventory, part.seen, part.dropped["answer_lost"])
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
                f"Dataset {source.name}: no row of {source.train.where} has a target left ({listing(part.dropped)}).",
                *(hint for reason, hint in hints.items() if part.dropped[reason]),
                "Nothing was written.",
            )
        counts.rows_distinct, counts.rows_dropped = len(part.rows), dict(sorted(part.dropped.items()))
        counts.rows_over_budget = part.over_budget
        encoded = EncodedDataset(source.name, [replace(row, answer="") for row in part.rows], self.seeing)
        self._count_encoded(counts, encoded)
        encoded.save(folder / "train" / f"{source.name}.parquet")
        if source.test is not None:
            self._test(
                source,
                source.test,
                counts,
                folder / "test",
                {conversation_key(chat) for chat in chats.chats if not chat.raw},
            )
        self._warn(counts, part)
        return counts

    def share(self, counts: DatasetCounts, rows: int, folder: Path) -> None:
        """Repeat or thin out a dataset's training rows to ``rows``."""
        file = folder / "train" / f"{counts.name}.parquet"
        whole = EncodedDataset.load(file)
        encoded = whole.take(repeated(len(whole), rows, self.seed, counts.name))
        encoded.save(file)
        counts.rows_distinct = min(counts.rows, rows)
        self._count_encoded(counts, encoded)

    def _count_encoded(self, counts: DatasetCounts, encoded: EncodedDataset) -> None:
        counts.rows = len(encoded)
        counts.tokens, counts.target_tokens = int(encoded.lengths.sum()), int(encoded.target_counts.sum())
        counts.rows_truncated = int(encoded.truncated.sum())
        counts.images, counts.image_tokens = self._count_images(encoded)
        counts.answer_tokens = quantiles(encoded.target_counts)
        counts.fingerprint = encoded.fingerprint

    def evaluation_set(self, source: Source, folder: Path) -> DatasetCounts:
        """Encode and write one set that only evaluation reads."""
        assert source.test is not None
        counts = DatasetCounts(
            source.name, path=source.test.where, budget={"samples": source.samples, "tokens": source.tokens}
        )
        self._test(source, source.test, counts, folder / source.role, set())
        if not counts.test_rows:
            raise MixtureError(
                f"{source.role.capitalize()} set {source.name}: no row of {source.test.where} has a target left "
                f"({listing(counts.test_rows_dropped)})."
            )
        return counts

    def _too_small(self, counts: DatasetCounts, rows: int) -> LeftOut:
        reason = f"Dataset {counts.name}: {rows} usable rows, fewer than mixture.min_rows ({self.settings.min_rows})"
        return LeftOut(counts.name, reason, counts.path, counts.source_rows)

    def _leave_out(self, counts: DatasetCounts) -> LeftOut:
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
        return LeftOut(
            counts.name,
            text,
            counts.path,
            counts.source_rows,
            counts.rows_answer_lost,
            counts.characters_lost,
            counts.characters_lost_most,
        )

    def _chats(self, source: Source, part: Part, store: ImageFile) -> tuple[Intake, RowFormat]:
        row_format = source.format_of(part)
        found = Intake([], [], Counter(), [], part, row_format, Counter())
        later = (source.samples is not None or source.tokens is not None) and part.by_number
        for number, (place, chat) in enumerate(part.chats(row_format)):
            if isinstance(chat, BadRow):
                refuse_if_fatal(self.settings, source.name, place, chat)
                found.dropped[chat.reason] += 1
                continue
            if chat.raw:
                if self.encoder.images is None:
                    raise images_without_sight(source.name, place)
                chat = put_images(chat, store, later=later)
            found.ignored.update(chat.ignored)
            found.ignored.update(self._not_written(chat))
            found.chats.append(chat)
            found.places.append(place)
            found.numbers.append(number)
        store.written()
        return found, row_format

    def _not_written(self, chat: Chat) -> Iterator[str]:
        """What the row has but the chat template does not write."""
        if chat.tools and not self.encoder.template.writes("tools"):
            yield "tools"
        if any("reasoning_content" in turn for turn in chat.messages) and not self.encoder.template.writes(
            "reasoning_content"
        ):
            yield "reasoning_content"

    def _encode(self, source: Source, found: Intake, folder: ImageFolder) -> Used:
        """Encode chats in a seeded order until a budget is reached; without budgets all, in source order.

        Images are decoded only when their rows are reached: with a budget of a few rows, few are.
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
                if any(
                    UNREAD in chats[i].raw for i in chunk
                ):  # many at once, so that few passes over the files are needed
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
                else:
                    if (bad := self.encoder.fault(row, chats[index])) is not None:
                        refuse_if_fatal(self.settings, source.name, found.places[index], bad)
                    dropped[row] += 1
        used.sort(key=lambda item: item[0])
        seen = [chats[i] for i in sorted(order[:looked])]
        return Used([row for _, row in used], [chats[i] for i, _ in used], seen, dropped, len(order) - looked)

    def _open_images(self, source: Source, found: Intake, indices: np.ndarray, folder: ImageFolder) -> dict[int, str]:
        """Open the images of some chats, in place; returns why a row cannot be used, by index."""
        bad_images = {}
        rows: Iterator[Row] = ((found.places[i], found.chats[i]) for i in indices)
        for index, (place, chat, seen) in zip(indices, look_at_images(rows, folder), strict=True):
            try:
                found.chats[index] = usable(chat, seen)
            except BadRow as bad:
                refuse_if_fatal(self.settings, source.name, place, bad)
                bad_images[index] = bad.reason
        return bad_images

    def _count_images(self, rows: Sequence[EncodedRow] | EncodedDataset) -> tuple[int, int]:
        """Images of the rows, and the tokens that stand for them."""
        sight = self.encoder.images
        tokens = 0 if sight is None else sum(int((row.input_ids == sight.token_id).sum()) for row in rows)
        return sum(len(row.images) for row in rows), tokens

    def _test(self, source: Source, part: Part, counts: DatasetCounts, folder: Path, train: set[int]) -> None:
        split = folder.name
        with ImageFile(folder.parent, f"images/{split}/{source.name}.bin") as store:
            # Budgets do not apply to test rows.
            budgeted = source if source.train is None else replace(source, train=None, samples=None, tokens=None)
            found, row_format = self._chats(budgeted, part, store)
            counts.format, counts.test_path = counts.format or row_format, part.where
            images = source.image_folder(part, self.settings.images, store)
            encoded = self._encode(budgeted, found, images)
            encoded.keep_images(store)
        if source.train is None:
            counts.source_rows = found.source_rows
            count_losses(counts, self.encoder.inventory, encoded.seen, encoded.dropped["answer_lost"])
        rows = encoded.rows
        counts.test_rows, counts.test_rows_dropped = len(rows), dict(sorted(encoded.dropped.items()))
        counts.test_images, _ = self._count_images(rows)
        counts.test_rows_in_train = sum(conversation_key(chat) in train for chat in encoded.chats)
        if not rows:
            return
        dataset = EncodedDataset(source.name, rows, self.seeing)
        counts.test_tokens, counts.test_target_tokens = int(dataset.lengths.sum()), int(dataset.target_counts.sum())
        counts.test_rows_truncated = int(dataset.truncated.sum())
        counts.test_answer_tokens = quantiles(np.array([int(row.targets[row.prompt_length :].sum()) for row in rows]))
        counts.test_fingerprint = dataset.fingerprint
        dataset.save(folder / f"{source.name}.parquet")

    def _read_back(self, rows: Sequence[EncodedRow]) -> list[str]:
        """The text of every row's last answer, decoded from its target tokens without special tokens."""
        ids = [row.input_ids[row.prompt_length :][row.targets[row.prompt_length :]].tolist() for row in rows]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _warn(self, counts: DatasetCounts, part: Used) -> None:
        for key, rows in counts.keys_ignored.items():
            if key.rpartition(".")[2] in MATTERS:
                counts.warnings.append(f"{key} is not used (docs/mixture.md): {count(rows, 'row')}")
        if counts.test_path and not counts.test_rows:
            counts.warnings.append(
                f"no test row has a target left ({listing(counts.test_rows_dropped)}): it is not scored"
            )
        if counts.test_rows_in_train:
            counts.warnings.append(f"also among the training rows: {count(counts.test_rows_in_train, 'test row')}")
        whole = [row for row in part.rows if not row.truncated][:_READ_BACK_ROWS]
        wrong = not_read_back(self.encoder.inventory, whole, self._read_back(whole)) if whole else 0
        if wrong:
            counts.warnings.append(
                f"the targets of {wrong} of {len(whole)} rows examined do not read back as their answers"
            )


def _share(progress: Progress, number: int, total: int, name: str, share: float) -> None:
    progress(number + share, total, name)


def _reached(rows: int, targets: int, samples: int | None, tokens: int | None) -> bool:
    return (samples is not None and rows >= samples) or (tokens is not None and targets >= tokens)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
