"""`merit branch import`: a branch that was trained elsewhere becomes part of its run, if it belongs there.

Compared, by name: base, rows, group and settings (hashes in its record), every file's content, and MERIT's version. What may
differ is the machine, and with it the last bits: device, threads, processes, other libraries.
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from merit import __version__
from merit.errors import RunFolderError
from merit.files import require_space, write_bytes
from merit.run.branches import BranchId, stage_of
from merit.run.manifest import MANIFEST, RESULT, Manifest
from merit.run.record import Record, shown
from merit.run.session import Session
from merit.run.store import RECORD, Stage, claim, lock

_REFUSED = (".py", ".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".so", ".sh")
"""Endings of files that can run code; no result of a branch has one."""


def import_branch(session: Session, folder: Path) -> BranchId:
    """Take a trained branch into the run.

    Args:
        session: The command's session; the run is split already.
        folder: The exported folder, or the result (``branch``) in it.

    Returns:
        Which branch it is.

    Raises:
        RunFolderError: It is not finished, is damaged, or does not belong to this run; the message names the field.
    """
    result = folder if (folder / RECORD).is_file() or not (folder / RESULT).is_dir() else folder / RESULT
    manifest = Manifest.load(result if (result / MANIFEST).is_file() else folder)
    branch = BranchId.parse(manifest.branch)
    wanted, found = stage_of(session, branch), Stage("branch", result)
    if not found.begun:
        raise RunFolderError(
            f"{result}: branch {branch} is not trained to its end there.", "`merit branch train` goes on with it."
        )
    record = found.record()
    _compare(branch, wanted, record, folder)
    _refuse_names(record, result)
    found.verify()
    if wanted.begun and not session.redo:
        same = wanted.record().facts.get("model_fingerprint") == record.facts.get("model_fingerprint")
        if same and wanted.is_done():
            session.reporter.stage("import", f"branch {branch} (done before)")
            return branch
        raise RunFolderError(
            f"{wanted.path}: branch {branch} is trained already, with another result.",
            "Keep it, or replace it with --redo. Nothing was changed.",
        )
    claim(session.run)
    size = sum(facts.bytes for facts in record.outputs.values())
    require_space(session.run, size, f"branch {branch}")
    with lock(wanted.path, wanted.name):
        wanted.clear()
        for name in record.outputs:
            (wanted.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(result / name, wanted.path / name)
        write_bytes(wanted.record_file, found.record_file.read_bytes())
    wanted.verify()
    session.reporter.stage("import", f"branch {branch}: {record.facts['tokens']:,} tokens, {record.facts['device']}")
    return branch


def _compare(branch: BranchId, wanted: Stage, record: Record, folder: Path) -> None:
    """Refuse what was made from another base, other rows or other settings, or by another version.

    Raises:
        RunFolderError: Naming each field.
    """
    changes = record.changes(wanted.settings, wanted.inputs)
    made_by = str(record.facts.get("merit", "none"))
    if made_by.split(".")[:2] != __version__.split(".")[:2]:
        changes.append(f"merit: {made_by} -> {__version__}")
    if changes:
        raise RunFolderError(
            f"{folder}: this branch {branch} does not belong to the run; it was made with (there -> here):",
            *shown(changes),
            "All branches of a merge share base, settings and rows. Export it again from this run. Nothing was changed.",
        )


def _refuse_names(record: Record, result: Path) -> None:
    for name in record.outputs:
        path = PurePosixPath(name)
        parts = [result.joinpath(*path.parts[: n + 1]) for n in range(len(path.parts))]
        if path.is_absolute() or ".." in path.parts or any(part.is_symlink() for part in parts):
            raise RunFolderError(
                f"{result}: its record names a file outside its folder: {name!r}. Nothing was changed."
            )
        if path.suffix in _REFUSED:
            raise RunFolderError(f"{result / name}: a branch has no such file, which could run code.")
