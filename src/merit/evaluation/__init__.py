"""What was learned, what was kept: held-out loss, exact match, drift from the base, and the verdict in plain words.

::

    figures.py     the typed figures
    forward.py     how rows go through a model
    heldout.py     loss and exact match; decode.py answers, text.py compares
    drift.py       divergence from the base on its own answers
    measure.py     all of it for one loaded model
    statistics.py  intervals and tests of paired differences; summary.py averages and pairs
    calls.py       what the differences come to; verdict.py says it in sentences
    results.py     the finished evaluation and its files
    stage.py       evaluate: every model on the same rows

Importing the package loads nothing.
"""
