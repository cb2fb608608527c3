"""`--launch detached`: every waiting branch is exported into the run folder, and taken back once it is trained there."""

from __future__ import annotations

from collections.abc import Sequence

from merit.errors import Interrupted, RunFolderError
from merit.run.branches import BranchId, stage_of
from merit.run.exporting import export_branch
from merit.run.importing import import_branch
from merit.run.manifest import MANIFEST, RESULT, Manifest, detached
from merit.run.session import Session
from merit.run.store import RECORD


def hand_over(session: Session, waiting: Sequence[BranchId]) -> None:
    """Export branches that are not exported yet, and import those that are trained.

    Raises:
        Interrupted: Some are still to be trained elsewhere; the message says where they are.
        RunFolderError: An exported branch is of another recipe, or does not belong to the run.
    """
    left = []
    for branch in waiting:
        folder = detached(session.run, str(branch))
        if (folder / RESULT / RECORD).is_file():
            import_branch(session, folder)
            continue
        left.append(folder)
        if not (folder / MANIFEST).is_file():
            export_branch(session, branch, folder)
            session.reporter.say(f"  branch {branch}: exported to {folder}")
        elif Manifest.load(folder).answer != stage_of(session, branch).fingerprint:
            raise RunFolderError(
                f"{folder} was exported with settings or inputs other than the current ones.",
                "Remove it to export branch " + str(branch) + " again, or change the recipe back.",
            )
    if left:
        raise Interrupted(
            f"{len(left)} of {len(waiting)} branches are to be trained elsewhere: copy each folder in {left[0].parent} to a "
            "machine, run its train.sh there, and bring its branch folder back to the same place."
        )
