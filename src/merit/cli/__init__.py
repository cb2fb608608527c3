"""The command line: where it starts, and how it stops.

Exit codes: 0 done; 1 our bug, with its traceback; 2 something that the user can fix, in one message on stderr; 75
interrupted, run the same command again to resume. ML libraries are imported inside commands, so that --help is fast: this
package is the only one with imports inside functions.
"""

from __future__ import annotations

import sys
from typing import Any

from merit.errors import Interrupted
from merit.signals import Stop, ignore_from_now_on, stop_if_asked, stop_on_sigterm


def main() -> None:
    """Run the command line and exit with its code."""
    stop_on_sigterm()  # before the first slow import: a stop while libraries load is told like any other
    sys.unraisablehook = _quiet_about_stops
    try:
        from merit.cli.commands import app

        stop_if_asked()
        app()
    except (KeyboardInterrupt, Interrupted) as stop:  # before a command was entered
        print(f"merit: {str(stop) or 'interrupted'} before anything was done.", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
    except SystemExit as end:
        cause = getattr(end.__context__, "__cause__", None)
        if not isinstance(cause, KeyboardInterrupt):
            raise
        # between our handlers, where Typer reads the command line or ends it, and would exit with a code of its own
        print(f"merit: {str(cause) or 'interrupted'}. Run the same command again to resume.", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
    finally:
        ignore_from_now_on()


def _quiet_about_stops(unraisable: Any) -> None:
    """A stop that was lost in a destructor is raised at the next progress report (:func:`merit.signals.stop_if_asked`)."""
    if not isinstance(unraisable.exc_value, Stop):
        sys.__unraisablehook__(unraisable)
