"""``branch.json``: what a branch that is trained elsewhere is of. It goes out with the branch and comes back with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from merit import __version__
from merit.errors import RunFolderError
from merit.files import checksum, read_as, read_json, sealed, write_json

MANIFEST = "branch.json"
RESULT = "branch"
"""Where the result is, inside the exported folder."""
FORMAT = 1


def detached(run: Path, branch: str) -> Path:
    """Where ``--launch detached`` exports a branch (``3``, ``random/3``), inside the run folder."""
    return run / "detached" / branch.replace("/", "-")


@dataclass(frozen=True)
class Manifest:
    """One branch, away from its run.

    Attributes:
        branch: ``3``, or ``random/3`` of a baseline.
        run: The recipe's name.
        group: Its datasets.
        base: Content of the base (:attr:`merit.hf.base.Base.fingerprint`).
        base_path: Folder or hub id of the base in the recipe.
        base_revision: Hub revision of it.
        rows: Content of the encoded rows, by dataset.
        samples: Rows of one pass.
        tokens: Tokens of one pass.
        target_tokens: Of these, those in the loss.
        epochs: Passes.
        settings: The settings that decide the branch, as its record will have them.
        answer: Fingerprint of all that decides the branch: settings, group, rows and base.
        tool: Whose trainer it is written for: merit, axolotl, llamafactory or trl.
        data: Folder of the encoded rows, from the exported folder; absolute if they are only referred to.
        merit: Version that wrote it.
        format: Of this file.
        checksum: Of all the rest.
    """

    branch: str
    run: str
    group: tuple[str, ...]
    base: str
    base_path: str
    base_revision: str | None
    rows: Mapping[str, str]
    samples: int
    tokens: int
    target_tokens: int
    epochs: float
    settings: Mapping[str, Any]
    answer: str
    tool: str = "merit"
    data: str = "mixture"
    merit: str = __version__
    format: int = FORMAT
    checksum: str = field(default="", compare=False)

    def save(self, folder: Path) -> None:
        """Write it into ``folder``."""
        write_json(folder / MANIFEST, sealed(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read what :meth:`save` wrote.

        Raises:
            RunFolderError: It is missing, damaged or of another format.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise RunFolderError(
                f"{folder} has no {MANIFEST}, so it is not an exported branch.",
                "Give a folder that `merit branch export` wrote, or the branch folder in it.",
            )
        value = read_json(path)
        if isinstance(value, dict) and value.get("format") not in (None, FORMAT):
            raise RunFolderError(
                f"{path}: format {value['format']}, this version reads {FORMAT}.", "Use the version that exported it."
            )
        found = read_as(path, cls)
        if found.checksum != checksum(value):
            raise RunFolderError(f"{path} is damaged: its content does not match its checksum.", "Export it again.")
        return found
