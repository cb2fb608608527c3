"""What is done to a file: its bits, bytes, pages, length or place. Size and modification time stay where they can."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

FAULTS = ("bit", "byte", "zeros", "truncate", "append", "empty", "delete", "swap", "folder")
"""Names of the faults; ``zeros`` blanks up to a page, ``folder`` puts a folder in the file's place."""


class Tree:
    """A folder's files as they are now, to compare with and to go back to.

    Attributes:
        files: Content by relative name.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = {self._name(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        self._folders = {self._name(path) for path in root.rglob("*") if path.is_dir()}
        self._facts = {name: self._fact(root / name) for name in self.files}

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    @staticmethod
    def _fact(path: Path) -> tuple[int, int, int]:
        facts = path.stat()
        return facts.st_size, facts.st_mtime_ns, facts.st_ino

    def with_links(self, names: Sequence[str]) -> list[str]:
        """These files, and those that were the same file under another name."""
        numbers = {self._facts[name][2] for name in names}
        return [*names, *(name for name, facts in self._facts.items() if facts[2] in numbers and name not in names)]

    def changed(self, suspects: Sequence[str] = ()) -> dict[str, bytes | None]:
        """Files whose content is other than it was, with what they hold; None: no longer there. New ones are among them.

        ``suspects`` are compared even where size, time and inode are as they were.
        """
        there = {self._name(path): path for path in self.root.rglob("*") if path.is_file()}
        found: dict[str, bytes | None] = {name: None for name in self.files if name not in there}
        for name, path in there.items():
            if name in suspects or name not in self.files or self._fact(path) != self._facts[name]:
                content = path.read_bytes()
                if content != self.files.get(name):
                    found[name] = content
        return found

    def restore(self, suspects: Sequence[str] = ()) -> None:
        """Make the folder what it was."""
        for path in sorted(self.root.rglob("*"), reverse=True):
            name = self._name(path)
            if path.is_dir() and not path.is_symlink():
                if name in self.files or name not in self._folders:
                    shutil.rmtree(path)
            elif name not in self.files:
                path.unlink()
        for name, content in self.files.items():
            path = self.root / name
            if name in suspects or not path.exists() or self._fact(path) != self._facts[name]:
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists() or path.read_bytes() != content:
                    path.write_bytes(content)
                os.utime(path, ns=(self._facts[name][1], self._facts[name][1]))
                self._facts[name] = self._fact(path)


def damage(path: Path, fault: str, rng: random.Random, others: Sequence[Path]) -> list[Path] | None:
    """Do ``fault`` to a file.

    Args:
        path: The file.
        fault: One of ``FAULTS``.
        rng: Decides the place.
        others: Files of the same kind, for ``swap``.

    Returns:
        The files that hold something else now; None where the fault cannot be done here.
    """
    if fault == "swap":
        return _swap(path, rng, others)
    if fault == "delete":
        path.unlink()
        return [path]
    if fault == "folder":
        path.unlink()
        path.mkdir()
        return [path]
    data = bytearray(path.read_bytes())
    if (not data and fault != "append") or (made := _CHANGES[fault](bytearray(data), rng)) == data:
        return None
    times = path.stat()
    path.write_bytes(made)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return [path]


def _swap(path: Path, rng: random.Random, others: Sequence[Path]) -> list[Path] | None:
    mine = path.read_bytes()
    candidates = [other for other in others if other != path and other.read_bytes() != mine]
    if not candidates:
        return None
    other = rng.choice(candidates)
    theirs = other.read_bytes()
    for file, content in ((path, theirs), (other, mine)):
        times = file.stat()
        file.write_bytes(content)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    return [path, other]


def _bit(data: bytearray, rng: random.Random) -> bytes:
    place = rng.randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    return bytes(data)


def _byte(data: bytearray, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    data[place] = (data[place] + rng.randrange(1, 256)) % 256
    return bytes(data)


def _zeros(data: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    length = min(rng.choice((8, 64, 512, 4096)), len(data) - start)
    data[start : start + length] = bytes(length)
    return bytes(data)


_CHANGES: Mapping[str, Callable[[bytearray, random.Random], bytes]] = {
    "bit": _bit,
    "byte": _byte,
    "zeros": _zeros,
    "truncate": lambda data, rng: bytes(data[: rng.randrange(len(data))]),
    "append": lambda data, rng: bytes(data) + rng.randbytes(rng.randrange(1, 64)),
    "empty": lambda data, rng: b"",
}
