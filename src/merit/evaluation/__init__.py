"""What was learned, what was kept: held-out loss, exact match, drift from the base, and the verdict in plain words.

Importing it loads no ML library.
"""

from merit.evaluation.evaluate import evaluate_models

__all__ = ["evaluate_models"]
