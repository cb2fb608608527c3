"""The conflict engine: one mean gradient per dataset at the base, compressed, compared, and judged.

``sketch``, ``geometry``, ``reliability`` and ``resampling`` are pure maths, ``gradients`` runs the model, ``store`` keeps
files, ``measure`` and ``stage`` join them, ``result`` is what they hand on.
"""
