"""`merit diagnose` on a run or a recipe: what must be there first, and the lock of the run folder."""

from __future__ import annotations

from collections.abc import Sequence

from merit.diagnostics.probe import Probe
from merit.run.chain import begun, mixture, require_split, run_chain, split
from merit.run.diagnosing import Diagnoses, diagnose_run
from merit.run.probing import probe_recipe
from merit.run.session import Session

__all__ = ["diagnose_alone", "probe_alone"]


def diagnose_alone(session: Session, only: Sequence[str] = ()) -> Diagnoses:
    """`merit diagnose RUN`.

    Raises:
        UserError: A stage before it is missing, stale or damaged, or a diagnostic cannot be made.
    """
    require_split(session)
    with begun(session, "merge"):
        mixture(session)
        return diagnose_run(session, only)


def probe_alone(session: Session) -> Probe:
    """`merit diagnose --probe RECIPE`: the chain up to the split, and the pre-flight.

    Raises:
        UserError: A stage cannot be made, or was made with other settings.
    """
    run_chain(session, "split")
    with begun(session, "split"):
        encoded = mixture(session)
        return probe_recipe(session, encoded, split(session, session.scope, encoded))
