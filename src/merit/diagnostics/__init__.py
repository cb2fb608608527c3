"""Was the base ready to be merged on? One file per diagnostic, each a measurement with a verdict by a stated rule.

:mod:`merit.diagnostics.registry` lists them; :mod:`merit.diagnostics.lab` is what they share: one loaded model that moves in
weight space, and fixed rows.
"""
