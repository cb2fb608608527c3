"""Splitting the mixture into K groups: one pure file per method, joined in ``stage``.

A method takes a :class:`merit.split.view.MixtureView` (arrays, sorted by dataset name) and returns groups of indices. To add
one: a file with ``split(view, axes, seed)``, a line in ``merit.split.stage.METHODS``, a test.
"""
