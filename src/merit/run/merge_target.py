"""What `merit merge` does for a run (recipe and run folder)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from merit.errors import RecipeError
from merit.merge import MergeResult
from merit.progress import count
from merit.run.chain import begun, refuse_stale, require_split
from merit.run.merging import choose_branches, make_merge, merge_run
from merit.run.rounds import merge_round_alone
from merit.run.session import Session


def merge_target(
    session: Session, *, exclude: Sequence[int], allow_missing: bool, output: Path | None, number: int | None = None
) -> MergeResult:
    """Merge a run's branches into its merged/ folder, or into ``output``; or those of round ``number``, between rounds."""
    scope = session.scope
    require_split(session)
    if number is not None:
        if output is not None:
            raise RecipeError(
                "merge: --round and --output do not go together: the next round starts in the run folder."
            )
        with begun(session, "train"):
            return merge_round_alone(session, number, exclude=exclude, allow_missing=allow_missing)
    if output is None:
        with begun(session, "merge"):
            return merge_run(session, scope, exclude=exclude, allow_missing=allow_missing)
    refuse_stale(session, "merge", own=False)
    taking, left_out = choose_branches(session, scope, exclude, allow_missing)
    session.reporter.stage("merge", f"{count(len(taking), 'branch')}, {session.recipe.merge.operator}")
    with session.reporter.progress("merge") as tick:
        return make_merge(session, scope, taking, left_out, output, tick)
