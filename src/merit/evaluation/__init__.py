"""What was learned and what was kept: held-out loss, exact match, drift from the base, and a verdict in words.

::

    figures.py     the typed figures
    forward.py     batches and device for measuring
    heldout.py     loss and exact match; decode.py generates answers, text.py compares them
    drift.py       divergence from the base on its own answers
    measure.py     all of these for one loaded model
    statistics.py  intervals and tests of paired differences; summary.py averages and pairs
    calls.py       what follows from the differences; verdict.py puts it in sentences
    results.py     the finished evaluation and its files
    stage.py       evaluate: every model on the same rows

Importing the package loads nothing.
"""
